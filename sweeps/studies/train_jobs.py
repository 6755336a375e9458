"""Train jobs that the stock sweep does not create, named and started like those of the stock sweep.

A custom study creates `TrainJob`s and passes them to `remove_dead` and `start`: completed jobs are skipped, the remains
of dead ones are removed, and one of our launchers runs the rest.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge.train_args import TRAIN_SCRIPT
from domainbed_reasoning.sweeps.launchers import restart
from domainbed_reasoning.sweeps.launchers.jobs import Failure

Launcher = Callable[[Sequence[str]], Sequence[Failure]]


@dataclass(frozen=True)
class TrainJob:
    """One job of the stock train script.

    Attributes:
        arguments: of the train script, as in the sweep.
        sweep: the sweep's folder.
    """

    arguments: Mapping[str, Any]
    sweep: Path

    @property
    def folder(self) -> Path:
        """The job's output folder, named by the MD5 of its arguments as in DomainBed's sweep."""
        text = json.dumps(self.arguments, sort_keys=True)
        return self.sweep / hashlib.md5(text.encode()).hexdigest()

    @property
    def done(self) -> bool:
        """Whether it has completed."""
        return (self.folder / "done").exists()

    @property
    def command(self) -> str:
        """The stock command, for a shell."""
        words = ["python", "-m", TRAIN_SCRIPT]
        for key, value in sorted({**self.arguments, "output_dir": str(self.folder)}.items()):
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        return shlex.join(words)


def make_job(
    sweep: Path,
    dataset: str,
    algorithm: str,
    targets: Sequence[int],
    *,
    data_dir: str,
    trial_seed: int,
    hparams_seed: int = 0,
    hparams: Mapping[str, Any],
    **more: Any,
) -> TrainJob:
    """Return a job with the arguments and seed of the stock sweep.

    Args:
        sweep: the sweep's folder.
        dataset: DomainBed's name.
        algorithm: DomainBed's name.
        targets: numbers of the target environments.
        data_dir: DomainBed's ``--data_dir``.
        trial_seed: DomainBed's seed of the splits.
        hparams_seed: DomainBed's seed of the hyper-parameters; 0 for the defaults.
        hparams: overrides of the defaults.
        more: further arguments of the train script; None omits one.
    """
    targets = list(targets)
    seed = hashlib.md5(str((dataset, algorithm, targets, hparams_seed, trial_seed)).encode()).hexdigest()
    arguments = {
        "dataset": dataset,
        "algorithm": algorithm,
        "test_envs": targets,
        "holdout_fraction": 0.2,
        "hparams_seed": hparams_seed,
        "data_dir": data_dir,
        "task": "domain_generalization",
        "trial_seed": trial_seed,
        "seed": int(seed, 16) % 2**31,  # misc.seed_hash, without importing torch
    }
    if hparams:
        arguments["hparams"] = json.dumps(hparams)
    return TrainJob(arguments | {name: value for name, value in more.items() if value is not None}, sweep)


def remove_dead(jobs: Iterable[TrainJob]) -> None:
    """Remove the folders of jobs that did not complete.

    Raises:
        ValueError: some of them are running, or queued by Slurm.
    """
    dead = [job for job in jobs if job.folder.exists() and not job.done]
    for sweep in dict.fromkeys(job.sweep for job in dead):
        restart.check_nothing_runs(sweep)
    for job in dead:
        shutil.rmtree(job.folder)


def start(jobs: Iterable[TrainJob], launcher: Launcher) -> Sequence[Failure]:
    """Create the folders of jobs that have none, in order, and pass these jobs to a launcher."""
    new = [job for job in jobs if not job.folder.exists()]
    for job in new:
        job.folder.mkdir(parents=True)
    return launcher([job.command for job in new]) if new else []
