"""Launch the jobs of a sweep, or delete what its unfinished jobs left."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import pathlib
import random
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from domainbed import algorithms, announce, command_launchers, datasets
from domainbed.lib import misc

NOT_LAUNCHED, INCOMPLETE, DONE = "Not launched", "Incomplete", "Done"


@dataclass(frozen=True)
class Job:
    """The arguments of one training run."""

    arguments: dict[str, Any]
    sweep_dir: str

    @property
    def folder(self) -> str:
        """Where the run writes: the md5 of its arguments."""
        key = json.dumps(self.arguments, sort_keys=True)
        return f"{self.sweep_dir.rstrip('/') or '/'}/{hashlib.md5(key.encode()).hexdigest()}"

    @property
    def state(self) -> str:
        """One of the three states."""
        where = pathlib.Path(self.folder)
        return DONE if (where / "done").exists() else INCOMPLETE if where.exists() else NOT_LAUNCHED

    @property
    def command(self) -> str:
        """The shell command."""
        words = ["python", "-m", "domainbed.scripts.train"]
        for key, value in sorted({**self.arguments, "output_dir": self.folder}.items()):
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        return shlex.join(words)

    def __str__(self) -> str:
        shown = tuple(self.arguments[key] for key in ("dataset", "algorithm", "test_envs", "hparams_seed"))
        return f"{self.state}: {self.folder} {shown}"


def test_environments(count: int, single: bool) -> list[list[int]]:
    """Return all single environments, and all pairs of them unless ``single``, in lexical order."""
    sizes = (1,) if single else (1, 2)
    return sorted(list(chosen) for size in sizes for chosen in itertools.combinations(range(count), size))


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """Return the jobs of a sweep in their printed order."""
    jobs = []
    for trial, dataset, algorithm in itertools.product(range(args.n_trials), args.datasets, args.algorithms):
        choices = test_environments(datasets.num_environments(dataset), args.single_test_envs)
        for test_envs, hparams_seed in itertools.product(choices, range(args.n_hparams_from, args.n_hparams)):
            job = {key: getattr(args, key) for key in ("data_dir", "holdout_fraction", "task")}
            job |= {"dataset": dataset, "algorithm": algorithm, "test_envs": test_envs}
            job |= {"hparams_seed": hparams_seed, "trial_seed": trial}
            job |= {key: getattr(args, key) for key in ("steps", "hparams") if getattr(args, key) is not None}
            job["seed"] = misc.seed_hash(dataset, algorithm, test_envs, hparams_seed, trial)
            jobs.append(Job(job, args.output_dir))
    return jobs


def confirmed(what: str, skip: bool) -> bool:
    """Return whether the user wants it."""
    print(what)
    if skip or input("Are you sure? (y/n) ").lower().strip()[:1] == "y":
        return True
    print("Nevermind!")
    return False


def launch(jobs: list[Job], launcher: str) -> None:
    """Make the folders and run the commands, in random order so that an early look sees some of everything."""
    print("Launching...", "Making job directories:", sep="\n")
    jobs = random.sample(jobs, len(jobs))
    for job in jobs:
        pathlib.Path(job.folder).mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    command_launchers.REGISTRY[launcher]([job.command for job in jobs])
    print(f"Launched {len(jobs)} jobs!")


def delete(jobs: list[Job]) -> None:
    """Remove the folders."""
    print("Deleting...")
    for job in jobs:
        shutil.rmtree(job.folder)
    print(f"Deleted {len(jobs)} jobs!")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Run a sweep (stand-in for DomainBed)")
    parser.add_argument("command", choices=["launch", "delete_incomplete"])
    for flag, known in (("--datasets", datasets.DATASETS), ("--algorithms", algorithms.ALGORITHMS)):
        parser.add_argument(flag, nargs="+", default=known)
    for flag in ("--output_dir", "--data_dir", "--command_launcher"):
        parser.add_argument(flag, required=True)
    for flag, number in {"n_hparams_from": 0, "n_hparams": 20, "n_trials": 3, "seed": 0, "steps": None}.items():
        parser.add_argument(f"--{flag}", type=int, default=number)
    parser.add_argument("--task", default="domain_generalization")
    parser.add_argument("--holdout_fraction", type=float, default=0.2)
    parser.add_argument("--hparams")
    for flag in ("--single_test_envs", "--skip_confirmation"):
        parser.add_argument(flag, action="store_true")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the jobs, ask, and do as the command says."""
    announce("sweep")
    args = make_parser().parse_args(argv)
    jobs = make_jobs(args)
    for job in jobs:
        print(job)
    count = Counter(job.state for job in jobs)
    states = ", ".join(f"{count[state]} {state.lower()}" for state in (DONE, INCOMPLETE, NOT_LAUNCHED))
    print(f"{len(jobs)} jobs: {states}.")
    wanted = [job for job in jobs if job.state == (NOT_LAUNCHED if args.command == "launch" else INCOMPLETE)]
    verb = "launch" if args.command == "launch" else "delete"
    if not confirmed(f"About to {verb} {len(wanted)} jobs.", args.skip_confirmation):
        return
    if verb == "launch":
        launch(wanted, args.command_launcher)
    else:
        delete(wanted)


if __name__ == "__main__":
    main()
