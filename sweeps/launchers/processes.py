"""Train commands as processes, each in its own process group, and their share of cores and GPUs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from domainbed_reasoning.sweeps.launchers.jobs import Job

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRACE_SECONDS = 10


def start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a job in its own process group, with `python` being this interpreter and its output going to its log.

    Args:
        job: to start.
        environment: of the process.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            f'python() {{ exec {shlex.quote(sys.executable)} "$@"; }}; {job.command}',
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )


def end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes and their children: SIGTERM, then SIGKILL after 10 seconds.

    May be called from a signal handler that interrupted a wait for one of them.
    """
    left = list(processes)
    for process in left:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in left:
        while not _has_ended(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        _signal_group(process, signal.SIGKILL)
        while not _has_ended(process):
            time.sleep(0.05)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass  # it has already ended


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process has ended, without the lock of `Popen.wait`, which the interrupted code may hold."""
    try:
        look_only = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return process.poll() is not None or os.waitid(os.P_PID, process.pid, look_only) is not None
    except ChildProcessError:  # already reaped
        return True


def threads_of(cores: float) -> dict[str, str]:
    """Return the variables that limit a job to its share of the cores, without those that the user has set."""
    return {name: str(max(1, int(cores))) for name in THREADS if name not in os.environ}


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM, and SIGHUP of a closed terminal, raise SystemExit: running jobs are ended before this process.

    A SIGHUP that is ignored, as under ``nohup``, remains so.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers can only be set there
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
