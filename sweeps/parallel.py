"""A launcher for DomainBed's registry: as many jobs at a time as there are cores, or GPUs.

    python -m domainbed.scripts.sweep launch --command_launcher parallel …

Environment variables, all optional:
    DOMAINBED_REASONING_JOBS: jobs at a time (default: one a GPU, or one a core without GPUs).
    DOMAINBED_REASONING_TARGETS: target environments, as in ``"2"`` or ``"0 2"``: jobs with others are left out. Their
        folders stay without `done`, as those of failed jobs do: ``sweep delete_incomplete`` removes them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tqdm import tqdm

JOBS = "DOMAINBED_REASONING_JOBS"
TARGETS = "DOMAINBED_REASONING_TARGETS"
LOG = "launcher.log"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10
_LOG_LINES = 15


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
    def log(self) -> Path:
        """Where its output goes: a file in the job's own folder."""
        return Path(*self.options.get("output_dir", (".",))) / LOG


@dataclass(frozen=True)
class Failure:
    """A job that ended with an exit code other than 0 (negative: the signal that ended it)."""

    job: Job
    exit_code: int


def parallel_launcher(commands: Sequence[str]) -> list[Failure]:
    """Run the train commands of a sweep, several at a time, and say which failed.

    Ctrl-C and SIGTERM end the running jobs before they end the launcher.

    Args:
        commands: shell strings, as DomainBed hands them to every launcher.

    Returns:
        The failures; DomainBed ignores them, so they are printed as well, after everything else.

    Raises:
        ValueError: an environment variable that does not say what it should.
    """
    jobs = chosen_jobs(commands)
    slots = device_slots()
    print(f"{len(jobs)} jobs, {min(len(slots), max(len(jobs), 1))} at a time; the output of each is in its {LOG}.")
    with ended_by_sigterm():
        failures = _run_all(jobs, slots)
    report(failures, len(jobs))
    return failures


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
    return jobs


def within_targets(jobs: Sequence[Job], targets: str) -> list[Job]:
    """Return the jobs whose target environments are all among ``targets``; all jobs where that is empty."""
    wanted = set(targets.replace(",", " ").split())
    if not all(target.isdigit() for target in wanted):
        raise ValueError(f'{TARGETS}={targets!r} should be numbers of environments, as in "2" or "0 2".')
    return [job for job in jobs if not wanted or set(job.options.get("test_envs", ())) <= wanted]


def device_slots() -> list[dict[str, str]]:
    """Return the environment variables of each job that may run at a time: its GPU, or its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _visible_gpus()
    count = whole_number(JOBS, default=len(gpus) or cores)
    threads = str(max(1, cores // count))
    share = {name: threads for name in _THREADS if name not in os.environ}
    return [share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}) for slot in range(count)]


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


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _run_all(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]]) -> list[Failure]:
    waiting, free = list(jobs), list(slots)
    running: dict[subprocess.Popen[bytes], tuple[Job, Mapping[str, str]]] = {}
    failures = []
    try:
        with tqdm(total=len(jobs), unit="job", dynamic_ncols=True, file=sys.stderr) as bar:
            while waiting or running:
                while waiting and free:
                    job, slot = waiting.pop(0), free.pop(0)
                    running[_start(job, slot)] = (job, slot)
                    bar.set_postfix_str(_what_runs(running.values(), len(waiting)))
                time.sleep(_POLL_SECONDS)
                if sys.stderr.isatty():
                    bar.refresh()  # the clock goes on while jobs run
                for process in [process for process in running if process.poll() is not None]:
                    job, slot = running.pop(process)
                    free.append(slot)
                    if process.returncode:
                        failures.append(Failure(job, process.returncode))
                        bar.write(f"FAILED: {job.name} (exit code {process.returncode})", file=sys.stderr)
                    bar.update()
                    bar.set_postfix_str(_what_runs(running.values(), len(waiting)))
    finally:
        _end(running)
    return failures


def _what_runs(running: Iterable[tuple[Job, object]], waiting: int) -> str:
    names = "; ".join(job.name for job, _ in running) or "nothing"
    return f"running: {names}; waiting: {waiting}"


def _start(job: Job, slot: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a job in a process group of its own, with `python` meaning this interpreter."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            f'python() {{ exec {shlex.quote(sys.executable)} "$@"; }}; {job.command}',
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot},
            start_new_session=True,
        )


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes and their children: SIGTERM, and SIGKILL for what is still there after a while."""
    left = list(processes)
    for process in left:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in left:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass  # it has just ended by itself


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit inside, so that the running jobs are ended before this process is."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report(failures: Sequence[Failure], total: int) -> None:
    """Print which jobs failed, each with the end of its log, and a summary."""
    for failure in failures:
        lines = failure.job.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        print(f"\nFAILED: {failure.job.name} (exit code {failure.exit_code}). The end of {failure.job.log}:")
        print("\n".join(f"    {line}" for line in lines))
    if failures:
        print(f"\n{len(failures)} of {total} jobs FAILED:")
        for failure in failures:
            print(f"    {failure.job.name}: {failure.job.log}")
        print("Their folders have no `done`; `sweep delete_incomplete` removes them, `sweep launch` starts them again.")
    else:
        print(f"All {total} jobs ended well.")
