"""A sweep's jobs from a launcher's view: stock train commands, their folders and failures."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_reasoning import interrupt
from domainbed_reasoning.terminal import printable

TARGETS = "DOMAINBED_REASONING_TARGETS"
JOBS = "DOMAINBED_REASONING_JOBS"
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
        """A readable name: algorithm, dataset, targets."""
        first = {key: " ".join(values) for key, values in self.options.items()}
        name = f"{first.get('algorithm', '?')} on {first.get('dataset', '?')}, target {first.get('test_envs', '?')}"
        seeds = (first.get("hparams_seed", "0"), first.get("trial_seed", "0"))
        return name if seeds == ("0", "0") else f"{name}, hparams seed {seeds[0]}, trial {seeds[1]}"

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(*self.options.get("output_dir", (".",)))

    @property
    def is_done(self) -> bool:
        """Whether the job has completed."""
        return (self.folder / "done").exists()

    @property
    def log(self) -> Path:
        """The file in the output folder that standard output and error go to."""
        return self.folder / LOG


@dataclass(frozen=True)
class Failure:
    """A failed job.

    Attributes:
        job: that failed.
        exit_code: nonzero; negative for a signal; None if unknown.
        reason: used in place of the exit code, e.g. "canceled".
    """

    job: Job
    exit_code: int | None
    reason: str = ""

    @property
    def cause(self) -> str:
        """The reason, or the exit code if there is none."""
        return self.reason or f"exit code {self.exit_code}"


def parse_job(command: str) -> Job:
    """Parse ``python -m domainbed.scripts.train --name value … --name value …``."""
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
    """Return the jobs of a sweep, filtered by `DOMAINBED_REASONING_TARGETS`, and print how many are left out.

    Raises:
        ValueError: the variable does not list environments.
    """
    jobs = within_targets([parse_job(command) for command in commands], os.environ.get(TARGETS, ""))
    if len(jobs) < len(commands):
        print(f"{TARGETS}={os.environ[TARGETS]}: {len(jobs)} of {len(commands)} jobs selected.")
    elif not jobs:
        print("No jobs to start. To retry failed ones, run `sweep delete_incomplete`, but not while jobs are running")
        print("or queued, on Slurm (`squeue --me`) or elsewhere: it removes their folders too.")
    return jobs


def within_targets(jobs: Sequence[Job], targets: str) -> list[Job]:
    """Return the jobs whose target environments are all in ``targets``; all jobs if that is empty."""
    chosen = set(targets.replace(",", " ").split())
    if not all(target.isdigit() for target in chosen):
        raise ValueError(f'{TARGETS} must list environments by number, e.g. "2" or "0 2"; got {targets!r}.')
    return [job for job in jobs if not chosen or set(job.options.get("test_envs", ())) <= chosen]


def whole_number(variable: str, default: int, least: int = 1) -> int:
    """Return the integer value of an environment variable, ``default`` if it is not set.

    Raises:
        ValueError: it is not an integer, or less than ``least``.
    """
    chosen = os.environ.get(variable, "")
    if not chosen:
        return default
    if not (chosen.isdigit() and int(chosen) >= least):
        raise ValueError(f"{variable} must be an integer >= {least}; got {chosen!r}.")
    return int(chosen)


def report(failures: Sequence[Failure], total: int) -> None:
    """Print the failed jobs, each with its cause and the end of its log, and a summary."""
    for failure in failures:
        print(f"\nFAILED: {failure.job.name} ({failure.cause}). The end of {failure.job.log}:")
        print("\n".join(f"    {line}" for line in end_of(failure.job.log)))
    if failures:
        print(f"\n{len(failures)} of {total} jobs FAILED:")
        for failure in failures:
            print(f"    {failure.job.name}: {failure.job.log}")
        print("To retry them, run `sweep delete_incomplete`, then `sweep launch`.")
    else:
        print(f"{total}/{total} jobs succeeded.")


def report_interrupt() -> None:
    """Print how to resume after Ctrl-C or SIGTERM."""
    print(
        "\nRunning and waiting jobs were stopped. To resume, run `sweep delete_incomplete`, then `sweep launch`.",
        flush=True,
    )
    interrupt.end_with("Interrupted.")


def end_of(log: Path) -> list[str]:
    """Return the last lines of a log, or a note that it does not exist."""
    if not log.exists():
        return ["(no log: the job did not start)"]
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
        text = file.read(_LOG_BYTES).decode(errors="replace")
    return [printable(line) for line in text.splitlines()[-_LOG_LINES:]]
