"""A job's past: what makes it the same job, and what a restart finds of it (see `domainbed_reasoning.progress`)."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from domainbed_reasoning import __version__
from domainbed_reasoning.algorithms.earlier_records import own_records, restore_measured, set_aside
from domainbed_reasoning.progress import Progress
from domainbed_reasoning.prompts import PROMPT_VERSION
from domainbed_reasoning.samples import Task

_MODELS = ("model", "clip_model")  # hyper-parameters that may name a folder


class Past:
    """What earlier processes of this job did, and the recording of what this one does.

    Args:
        progress: of the job.
        args: DomainBed's.

    Attributes:
        state: the saved state, until it has been restored; None where there is none.
    """

    def __init__(self, progress: Progress, args: argparse.Namespace):
        self.progress = progress
        self.state = progress.state
        self.keeps_every_model = bool(getattr(args, "save_model_every_checkpoint", False))
        self._args, self._output_dir = vars(args), Path(args.output_dir)
        moved = set_aside(self._output_dir, self._args)
        self._earlier = moved + (self.state["records"] if self.state is not None else "")
        if self.state is not None:
            steps = self.state["steps"]
            print(f"This job goes on after {steps} steps, which are replayed from {progress.folder}.", flush=True)

    @property
    def replays(self) -> bool:
        """Whether the next step or answer is a recorded one."""
        return self.progress.replays

    def end_of_replay(self) -> dict[str, Any] | None:
        """Return the state to go on from, once; None where there is none or it was returned before."""
        state, self.state = self.state, None
        if state is not None:
            restore_measured(self._output_dir, self._earlier)
        return state

    def save(self, steps: int, state: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Save the state that the function ``state`` makes, and the records so far; see `Progress.save`."""
        self.progress.save(steps, lambda: {**state(), "records": own_records(self._output_dir, self._args)}, now)


def past_of(task: Task, hparams: dict[str, Any], args: argparse.Namespace) -> Past | None:
    """Return the past of the job that runs in this process; None, said aloud, where none can be kept.

    Raises:
        JobIsRunning: where another process runs the same job.
    """
    job = describe(task, hparams, args)
    try:
        return Past(Progress(job), args)
    except OSError as error:
        print(f"The progress of this job cannot be kept ({error}): if it is killed it starts over.", flush=True)
        return None


def describe(task: Task, hparams: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that decides the job's numbers, as JSON: a change of any of it makes another job.

    Of the images their names count, not their pixels; of a model in a folder its files' names, sizes and times.
    """
    chains = hashlib.sha256(json.dumps(sorted([*key, chain] for key, chain in task.chains.items())).encode())
    images = hashlib.sha256(json.dumps([task.images, task.labels]).encode())
    return {
        "args": {**vars(args), "output_dir": str(Path(args.output_dir).absolute())},
        "hparams": hparams,
        "model_files": [_files(Path(str(hparams[name])).expanduser()) for name in _MODELS if name in hparams],
        "task": {
            "class_names": list(task.class_names),
            "subject": task.subject,
            "schedule": asdict(task.schedule) if task.schedule is not None else None,
            "chains": chains.hexdigest(),
            "images": images.hexdigest(),
        },
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {
            "domainbed-reasoning": __version__,
            "prompts": PROMPT_VERSION,
            **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
    }


def _files(folder: Path) -> list[tuple[str, int, int]]:
    if not folder.is_dir():
        return []
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
