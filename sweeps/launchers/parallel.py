"""A launcher for DomainBed's registry that runs one job per GPU, per several GPUs, or per core, in parallel.

    python -m domainbed.scripts.sweep launch --command_launcher parallel …

Environment variables, all optional:
    DOMAINBED_REASONING_JOBS: number of parallel jobs (default: one per GPU, or one per core without GPUs).
    DOMAINBED_REASONING_GPUS_PER_JOB: GPUs of each job (default: 1), see `torchrun`.
    DOMAINBED_REASONING_TARGETS: target environments, such as ``"2"`` or ``"0 2"``; jobs with others are skipped. Their
        folders have no `done`, like those of failed jobs: ``sweep delete_incomplete`` removes them.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence

from domainbed_reasoning.mllm.devices import visible_gpus
from domainbed_reasoning.sweeps.launchers.bars import Bars
from domainbed_reasoning.sweeps.launchers.jobs import (
    JOBS,
    LOG,
    Failure,
    Job,
    chosen_jobs,
    report,
    report_interrupt,
    whole_number,
)
from domainbed_reasoning.sweeps.launchers.processes import end, ended_by_sigterm, start, threads_of
from domainbed_reasoning.sweeps.launchers.torchrun import GPUS, on_gpus
from domainbed_reasoning.terminal import printable_streams

_POLL_SECONDS = 0.2


@printable_streams()
def parallel_launcher(commands: Sequence[str]) -> list[Failure]:
    """Run the train commands of a sweep in parallel, and report failures.

    Ctrl-C and SIGTERM end the running jobs before the launcher.

    Args:
        commands: shell strings, as DomainBed passes them to every launcher.

    Returns:
        The failures; DomainBed ignores them, so they are also printed at the end.

    Raises:
        ValueError: an environment variable has an invalid value.
    """
    jobs = chosen_jobs(commands)
    slots = device_slots()
    gpus = whole_number(GPUS, default=1)
    jobs = [on_gpus(job, gpus) for job in jobs]
    if not jobs:
        return []
    print(f"{len(jobs)} jobs, {min(len(slots), len(jobs))} at a time; the output of each is in its {LOG}.")
    try:
        with ended_by_sigterm():
            failures = _run_all(jobs, slots)
    except (KeyboardInterrupt, SystemExit):
        report_interrupt()
        raise
    report(failures, len(jobs))
    return failures


def device_slots() -> list[dict[str, str]]:
    """Return the environment variables of each parallel slot: its GPUs, or its share of the cores.

    Raises:
        ValueError: a job is to have more GPUs than there are, or a variable is not a number.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = visible_gpus()
    each = whole_number(GPUS, default=1)
    if each > max(1, len(gpus)):
        raise ValueError(f"{GPUS} is {each}, and {len(gpus)} GPUs are visible here. Set it to at most that.")
    groups = [",".join(gpus[first : first + each]) for first in range(0, len(gpus) - each + 1, each)]
    count = whole_number(JOBS, default=len(groups) or cores)
    share = threads_of(cores // (count * each))
    return [share | ({"CUDA_VISIBLE_DEVICES": groups[slot % len(groups)]} if groups else {}) for slot in range(count)]


def _run_all(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]]) -> list[Failure]:
    waiting, free = list(jobs), list(slots)
    running: dict[subprocess.Popen[bytes], tuple[Job, Mapping[str, str]]] = {}
    failures = []
    try:
        with Bars(jobs) as bars:
            while waiting or running:
                while waiting and free:
                    job, slot = waiting.pop(0), free.pop(0)
                    running[start(job, {**os.environ, **slot, **bars.start(job, len(waiting))})] = (job, slot)
                time.sleep(_POLL_SECONDS)
                if bars.shown:
                    bars.refresh()
                for process in [process for process in running if process.poll() is not None]:
                    job, slot = running.pop(process)
                    free.append(slot)
                    failure = Failure(job, process.returncode) if process.returncode else None
                    failures += [failure] if failure else []
                    bars.end(job, failure)
    finally:
        end(running)
    return failures
