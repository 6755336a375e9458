"""SARR by round: acceptance, chain length, agreement with the label path, accuracy (arXiv 2602.23777).

From a job's records: the accuracies of every evaluation (at the ends of stages) and, for round k,

    accepted_k = kept chains / generated chains,

at the end of the round, as recorded then and later. Records within a round have the share so far. (In jobs of earlier
versions, these records, and thus the last round's, have the mean over the steps since the previous record.)

Other measures are computed with the checkpoints of DomainBed's ``--save_model_every_checkpoint`` on a sample of images:
chain length in words, the share of chains that name a class, agreement of conclusions with the classification path, and
both answers' accuracies. Checkpoints answer with the job's settings, including majority votes. A chain that names no
class is wrong here and in the job's answers.json; DomainBed's records use the label path's answer instead.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tqdm

from domainbed_reasoning.analysis.checkpoints import Checkpoint, records_of
from domainbed_reasoning.analysis.data import AnalysisData
from domainbed_reasoning.chains.chain import count_words
from domainbed_reasoning.chains.reader import normalize
from domainbed_reasoning.jobs.seeds import seeded
from domainbed_reasoning.jobs.trained import read_job
from domainbed_reasoning.jobs.values import is_evaluated
from domainbed_reasoning.method.answering import answering_chains, answers_from_chains
from domainbed_reasoning.method.task import SampleId
from domainbed_reasoning.mllm import MLLM

_ACCEPTED = re.compile(r"sarr(\d+)_accepted")
PAPER = (
    "paper, InternVL3-8B, TerraIncognita: target accuracy 70.06% after round 1, 70.59% after 2, 70.65% after 3;\n"
    "of the self-labeled chains rejected: 39.5% in the first round, 14.8% at the end"
)


def from_records(folder: str | pathlib.Path, test_envs: Sequence[int]) -> list[dict[str, Any]]:
    """Return one row per evaluation of a job.

    Args:
        folder: of the job.
        test_envs: its target domains.

    Returns:
        Rows without those that ``first_evaluation`` skips: ``step``, ``stage`` (-1 at DomainBed's step 0, 0 on teacher
        chains, k in SARR's round k),
        ``accepted`` of the whole round (None outside of rounds), ``source_out`` and ``target`` accuracies in [0, 1].

    Raises:
        ValueError: if the job has no records, no stages or no evaluation.
    """
    records = records_of(folder)
    if not records:
        raise ValueError(f"{folder} has no records in results.jsonl.")
    if "stage" not in records[-1]:
        raise ValueError(f"{folder}: {records[-1]['args']['algorithm']} has no stages; pass jobs of SARR or RDMLDG.")
    last = records[-1] if (pathlib.Path(folder).expanduser() / "done").is_file() else None
    rows = []
    for record in records:
        if not is_evaluated(record) and record is not last:
            continue
        stage = _stage_of(record)
        out = [value for key, value in record.items() if key.endswith("_out_acc") and _env(key) not in test_envs]
        target = [value for key, value in record.items() if key.endswith("_in_acc") and _env(key) in test_envs]
        rows.append(
            {
                "step": record["step"],
                "stage": stage,
                "accepted": _accepted_in(records, stage),
                "source_out": sum(out) / len(out),
                "target": sum(target) / len(target) if target else None,
            }
        )
    if not rows:
        raise ValueError(f"{folder}: the job has not reached its hparam first_evaluation.")
    return rows


def _stage_of(record: Mapping[str, Any]) -> int:
    """Return the stage that an evaluation ends, -1 for step 0.

    The record's own ``stage`` is a mean over the steps since the last evaluation; the shares in the record identify the
    latest round.
    """
    if not record["step"]:
        return -1
    return max((int(found[1]) for key in record if (found := _ACCEPTED.fullmatch(key))), default=0)


def _accepted_in(records: Sequence[Mapping[str, Any]], stage: int) -> float | None:
    key = f"sarr{stage}_accepted"
    after = [record[key] for record in records if key in record and _stage_of(record) > stage]
    within = [record[key] for record in records if key in record and _stage_of(record) == stage]
    return float(known[-1]) if (known := [*within, *after]) else None


def _env(key: str) -> int:
    return int(key.removeprefix("env").partition("_")[0])


def from_checkpoints(
    folder: str | pathlib.Path,
    steps: Sequence[int],
    data: AnalysisData,
    samples: Sequence[SampleId],
    model: str | None = None,
    trust_remote_code: bool = False,
) -> dict[int, dict[str, Any]]:
    """Return the checkpoints' measures by step; steps without a saved checkpoint are absent.

    Args:
        folder: of the job.
        steps: of its evaluations, in order.
        data: the dataset.
        samples: samples to evaluate.
        model: base model, if the job's path no longer exists.
        trust_remote_code: see `read_job`.
    """
    path = pathlib.Path(folder).expanduser()
    files = {step: path / f"model_step{step}.pkl" for step in steps}
    files[steps[-1]] = path / "model.pkl"
    there = {step: file for step, file in files.items() if file.is_file()}
    found = {}
    for step, file in tqdm.tqdm(there.items(), "checkpoints", disable=None):
        job = read_job(path, file.name, trust_remote_code)
        found[step] = _answers_of(Checkpoint(str(folder), job), data, samples, model)
    return found


def _answers_of(
    checkpoint: Checkpoint, data: AnalysisData, samples: Sequence[SampleId], model: str | None
) -> dict[str, Any]:
    """Return one checkpoint's measures; its model is freed before the next one loads."""
    assert checkpoint.job is not None
    return answer_both_ways(checkpoint.load(model), data, samples, *checkpoint.job.chain_settings)


def without_checkpoint(folder: str | pathlib.Path, steps: Sequence[int], answered: Collection[int]) -> str | None:
    """Return a message about evaluations without a checkpoint and how to save them; None if all have one.

    Args:
        folder: of the job.
        steps: of its evaluations.
        answered: steps whose checkpoints were evaluated.
    """
    missing = ", ".join(str(step) for step in steps if step not in answered)
    if not missing:
        return None
    name = pathlib.Path(folder).name
    return f"{name}: no checkpoint of step {missing}; train with --save_model_every_checkpoint to save them"


def answer_both_ways(
    mllm: MLLM,
    data: AnalysisData,
    samples: Sequence[SampleId],
    max_new_tokens: int,
    batch: int,
    votes: int = 1,
    vote_temperature: float = 0.0,
    exact: bool = False,
) -> dict[str, Any]:
    """Return a model's measures by both paths: shares in [0, 1] and the mean chain length in words."""
    voting = (votes, vote_temperature, exact)
    names = data.task.class_names
    words = parsed = agree = by_chain = by_label = 0
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        pixels = data.pixels(part)
        with seeded(0, "answers", part):
            chains = answering_chains(mllm, pixels, data.q_reason, names, max_new_tokens, batch, *voting)
        concluded = answers_from_chains(chains, names, exact)
        labels = mllm.class_scores(pixels, data.q_cls, names).argmax(1).tolist()
        true = [data.label(sample) for sample in part]
        words += sum(count_words(chain if exact else normalize(chain).text) for chain in chains)
        parsed += sum(answer is not None for answer in concluded)
        agree += sum(a == b for a, b in zip(concluded, labels, strict=True))
        by_chain += sum(a == b for a, b in zip(concluded, true, strict=True))
        by_label += sum(a == b for a, b in zip(labels, true, strict=True))
    n = len(samples)
    shares = {"parsed": parsed / n, "agreement": agree / n, "chain": by_chain / n, "label": by_label / n}
    return {"images": n, "words": words / n, **shares}
