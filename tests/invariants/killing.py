"""Compare a stock training job that is killed repeatedly with an undisturbed one.

    python tests/invariants/killing.py --kills 100 --algorithm RDMLDG --signal KILL [--steps 16] [--answer label]

It imports what a job needs once and forks a process for each start, so that a kill costs little. A kill falls after a
random number of recorded steps and batches of answers, or while a state is saved. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

MEASURED = ("step_time", "mem_gb")
HPARAMS = {
    "max_new_tokens": 64,
    "batch_size": 2,
    "mtct_epochs": 2,
    "sarr_rounds": 2,
    "sarr_epochs": 1,
    "lora_dropout": 0.1,
    "temperature": 0.3,
    "data_augmentation": True,
    "lr": 1e-3,
}


def start(output_dir: Path, options: argparse.Namespace) -> int:
    """Fork a process that runs the stock train script, its output in ``log.txt`` of the folder; return its number."""
    output_dir.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    log = os.open(output_dir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train", "--dataset", "ShapesReasoning", "--algorithm", options.algorithm, "--test_envs", "2"]
    sys.argv += ["--data_dir", str(output_dir.parent), "--output_dir", str(output_dir), "--steps", str(options.steps)]
    hparams = HPARAMS | {"answer": options.answer} | json.loads(options.hparams)
    sys.argv += ["--hparams", json.dumps(hparams), "--save_model_every_checkpoint"]
    sys.argv += getattr(options, "more", [])
    code = 1
    try:
        getattr(options, "before", lambda: None)()
        runpy.run_module("domainbed.scripts.train", run_name="__main__", alter_sys=True)
        code = 0
    finally:
        atexit._run_exitfuncs()  # what the end of a process does
        sys.stdout.flush()
        os._exit(code)


def run(output_dir: Path, options: argparse.Namespace) -> None:
    """Run the job to its end, undisturbed."""
    child = start(output_dir, options)
    assert os.waitpid(child, 0)[1] == 0, (output_dir / "log.txt").read_text()[-3000:]


def run_and_kill(output_dir: Path, options: argparse.Namespace) -> list[str]:
    """Start the job until it ends well, killing it ``options.kills`` times; return what was done at each kill."""
    moments: list[str] = []
    draw, how = random.Random(options.seed), getattr(signal, f"SIG{options.signal}")
    while True:
        child = start(output_dir, options)
        events, during_save = draw.randint(1, 6), draw.random() < 0.3
        begun = _recorded(output_dir)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0, (output_dir / "log.txt").read_text()[-3000:]
                return moments
            saving = _is_saving()
            if len(moments) < options.kills and _recorded(output_dir) - begun >= events and (saving or not during_save):
                os.kill(child, how)
                ended, status = os.waitpid(child, 0)
                if os.WIFSIGNALED(status):
                    moments.append(f"{_recorded(output_dir)} events{', saving' if saving else ''}")
                break
            time.sleep(0.0005)


def outcome(output_dir: Path) -> dict[str, object]:
    """Return all that a job leaves behind, without what was measured."""
    records = [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]
    for record in records:
        for name in MEASURED:
            record.pop(name)
        record["args"].pop("output_dir")
    models = {path.name: torch.load(path, weights_only=True)["model_dict"] for path in output_dir.glob("model*.pkl")}
    rows = (output_dir / "predictions.jsonl").read_text(encoding="utf-8")
    return {"records": records, "models": models, "rows": rows, "answers": (output_dir / "answers.json").read_text()}


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Return where two outcomes differ, tensors compared bit for bit."""
    found = [name for name in ("records", "rows", "answers") if one[name] != other[name]]
    models, others = one["models"], other["models"]
    assert isinstance(models, dict) and isinstance(others, dict)
    if models.keys() != others.keys():
        return [*found, "models"]
    return found + [
        f"{file}: {name}"
        for file, tensors in models.items()
        for name, tensor in tensors.items()
        if not torch.equal(tensor, others[file][name])
    ]


def _progress() -> Path:
    from domainbed_reasoning.jobs.resume_store import progress_folder

    return progress_folder()


def _is_saving() -> bool:
    with suppress(FileNotFoundError):  # the job has ended and takes its folder away
        return bool(list(_progress().glob("*/.state.pt.*")))
    return False


def _recorded(output_dir: Path) -> int:
    recorded = 0
    for log in _progress().glob("*/log.jsonl"):
        with suppress(FileNotFoundError):
            recorded += log.read_bytes().count(b"\n")
    return recorded


def prepare(cache: Path) -> None:
    """Choose the cache folder, and import and compute once what all forks of this process need."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    torch.set_num_threads(1)
    import domainbed.algorithms
    import domainbed.datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    from domainbed_reasoning.bridge.versions import source_digests

    source_digests()


def main() -> int:
    """Run both and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--algorithm", default="RDMLDG")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--signal", default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answer", default="chain")
    parser.add_argument("--hparams", default="{}", help="JSON, over those of this file")
    options = parser.parse_args()
    prepare(options.folder / "cache")
    run(options.folder / "undisturbed", options)
    killed = options.folder / "killed"
    moments = run_and_kill(killed, options)
    differing = differences(outcome(options.folder / "undisturbed"), outcome(killed))
    left = [str(path) for path in _progress().glob("*/*")]
    summary = {
        "algorithm": options.algorithm,
        "kills": len(moments),
        "moments": moments,
        "differing": differing,
        "left": left,
    }
    print(json.dumps(summary))
    shutil.rmtree(options.folder / "cache", ignore_errors=True)
    return 1 if differing or left else 0


if __name__ == "__main__":
    sys.exit(main())
