"""The jobs of a sweep as launchers see them: stock train commands, their folders, and which of them failed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_reasoning import interrupt
from domainbed_reasoning.terminal import printable

TARGETS = "DOMAINBED_REASONING_TARGETS"
LOG = "launcher.log"
_LOG_LINES, _LOG_BYTES = 15, 1 << 16


@dataclass(frozen=True)
class Job:
    """One stock train command.

    Attributes:
        command: as DomainBed's sweep wrote it, for a shell.
        options: its ``--name value …`` pairs.
    """

    command: str
    options: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """What a person calls it: algorithm, dataset, targets."""
        first = {key: " ".join(values) for key, values in self.options.items()}
        name = f"{first.get('algorithm', '?')} on {first.get('dataset', '?')}, target {first.get('test_envs', '?')}"
        seeds = (first.get("hparams_seed", "0"), first.get("trial_seed", "0"))
        return name if seeds == ("0", "0") else f"{name}, hparams seed {seeds[0]}, trial {seeds[1]}"

    @property
    def folder(self) -> Path:
        """The folder that it writes to."""
        return Path(*self.options.get("output_dir", (".",)))

    @property
    def is_done(self) -> bool:
        """Whether it has ended well."""
        return (self.folder / "done").exists()

    @property
    def log(self) -> Path:
        """Where its output goes: a file in the job's own folder."""
        return self.folder / LOG


@dataclass(frozen=True)
class Failure:
    """A job that did not end well.

    Attributes:
        job: it.
        exit_code: other than 0 (negative: the signal that ended it); None where it is not known.
        reason: what is known instead, as in "cancelled".
    """

    job: Job
    exit_code: int | None
    reason: str = ""

    @property
    def cause(self) -> str:
        """The reason, or else the exit code, in words."""
        return self.reason or f"exit code {self.exit_code}"


def parse_job(command: str) -> Job:
    """Return the options of ``python -m domainbed.scripts.train --name value … --name value …``."""
    options: dict[str, tuple[str, ...]] = {}
    name = None
    for word in shlex.split(command):
        if word.startswith("--"):
            name = word[2:]
            options[name] = ()
        elif name is not None:
            options[name] += (word,)
    return Job(command, options)


def chosen_jobs(commands: Sequence[str]) -> list[Job]:
    """Return the jobs of a sweep, without those whose targets were not asked for, and say if some are left out.

    Raises:
        ValueError: for a variable of targets that does not name environments.
    """
    jobs = within_targets([parse_job(command) for command in commands], os.environ.get(TARGETS, ""))
    if len(jobs) < len(commands):
        print(f"{TARGETS}={os.environ[TARGETS]}: {len(jobs)} of {len(commands)} jobs are run.")
    elif not jobs:
        print("No job is to be started. `sweep delete_incomplete` removes the folders of those that died, and of those")
        print("that still run or wait, with Slurm or anywhere else: leave it while there are such (`squeue --me`).")
    return jobs


def within_targets(jobs: Sequence[Job], targets: str) -> list[Job]:
    """Return the jobs whose target environments are all among ``targets``; all jobs where that is empty."""
    wanted = set(targets.replace(",", " ").split())
    if not all(target.isdigit() for target in wanted):
        raise ValueError(f'{TARGETS}={targets!r} should be numbers of environments, as in "2" or "0 2".')
    return [job for job in jobs if not wanted or set(job.options.get("test_envs", ())) <= wanted]


def whole_number(variable: str, default: int, least: int = 1) -> int:
    """Return the environment variable's whole number, ``default`` where it is not set.

    Raises:
        ValueError: for something else, or less than ``least``.
    """
    chosen = os.environ.get(variable, "")
    if not chosen:
        return default
    if not (chosen.isdigit() and int(chosen) >= least):
        raise ValueError(f"{variable}={chosen!r} should be a whole number, {least} or more.")
    return int(chosen)


def report(failures: Sequence[Failure], total: int) -> None:
    """Print which jobs failed, each with its cause and the end of its log, and a summary."""
    for failure in failures:
        print(f"\nFAILED: {failure.job.name} ({failure.cause}). The end of {failure.job.log}:")
        print("\n".join(f"    {line}" for line in end_of(failure.job.log)))
    if failures:
        print(f"\n{len(failures)} of {total} jobs FAILED:")
        for failure in failures:
            print(f"    {failure.job.name}: {failure.job.log}")
        print("Their folders have no `done`; `sweep delete_incomplete` removes them, `sweep launch` starts them again.")
    else:
        print(f"All {total} jobs ended well.")


def say_ended() -> None:
    """Print what Ctrl-C or SIGTERM has left, and how to go on."""
    print("\nThe jobs that ran or waited were ended. `sweep delete_incomplete` removes their folders,")
    print("`sweep launch` starts them again.", flush=True)
    interrupt.end_with("Interrupted.")


def end_of(log: Path) -> list[str]:
    """Return the last lines of a log, or one that says that it is not there."""
    if not log.exists():
        return ["(there is no log: the job did not start)"]
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        text = file.read(_LOG_BYTES).decode(errors="replace")
    return [printable(line) for line in text.splitlines()[-_LOG_LINES:]]
