"""A job's history: its identity, and the progress that an earlier process has saved (see `replay_log`)."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from domainbed_reasoning import __version__
from domainbed_reasoning.bridge import plugins
from domainbed_reasoning.bridge.versions import LIBRARIES, installed, source_digests
from domainbed_reasoning.chains.prompts import PROMPT_VERSION
from domainbed_reasoning.jobs.replay_log import Progress, Replica
from domainbed_reasoning.jobs.results_file import own_records, restore_measured, set_aside
from domainbed_reasoning.method.ranks import Ranks
from domainbed_reasoning.method.schedule import Schedule
from domainbed_reasoning.method.task import Task
from domainbed_reasoning.mllm import family_plugins
from domainbed_reasoning.mllm.adapter_files import adapter_digest
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_MODELS = ("model", "clip_model")  # hyper-parameters that name a model
_LIBRARIES = (*LIBRARIES, "torchvision", "pillow", "tokenizers")


class History:
    """The recorded progress of this job, and its records in results.jsonl.

    Args:
        progress: of the job.
        args: DomainBed's.
        earlier: the records that were set aside.

    Attributes:
        state: the saved state, until it has been restored; None if there is none.
    """

    def __init__(self, progress: Progress, args: argparse.Namespace, earlier: str):
        self.progress = progress
        self.state = progress.state
        self.keeps_every_model = bool(getattr(args, "save_model_every_checkpoint", False))
        self._args, self._output_dir = vars(args), Path(args.output_dir)
        self._earlier = earlier
        if self.state is not None:
            self._earlier += self.state["records"]
            steps = self.state["steps"]
            _log.info(f"Resuming after {steps} steps, replayed from {progress.folder}.")

    @property
    def replays(self) -> bool:
        """Whether the next step or answer is a recorded one."""
        return self.progress.replays

    def end_of_replay(self) -> dict[str, Any] | None:
        """Return the state to resume from, once; None if there is none or it was returned before."""
        state, self.state = self.state, None
        if state is not None:
            restore_measured(self._output_dir, self._earlier)
        return state

    def save(self, steps: int, state: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Save what ``state()`` returns, and the records so far; see `Progress.save`."""
        self.progress.save(steps, lambda: {**state(), "records": own_records(self._output_dir, self._args)}, now)


def history_of(
    task: Task, schedule: Schedule, hparams: dict[str, Any], args: argparse.Namespace, ranks: Ranks | None = None
) -> History | None:
    """Return the history of this process's job; None if ``resume`` is off or, with a message, it cannot be saved.

    Existing records of the job are set aside in any case: DomainBed starts at step 0 and appends. Of several ranks, the
    first reads and records the job's progress; the others replay what it has read.

    Raises:
        JobIsRunning: another process is running the same job.
        OSError: the earlier records cannot be set aside.
    """
    ranks = ranks or Ranks()
    if ranks.rank > 0:
        recorded = ranks.from_first(None)
        return History(Replica(recorded), args, "") if recorded is not None else None
    progress = None
    if hparams["resume"]:
        try:
            job = describe(task, schedule, hparams, args) | ({"ranks": ranks.world} if ranks.world > 1 else {})
            progress = Progress(job)
            if progress.state is None:
                _report_changes(job, progress)
        except OSError as error:
            _log.warning(f"Cannot save this job's progress ({error}): if interrupted, it restarts at step 0.")
    try:
        earlier = set_aside(Path(args.output_dir), vars(args))
    except OSError:
        if progress is not None:
            progress.close()
        raise
    ranks.from_first(progress.recorded() if progress is not None else None)
    return History(progress, args, earlier) if progress is not None else None


def describe(task: Task, schedule: Schedule, hparams: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that determines the job's results, as JSON: if any of it changes, it is another job.

    Images and the files of a model are identified by names, sizes and times, a model from the hub by its commit, chains
    an adapter to start from and the source files of this package, of DomainBed and of the job's plug-ins by their
    contents, a bundle by its name and SHA-256.

    Raises:
        OSError: a file cannot be read.
    """
    chains = sorted([*key, chain] for key, chain in task.chains.items())
    described = {
        "args": {**vars(args), "output_dir": str(Path(args.output_dir).absolute())},
        "hparams": hparams,
        "models": [
            _files(str(hparams[name]), hparams.get("revision") if name == "model" else None)
            for name in _MODELS
            if name in hparams
        ],
        "task": {
            "class_names": list(task.class_names),
            "subject": task.subject,
            "schedule": asdict(schedule),
        }
        | ({"offered": [list(labels) for labels in task.offered]} if task.offered else {}),
        "chains": _digest(chains),
        "images": _images_digest(task),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "code": source_digests()
        | plugins.code_of(args.algorithm, task.dataset)
        | plugins.code_of_modules(family_plugins.used_modules()),
        "versions": {
            "domainbed-reasoning": __version__,
            "prompts": PROMPT_VERSION,
            "Python": platform.python_version(),
            **{name: installed(name) for name in _LIBRARIES},
        },
    }
    if hparams.get("init_adapter"):
        described["init_adapter"] = adapter_digest(str(hparams["init_adapter"]))
    return described | ({"bundle": task.bundle} if task.bundle else {})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _images_digest(task: Task) -> str:
    """Return the digest of names and labels and, where there are files, of their sizes and times, image by image."""
    digest = hashlib.sha256()
    for names in task.images:
        digest.update(f"{len(names)}\0".encode())
        for name in names:
            stamp = _stamp(f"{task.folder}{os.sep}{name}") if task.folder else ()
            digest.update(f"{name}\0{stamp}\0".encode("utf-8", "surrogateescape"))
    for labels in task.labels:
        digest.update(json.dumps(list(labels)).encode())
    return digest.hexdigest()


def _stamp(path: str | Path) -> tuple[int, int]:
    """Return size in bytes and time of the last change in nanoseconds."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _files(model: str, revision: str | None) -> Any:
    """Return the identity of a model's files: a folder's names, sizes and times, or the commit of a hub id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return [(path.name, *_stamp(path)) for path in sorted(folder.iterdir()) if path.is_file()]
    if model.count("/") != 1:
        return []  # embedded: a part of the package
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent.name if isinstance(config, str) else []  # snapshots/<commit>/config.json


def _report_changes(job: Mapping[str, Any], progress: Progress) -> None:
    """Report why a job starts at step 0 although the same command has progress: what else has changed."""
    for path in progress.folder.parent.glob("[!.]*/job.json"):
        with suppress(OSError, ValueError, RecursionError):
            other = json.loads(path.read_text(encoding="utf-8"))
            if path.parent == progress.folder or not isinstance(other, dict) or other.get("args") != job["args"]:
                continue
            now = json.loads(json.dumps(dict(job)))
            changed = [name for name in now | other if other.get(name) != now.get(name)]
            _log.info(
                f"The saved progress of this command in {path.parent} is not used, because {', '.join(changed)} "
                "changed. Starting from step 0."
            )
