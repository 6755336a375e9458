"""Checkpoints of published sizes with random weights: load, a micro-batch of MTCT, both answers, export, predict.

    make real-size                                        # all of them, about an hour on two cores
    python -m benchmarks.real_size InternVL3-1B           # some

Each stage is a process of its own, so that its peak memory is its own: what the process allocates (anonymous memory)
and all that it touches, mapped weight files included. Writes `results/real_size/NAME.json` and `table.md`.
See `published_checkpoints` for what the folders have in common with the hub's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.measure import CHECKOUT, commit, machine, use_domainbed, versions
from benchmarks.published_checkpoints import CHECKPOINTS, Checkpoint, build, shrunken
from domainbed_reasoning.files.atomic import replace_text

RESULTS = CHECKOUT / "results" / "real_size"
NAMES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
NEW_TOKENS = 16  # of a chain; the paper's have about 250
_POLL = 0.05  # seconds
_BASE, _JOB, _ADAPTERS, _MERGED = "base", "job", "adapters", "merged"


# ---- what a stage does, in its own process ----


class Clock:
    """Seconds of named parts of a stage, in order, and those of the processor: others may use the machine as well."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.of_processor: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        start, begun = time.monotonic(), time.process_time()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        self.of_processor[name] = round(time.process_time() - begun, 2)


def _build(checkpoint: Checkpoint, work: pathlib.Path, clock: Clock) -> dict[str, Any]:
    with clock("build"):
        count = build(checkpoint, work / _BASE)
    shards = sorted((work / _BASE).glob("*.safetensors"))
    return {"parameters": count, "shards": len(shards), "bytes": _size(shards)}


def _load(checkpoint: Checkpoint, work: pathlib.Path, clock: Clock) -> dict[str, Any]:
    from domainbed_reasoning.mllm import load_mllm

    with clock("load"):
        mllm = load_mllm(str(work / _BASE), dtype=checkpoint.dtype)
    weights = sum(weight.numel() * weight.element_size() for weight in mllm.network.parameters())
    chat = mllm.chat_format
    return {"weights": weights, "end_token": mllm.tokenizer.convert_ids_to_tokens(chat.end_token)}


def _train(checkpoint: Checkpoint, work: pathlib.Path, clock: Clock) -> dict[str, Any]:
    import torch

    task, hparams = _task(checkpoint, work)
    from domainbed_reasoning import registry
    from domainbed_reasoning.bridge.samples import with_ids

    torch.manual_seed(0)
    with clock("load"):
        algorithm = registry.load(registry.ALGORITHMS["MTCT"])((3, 224, 224), len(NAMES), 1, hparams)
    minibatch = (with_ids(_pixels(), torch.tensor([[0, 0]])), torch.zeros(1, dtype=torch.long))
    mllm = algorithm.mllm
    with torch.no_grad():  # fresh adapters have no gradient but in B
        for weight in mllm.adapters().values():
            weight.normal_(std=0.02)
    before = {name: weight.detach().clone() for name, weight in mllm.adapters().items()}
    with clock("update"):
        values = algorithm.update([minibatch])
    moved = sum(not torch.equal(before[name], weight) for name, weight in mllm.adapters().items())
    algorithm.eval()
    for answer in ("label", "chain"):
        algorithm.hparams["answer"] = answer
        with clock(answer):
            scores = algorithm.predict(minibatch[0])
        assert scores.isfinite().all()
    with clock("save"):
        _save(task, hparams, algorithm.state_dict(), work / _JOB)
    questions = {"q_cls": algorithm.q_cls, "q_reason": algorithm.q_reason}
    tokens = {name: mllm.prompt(question)["input_ids"].shape[1] for name, question in questions.items()}
    return {
        "loss": values["loss"],
        "adapters": len(before),
        "moved": moved,
        "tokens": {**tokens, "chain": len(mllm.target(task.chains[0, 0]))},
        "scores": _scores(mllm, algorithm.q_cls),
    }


def _scores(mllm: Any, question: str) -> list[float]:
    """Return log p of every class name for the picture, in nats."""
    import torch

    with torch.no_grad():
        return mllm.class_scores(_pixels(), question, NAMES)[0].tolist()


def _pixels() -> Any:
    import torch

    return torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _task(checkpoint: Checkpoint, work: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """Return MTCT's task, one image with the bundle's first chain, and hparams."""
    use_domainbed()
    from domainbed_reasoning import registry
    from domainbed_reasoning.bridge.samples import attach_task
    from domainbed_reasoning.chains.bundled import read_bundle
    from domainbed_reasoning.method.schedule import Schedule, Stage
    from domainbed_reasoning.method.task import Task

    hparams = {key: hparam.default for key, hparam in registry.load(registry.ALGORITHMS["MTCT"]).HPARAMS.items()}
    hparams |= {"model": str(work / _BASE), "dtype": checkpoint.dtype, "max_new_tokens": NEW_TOKENS}
    hparams |= {"batch_size": 1, "micro_batch": 1}
    task = Task(
        dataset="PACSReasoning",
        class_names=NAMES,
        environments=("photo", "sketch"),
        test_envs=(1,),
        labels=((0,), (0,)),
        images=(("0.png",), ("0.png",)),
        chains={(0, 0): str(read_bundle("PACS").lines[0][1]["chain"])},
        schedule=Schedule((Stage(0, 0, 999),), 1000, 1000),
    )
    attach_task(hparams, task)
    return task, hparams


def _save(task: Any, hparams: dict[str, Any], adapters: dict[str, Any], folder: pathlib.Path) -> None:
    """Leave what DomainBed's train script leaves of a job."""
    import torch

    from domainbed_reasoning.jobs.answers import write_task

    named = {"algorithm": "MTCT", "dataset": "PACSReasoning", "test_envs": [1], "output_dir": str(folder)}
    write_task(task, hparams, argparse.Namespace(**named))
    torch.save({"args": named, "model_dict": adapters}, folder / "model.pkl")
    (folder / "results.jsonl").write_text("")


def _size(files: Iterable[pathlib.Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _export_adapters(checkpoint: Checkpoint, work: pathlib.Path, clock: Clock) -> dict[str, Any]:
    from domainbed_reasoning.jobs.export import export_adapters

    with clock("export"):
        export_adapters(work / _JOB, work / _ADAPTERS)
    return {"bytes": _size((work / _ADAPTERS).glob("*.safetensors"))}


def _export_merged(checkpoint: Checkpoint, work: pathlib.Path, clock: Clock) -> dict[str, Any]:
    from domainbed_reasoning.jobs.export import export_merged

    with clock("export"):
        export_merged(work / _JOB, work / _MERGED)
    return {"bytes": _size((work / _MERGED).glob("*.safetensors"))}


def _predict(folder: str, checkpoint: Checkpoint, work: pathlib.Path, clock: Clock) -> dict[str, Any]:
    from PIL import Image

    from domainbed_reasoning.jobs.predict import Predictor

    with clock("load"):
        predictor = Predictor(work / folder, answer="both", model=str(work / _BASE) if folder == _ADAPTERS else None)
    picture = Image.fromarray(_pixels()[0].permute(1, 2, 0).numpy())
    with clock("predict"):
        found = predictor.predict(picture)
    assert found.label_class in NAMES and found.chain is not None
    scores = _scores(predictor.mllm, predictor.job.q_cls)
    trained = json.loads((work / "train.json").read_text())["scores"]
    return {"deviation": max(abs(a - b) for a, b in zip(scores, trained, strict=True)), "scores": scores}


def _count(checkpoint: Checkpoint, work: pathlib.Path, clock: Clock) -> dict[str, Any]:
    """Count a micro-batch of InternVL3-8B on the meta device, and leave a job with random adapters."""
    import torch

    from benchmarks import roofline
    from domainbed_reasoning.mllm.adapters import LoraSettings, adapter_shapes
    from domainbed_reasoning.mllm.loading import empty_network

    task, hparams = _task(checkpoint, work)
    with clock("load"):
        network, _ = empty_network(str(work / _BASE))
    shapes = adapter_shapes(network, LoraSettings.of(hparams))
    with clock("update"):
        counting, kept = roofline.count("float32", 1, 0.0, len(NAMES), 250, 3)
    _save(task, hparams, {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}, work / _JOB)
    return {"adapters": len(shapes), "tflop": sum(counting.operations.values()) / 1e12, "kept": kept}


Stage = Callable[[Checkpoint, pathlib.Path, Clock], dict[str, Any]]
STAGES: dict[str, Stage] = {
    "build": _build,
    "load": _load,
    "train": _train,
    "export": _export_adapters,
    "predict": functools.partial(_predict, _ADAPTERS),
    "export, merged": _export_merged,
    "predict, merged": functools.partial(_predict, _MERGED),
}
ON_META: dict[str, Stage] = {"build": _build, "count": _count, "export": _export_adapters}


def run_stage(name: str, checkpoint: Checkpoint, work: pathlib.Path) -> None:
    """Run one stage and write what it found to ``NAME.json`` in the work folder."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    clock = Clock()
    found = (STAGES | ON_META)[name](checkpoint, work, clock)
    replace_text(
        work / f"{name}.json", json.dumps({**found, "seconds": clock.seconds, "processor_seconds": clock.of_processor})
    )


# ---- the stages' processes ----


def measured(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; return the most that it allocated, and the most that it had in memory, in GB.

    Raises:
        RuntimeError: it failed.
    """
    process = subprocess.Popen(command, cwd=CHECKOUT)
    status, allocated, resident = pathlib.Path(f"/proc/{process.pid}/status"), 0, 0
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it has just ended
            memory = dict(re.findall(r"(RssAnon|VmHWM):\s*(\d+) kB", status.read_text()))
            allocated = max(allocated, int(memory.get("RssAnon", 0)))
            resident = max(resident, int(memory.get("VmHWM", 0)))
        time.sleep(_POLL)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}.")
    return allocated / 1e6, resident / 1e6


def run(name: str, work: pathlib.Path, small: bool = False) -> Iterator[dict[str, Any]]:
    """Take one checkpoint through all stages; yield what each found, took and needed so far, after each of them.

    Args:
        name: of `CHECKPOINTS`.
        work: a folder for up to three copies of the weights; stages that it has the results of are not repeated.
        small: with two narrow layers a tower.
    """
    checkpoint = CHECKPOINTS[name]
    stages: dict[str, Any] = {}
    for stage in STAGES if checkpoint.weights else ON_META:
        command = [sys.executable, "-m", "benchmarks.real_size", name, "--stage", stage, "--work", str(work)]
        file = work / f"{stage}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        if "allocated_gb" not in found:
            allocated, resident = measured([*command, "--small"] if small else command)
            found = json.loads(file.read_text())
            found |= {"allocated_gb": round(allocated, 2), "resident_gb": round(resident, 2)}
            replace_text(file, json.dumps(found))
            print(f"{name}: {stage}: {found['seconds']} s, {allocated:.1f} GB", file=sys.stderr, flush=True)
        stages[stage] = found
        yield {
            "checkpoint": checkpoint.name,
            "dtype": checkpoint.dtype,
            "machine": f"{machine()}, no GPU",
            "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "versions": versions(),
            "command": "make real-size",
            "stages": stages,
        }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results as a Markdown page, a row a stage."""
    lines = [
        "# Checkpoints of published sizes, with random weights in bfloat16",
        "",
        "`make real-size` writes this page and the files beside it. One image of one tile, a chain of the bundle's,",
        f"{NEW_TOKENS} new tokens; each stage is a process of its own. Seconds are the processor's; in brackets, a",
        "clock's on a busy machine. *Allocated* is anonymous memory, *in memory* includes mapped weight files.",
        "",
        "| checkpoint | stage | seconds | allocated, GB | in memory, GB | found |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for name, stage in result["stages"].items():
            walls, processor = stage["seconds"], stage["processor_seconds"]
            seconds = ", ".join(f"{part} {processor[part]:.0f} ({walls[part]:.0f})" for part in walls)
            memory = f"{stage['allocated_gb']:.1f} | {stage['resident_gb']:.1f}"
            lines.append(f"| {result['checkpoint']} | {name} | {seconds} | {memory} | {_said(stage)} |")
    for machine_name in sorted({f"{result['machine']}, {result['threads']} thread(s)" for result in results}):
        lines += ["", f"Machine: {machine_name}."]
    return "\n".join(lines) + "\n"


def _said(stage: dict[str, Any]) -> str:
    """Return what a stage found, in words."""
    said = []
    if "parameters" in stage:
        said.append(f"{stage['parameters']:,} parameters")
    if stage.get("bytes"):
        said.append(
            f"{stage['bytes'] / 1e9:.2f} GB on disk" + (f" in {stage['shards']} shards" if "shards" in stage else "")
        )
    if "weights" in stage:
        said.append(f"{stage['weights'] / 1e9:.1f} GB of weights, answers end with `{stage['end_token']}`")
    if "loss" in stage:
        tokens = ", ".join(f"{name} {count}" for name, count in stage["tokens"].items())
        said.append(
            f"loss {stage['loss']:.2f}, {stage['moved']} of {stage['adapters']} adapters moved; tokens: {tokens}"
        )
    if "tflop" in stage:
        said.append(f"{stage['adapters']} adapters, {stage['tflop']:.1f} TFLOP, {stage['kept'] / 1e9:.1f} GB kept")
    if "deviation" in stage:
        said.append(f"log p of the names as trained, to {stage['deviation']:.0e} nats")
    return "; ".join(said).replace("|", r"\|")


def main(argv: Sequence[str] | None = None) -> int:
    """Take the checkpoints through all stages, one after the other, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(CHECKPOINTS)}; default: all")
    parser.add_argument(
        "--work", type=pathlib.Path, help="folder that keeps the checkpoints (default: a temporary one)"
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder for results")
    parser.add_argument("--small", action="store_true", help="two narrow layers a tower, everything else as published")
    parser.add_argument("--stage", choices=[*STAGES, *ON_META], help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if unknown := [name for name in given.names if name not in CHECKPOINTS]:
        parser.error(f"no checkpoint {', '.join(unknown)}. Available: {', '.join(CHECKPOINTS)}")
    if given.stage:
        checkpoint = CHECKPOINTS[given.names[0]]
        run_stage(given.stage, shrunken(checkpoint) if given.small else checkpoint, given.work)
        return 0
    given.results.mkdir(parents=True, exist_ok=True)
    for name in given.names or CHECKPOINTS:
        with tempfile.TemporaryDirectory() as temporary:
            work = pathlib.Path(given.work or temporary) / name
            work.mkdir(parents=True, exist_ok=True)
            for result in run(name, work, given.small):
                replace_text(given.results / f"{name}.json", json.dumps(result, indent=1) + "\n")
    written = [given.results / f"{name}.json" for name in CHECKPOINTS]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in written if path.exists()]
    replace_text(given.results / "table.md", table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
