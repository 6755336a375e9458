"""Both loss terms of a model, before and after training: nats, tokens below 0.25 and gradient norms.

They are measured on images of the source domains that DomainBed held out for validation and that have a chain. Chains
of the target domain are never read.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from domainbed_reasoning.analysis.data import AnalysisData, data_of_job
from domainbed_reasoning.analysis.token_shift import LOW
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.jobs.trained import TrainedJob, read_job
from domainbed_reasoning.method.objective import chain_nll, label_nll
from domainbed_reasoning.method.task import SampleId
from domainbed_reasoning.mllm import load_mllm

IMAGES = 5  # of each source domain
MICRO_BATCH = 5
TERMS = {"label": label_nll, "chain": chain_nll}


def held_out(job: Path, data: AnalysisData) -> list[SampleId]:
    """Return up to `IMAGES` validation images with a chain of each source domain, by the job's own split."""
    lines = [json.loads(line) for line in (job / "predictions.jsonl").read_text().splitlines()]
    found: list[SampleId] = []
    for env in data.sources:
        known = [(env, line["index"]) for line in lines if line["env"] == env and line["split"] == "out"]
        known = sorted(sample for sample in known if sample in data.task.chains)
        found += sorted(random.Random(0).sample(known, min(IMAGES, len(known))))
    return found


def measure(mllm: Any, data: AnalysisData, samples: list[SampleId]) -> dict[str, Any]:
    """Return both terms of a model with adapters.

    Args:
        mllm: the model, in evaluation mode; gradients are those of its trainable tensors.
        data: images, names and chains.
        samples: n samples, all with a chain.

    Returns:
        For ``label`` and ``chain``: ``nats``, the mean of eq. 1's term; ``low``, the share of target tokens with a
        probability below 0.25, in [0, 1]; ``gradient_norm`` of the mean over the samples; and ``images``, n.
    """
    weights = [weight for weight in mllm.parameters() if weight.requires_grad]
    nats, low, tokens = ({name: 0.0 for name in TERMS} for _ in range(3))
    sums = {name: [torch.zeros_like(weight, dtype=torch.float32) for weight in weights] for name in TERMS}
    for start in range(0, len(samples), MICRO_BATCH):
        batch = samples[start : start + MICRO_BATCH]
        texts = [data.name(sample) for sample in batch], [str(data.task.chains[sample]) for sample in batch]
        both = mllm.two_path_log_likelihoods(data.pixels(batch), (data.q_cls, data.q_reason), texts)
        for (name, nll), (values, mask) in zip(TERMS.items(), both, strict=True):
            term = nll(values, mask).sum() / len(samples)
            gradients = torch.autograd.grad(term, weights, retain_graph=name == "label", allow_unused=True)
            for total, gradient in zip(sums[name], gradients, strict=True):
                if gradient is not None:
                    total += gradient
            nats[name] += float(term.detach())
            low[name] += int((values.detach()[mask].exp() < LOW).sum())
            tokens[name] += int(mask.sum())
    return {"images": len(samples)} | {
        name: {
            "nats": nats[name],
            "low": low[name] / tokens[name],
            "gradient_norm": float(torch.stack([total.norm() for total in sums[name]]).norm()),
        }
        for name in TERMS
    }


def measure_job(folder: Path, output: Path) -> None:
    """Write a job's terms before and after training to ``output/terms``, unless they are there.

    Before training, adapters are drawn with seed 0; their product is zero. Jobs of the same rank and target share that
    measurement.
    """
    after = output / "terms" / f"{folder.name}.json"
    if after.exists():
        return
    job = read_job(folder)
    data = data_of_job(job, chains=True)
    before = output / "terms" / f"before_target{'_'.join(map(str, job.test_envs))}.json"
    samples = held_out(folder, data)
    before.parent.mkdir(parents=True, exist_ok=True)
    if not before.exists():
        replace_text(before, json.dumps(measure(_untrained(job), data, samples), indent=1) + "\n")
    replace_text(after, json.dumps(measure(job.load(), data, samples), indent=1) + "\n")


def _untrained(job: TrainedJob) -> Any:
    torch.manual_seed(0)
    return load_mllm(job.model, lora=job.lora(), dtype=job.hparams["dtype"]).eval()
