"""A whole job, RD-MLDG on ShapesReasoning, against the same job made of TRL, `generate` and a forward a class name.

MTCT and two rounds of an epoch each, evaluations of all 560 images after the first update and each stage, both answers
at the last one: `python -m domainbed.scripts.train` with the package's defaults but for the epochs, and
`benchmarks.assembled_job` with the same images, splits, teacher, steps, images of a batch and settings of LoRA and
AdamW. Both are processes of their own, timed from start to end, by wall and by processor time. TRL weighs tokens alike,
so the two jobs end with other weights; the answers are compared with one job's weights in the other's functions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.assembled_job import Assembled
from benchmarks.measure import CHECKOUT, REPEATS, BenchmarkRow, use_domainbed
from benchmarks.parts import Parts, shares

TARGET = 3
EPOCHS = {"mtct_epochs": 1, "sarr_epochs": 1, "sarr_rounds": 2}
BAR = 2.0
TRAIN = ["--dataset", "ShapesReasoning", "--test_envs", str(TARGET)]


def environment(work: pathlib.Path) -> dict[str, str]:
    """Return the environment of a job's process: one thread, no hub, and progress kept in the benchmark's folder."""
    from domainbed_reasoning.bridge import upstream

    found = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found |= {"XDG_CACHE_HOME": str(work / "cache"), upstream.VARIABLE: str(upstream.use_domainbed())}
    return {**os.environ, **found}


def process(module: str, arguments: Sequence[str], work: pathlib.Path) -> tuple[float, float]:
    """Run a module that takes the time of its start first; return its wall and its processor time in seconds.

    Raises:
        RuntimeError: it failed; the message is the end of what it printed.
    """
    log = work / "log.txt"
    with log.open("wb") as out:
        started = time.time()
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(started), *arguments],
            cwd=CHECKOUT, env=environment(work), stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.time() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{module} ended with {child.returncode}:\n{log.read_text('utf-8', 'replace')[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime


def train(
    algorithm: str, work: pathlib.Path, name: str, *options: str, hparams: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run DomainBed's train script under `timed_train`; return what that writes, with ``wall`` and ``processor``."""
    file = work / f"{name}.json"
    arguments = [*TRAIN, "--algorithm", algorithm, "--output_dir", str(work / name)]
    arguments += ["--hparams", json.dumps(hparams)] if hparams else []
    wall, processor = process("benchmarks.timed_train", [str(file), *options, "--", *arguments], work)
    return {**json.loads(file.read_text("utf-8")), "wall": wall, "processor": processor}


def settings(output: pathlib.Path) -> dict[str, Any]:
    """Return what the assembled job needs to be the same job."""
    import transformers
    from domainbed.lib import misc

    from domainbed_reasoning.algorithms.rd_mldg import RDMLDG
    from domainbed_reasoning.chains.prompts import q_cls, q_reason
    from domainbed_reasoning.images import shapes
    from domainbed_reasoning.method.schedule import Epoch, plan_stages
    from domainbed_reasoning.mllm.adapters import lora_targets
    from domainbed_reasoning.mllm.loading import TINY

    hparams = {name: row.default_on("ShapesReasoning") for name, row in RDMLDG.HPARAMS.items()}
    splits: dict[str, list[tuple[int, int]]] = {}
    for env in range(len(shapes.DOMAINS)):
        keys = [(env, index) for index in range(shapes.SIZE_OF_DOMAIN)]
        out, kept = misc.split_dataset(keys, int(0.2 * len(keys)), misc.seed_hash(0, env))
        splits |= {f"env{env}_in": list(kept), f"env{env}_out": list(out)}
    training = [f"env{env}_in" for env in range(len(shapes.DOMAINS)) if env != TARGET]
    epoch = Epoch({name: len(splits[name]) for name in training}, hparams["batch_size"])
    stages = plan_stages([EPOCHS["mtct_epochs"]] + [EPOCHS["sarr_epochs"]] * EPOCHS["sarr_rounds"], epoch.steps).stages
    questions = {name: ask(shapes.CLASS_NAMES, "creature") for name, ask in (("q_cls", q_cls), ("q_reason", q_reason))}
    network = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(TINY))
    same = ("lora_rank", "lora_alpha", "lr", "weight_decay", "max_new_tokens", "eval_batch")
    return {
        "model": str(TINY),
        "end": "<|im_end|>",
        "seed": 0,
        "test_envs": [TARGET],
        "splits": splits,
        "training_splits": training,
        "class_names": list(shapes.CLASS_NAMES),
        "steps": [stage.steps for stage in stages],
        "images": hparams["batch_size"] * len(training),
        "lora_targets": lora_targets(network, "both", False),
        "output_dir": str(output),
        **questions,
        **{name: hparams[name] for name in same},
    }


def assembled(work: pathlib.Path, name: str) -> dict[str, Any]:
    """Run the assembled job; return what it writes, with ``wall`` and ``processor``."""
    output = work / name
    output.mkdir()
    file = work / f"{name}.json"
    file.write_text(json.dumps(settings(output)), encoding="utf-8")
    wall, processor = process("benchmarks.assembled_job", [str(file)], work)
    found = json.loads((output / "found.json").read_text("utf-8"))
    return {**found, "wall": wall, "processor": processor}


def compare(folder: pathlib.Path) -> str:
    """Return how many answers of our last evaluation the assembled functions give too, with our job's weights.

    Args:
        folder: of the job.

    Raises:
        AssertionError: more than a hundredth of them differ.
    """
    import torch

    from domainbed_reasoning.jobs.trained import read_job

    job = settings(folder)
    peer = Assembled(job, Parts(time.time()))
    weights = dict(peer.model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_job(folder).adapters.items():
            weights[name].copy_(tensor)
    peer.model.eval()
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    keys = [(row["env"], row["index"]) for row in rows]
    chains, classes = peer.answer(keys, both=True)
    same_chains = sum(chain == row["chain"].strip() for chain, row in zip(chains, rows, strict=True))
    named = [job["class_names"][answer] for answer in classes]
    same_classes = sum(name == row["label_answer"] for name, row in zip(named, rows, strict=True))
    assert min(same_chains, same_classes) >= 0.99 * len(rows), (same_chains, same_classes, len(rows))
    return f"{same_chains} of {len(rows)} chains and {same_classes} classes the same with one job's weights"


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the rows of a whole job; prints the share of its wall time by part."""
    use_domainbed()
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed (pip install 'domainbed-reasoning[bench]'): no job to compare", file=sys.stderr)
        found = train("RDMLDG", work, "ours", hparams=EPOCHS)
        print(f"ours, {found['wall']:.1f} s: {shares(found['parts'], found['wall'])}", file=sys.stderr)
        return []
    jobs: dict[str, list[dict[str, Any]]] = {"ours": [], "assembled": []}
    for number in range(max(1, repeats // 2)):  # a job takes as long as other rows with all their repetitions
        for name in list(jobs)[:: 1 if number % 2 == 0 else -1]:
            output = f"{name}{number}"
            found = train("RDMLDG", work, output, hparams=EPOCHS) if name == "ours" else assembled(work, output)
            jobs[name].append(found)
    for name, runs in jobs.items():
        print(f"{name}, {runs[-1]['wall']:.1f} s: {shares(runs[-1]['parts'], runs[-1]['wall'])}", file=sys.stderr)
    ours, theirs = jobs.values()
    kept = ", ".join(f"{share:.0%}" for share in theirs[-1]["kept"])
    print(f"assembled: {theirs[-1]['tokens']:,} tokens generated; chains kept by round: {kept}", file=sys.stderr)
    equal, rows = compare(work / "ours0"), []
    for what, key in (("wall time", "wall"), ("processor time", "processor")):
        ratio = statistics.median(peer[key] / own[key] for peer, own in zip(theirs, ours, strict=True))
        mine, peers = (statistics.median(job[key] for job in runs) for runs in (ours, theirs))
        rows.append(
            BenchmarkRow(
                f"whole tiny job, {what}",
                "TRL's SFTTrainer, `generate`, a forward a class name",
                mine,
                peers,
                "s",
                float("nan"),
                f"{BAR}",
                ratio >= BAR,
                equal,
            )
        )
    return rows
