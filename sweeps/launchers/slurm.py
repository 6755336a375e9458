"""A launcher for DomainBed's registry: jobs on Slurm, as job arrays, through submitit.

    pip install 'domainbed-reasoning[slurm]'
    export DOMAINBED_REASONING_SLURM="--partition=gpu --gres=gpu:1 --cpus-per-task=8 --mem=64G --time=1-00:00:00"
    python -m domainbed.scripts.sweep launch --command_launcher slurm …

The launcher waits for the jobs and shows how many are pending, running and completed. Ctrl-C only ends the waiting: the
jobs keep running, and it prints how to follow them. The output of each job is in its own folder, Slurm's logs are in
``slurm/`` in the sweep's folder.

A job that is preempted, loses its node or is requeued manually is restarted by Slurm; one that fails is restarted in
its allocation; one that times out is requeued, as training resumes. See `attempts` for how duplicate records are
avoided.

An attempt that ended on Slurm's SIGTERM has not failed: the job stops training and waits for Slurm's next action,
however long the partition's GraceTime. If there is none, because a user sent the signal (`scancel --signal=TERM`), it
waits until its time limit; `scontrol requeue` restarts it at once. Its log says so.

Environment variables, all optional:
    DOMAINBED_REASONING_SLURM: long options of sbatch, as the cluster requires (default of ``--time``: one day).
    SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, …: sbatch's own, which override those options.
    DOMAINBED_REASONING_GPUS_PER_JOB: GPUs per node that a job uses by `torchrun` (default: 1); request as many in
        DOMAINBED_REASONING_SLURM, e.g. ``--gres=gpu:4``, and several nodes by ``--nodes=2``.
    DOMAINBED_REASONING_JOBS: parallel jobs of each array (default: as many as Slurm starts).
    DOMAINBED_REASONING_RETRIES: how often a job that fails or times out is restarted (default: 1).
    DOMAINBED_REASONING_SLURM_WAIT: 0 submits and returns at once (default: 1).
    DOMAINBED_REASONING_TARGETS: target environments, as for the launcher `parallel`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from domainbed_reasoning.sweeps.launchers.attempts import DEFAULT_RETRIES, RETRIES, Attempt
from domainbed_reasoning.sweeps.launchers.jobs import JOBS, Failure, Job, chosen_jobs, parse_job, report, whole_number
from domainbed_reasoning.sweeps.launchers.processes import threads_of
from domainbed_reasoning.sweeps.launchers.slurm_queue import (
    folder_of,
    how_to_follow,
    note_submitted,
    slurm_setting,
    wait_for,
)
from domainbed_reasoning.sweeps.launchers.torchrun import GPUS, gpus_of, on_gpus
from domainbed_reasoning.terminal import printable_streams

OPTIONS = "DOMAINBED_REASONING_SLURM"
TIME_LIMIT = "SBATCH_TIMELIMIT"
_CLUSTERS = "SBATCH_CLUSTERS"
WAIT = "DOMAINBED_REASONING_SLURM_WAIT"
_ONE_DAY = 24 * 60
_UNLIMITED = 365 * _ONE_DAY  # submitit counts minutes
_ARRAY = 1000  # jobs per array if Slurm reports no limit; its default is 1001
_POLL_SECONDS = 5.0
_OURS = ("array", "output", "error", "open-mode", "signal", "wrap", "requeue", "no-requeue", "clusters")
_LEAVE = "Do not run `sweep delete_incomplete` while they are queued or running: it removes their folders."
_SIGNAL_SECONDS = 2  # within which SIGTERM reaches all processes of a job, the train process and this one


class SlurmJob:
    """One job of the sweep, with its attempts, as run by Slurm. Pickled by submitit.

    Args:
        command: as written by DomainBed's sweep.
        retries: how often it is restarted if it fails.
    """

    def __init__(self, command: str, retries: int):
        self.command = command
        self.retries = retries
        self._attempt: Attempt | None = None
        self._terminated = False

    def __call__(self) -> None:
        """Run the job.

        Raises:
            RuntimeError: its last attempt failed; Slurm then also counts it as failed.
        """
        signal.signal(signal.SIGTERM, self._note_sigterm)
        job = parse_job(self.command)
        variables = ("ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_ID", "RESTART_COUNT")
        array, index, alone, restarts = (os.environ.get(f"SLURM_{name}", "") for name in variables)
        where = f"Slurm job {f'{array}_{index}' if array else alone}, requeued {restarts or 0} times"
        environment = os.environ | threads_of(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")) / gpus_of(job))
        for number in range(1, self.retries + 2):
            self._attempt = Attempt(job, f"attempt {number} of {self.retries + 1}, {where}", environment)
            exit_code = self._attempt.run()
            if exit_code == 0:
                return
            if self._attempt.replaced:
                raise RuntimeError("Slurm has started the job again on another node")
            time.sleep(_SIGNAL_SECONDS)
            if self._terminated:
                self._wait_for_slurm()
        raise RuntimeError(f"exit code {exit_code}")

    def _wait_for_slurm(self) -> NoReturn:
        """Wait until Slurm requeues the job or ends it, by SIGKILL or by SIGUSR2 to submitit."""
        assert self._attempt is not None
        self._attempt.write_log(
            "--- stopped by SIGTERM; waiting until Slurm ends or requeues the job, or `scontrol requeue`"
        )
        while True:
            time.sleep(_POLL_SECONDS)

    def _note_sigterm(self, *_: object) -> None:
        self._terminated = True

    def checkpoint(self) -> Any:
        """End the train process before the job is preempted or times out, and return the job to requeue."""
        if self._attempt is not None:
            self._attempt.end()
        return importlib.import_module("submitit").helpers.DelayedSubmission(SlurmJob(self.command, self.retries))


@printable_streams()
def slurm_launcher(commands: Sequence[str]) -> list[Failure]:
    """Submit the train commands of a sweep to Slurm, wait for them unless disabled, and report failures.

    Args:
        commands: shell strings, as DomainBed passes them to every launcher.

    Returns:
        The failures; DomainBed ignores them, so they are also printed at the end.

    Raises:
        ImportError: submitit is not installed.
        FileNotFoundError: Slurm's commands are not installed.
        ValueError: an environment variable has an invalid value, or Slurm rejected all jobs.
    """
    jobs = chosen_jobs(commands)
    if os.environ.get(_CLUSTERS):
        raise ValueError(
            f"{_CLUSTERS} ({os.environ[_CLUSTERS]}) is not supported: jobs are queried on the local cluster. Unset it."
        )
    retries = whole_number(RETRIES, DEFAULT_RETRIES, least=0)
    waits = whole_number(WAIT, 1, least=0)
    parameters = sbatch_parameters(os.environ.get(OPTIONS, ""), os.environ.get(TIME_LIMIT, ""))
    parameters["array_parallelism"] = whole_number(JOBS, _ARRAY)
    gpus, nodes = whole_number(GPUS, 1), parameters.get("nodes", 1)
    jobs = [on_gpus(job, gpus, nodes) for job in jobs]
    if not jobs:
        return []
    folder = folder_of(jobs[0].folder.absolute().parent)
    submitted, refused = _submit(jobs, retries, parameters, folder)
    how = how_to_follow(submitted)
    print(f"{len(submitted)} jobs submitted to Slurm.\n{how}", flush=True)
    if refused:
        print(f"{len(refused)} jobs were NOT submitted. {refused[0].cause}", flush=True)
    if not waits:
        print(_LEAVE)
        return refused
    try:
        failures = wait_for(submitted)
    except KeyboardInterrupt:
        print(f"\nThe jobs keep running. To follow them:\n{how}")
        print(_LEAVE)
        return refused
    report([*failures, *refused], len(jobs))
    return [*failures, *refused]


def sbatch_parameters(options: str, time_limit: str = "") -> dict[str, Any]:
    """Return submitit's parameters for options of sbatch.

    submitit needs the time limit to distinguish jobs that time out, which are requeued RETRIES times, from preempted
    ones.

    Args:
        options: such as ``--partition=gpu --time 12:00:00 --exclusive``.
        time_limit: SBATCH_TIMELIMIT, which overrides the script's ``--time``.

    Raises:
        ValueError: an option is not a long option of sbatch or is set by the launcher, or the time limit is invalid.
    """
    chosen: dict[str, Any] = {}
    name = ""
    for word in shlex.split(options):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            chosen[name] = value if equals else True
        elif name and chosen[name] is True:
            chosen[name] = word
        else:
            raise ValueError(f"{OPTIONS}: {word!r} is not a long option of sbatch. Use --partition=gpu, not -p gpu.")
        if name in _OURS:
            raise ValueError(f"{OPTIONS}: --{name} is set by this launcher. Remove it.")
    minutes = _minutes(str(chosen.pop("time")), f"{OPTIONS}: --time") if "time" in chosen else _ONE_DAY
    minutes = _minutes(time_limit, TIME_LIMIT) if time_limit else minutes
    parameters: dict[str, Any] = {"time": minutes, "job_name": chosen.pop("job-name", "domainbed")}
    if "cpus-per-task" in chosen:  # since Slurm 22.05, srun does not inherit it from sbatch
        parameters["srun_args"] = [f"--cpus-per-task={chosen['cpus-per-task']}"]
    if (nodes := str(chosen.pop("nodes", 1))) != "1":
        if not (nodes.isdigit() and int(nodes)):
            raise ValueError(f"{OPTIONS}: --nodes must be a number of nodes; got {nodes}.")
        parameters["nodes"] = int(nodes)
        # The attempt runs on the first node, from which `torchrun` is started on all.
        parameters["srun_args"] = [*parameters.get("srun_args", ()), "--nodes=1", "--ntasks=1"]
    return parameters | {"stderr_to_stdout": True, "additional_parameters": chosen | {"requeue": True}}


def _minutes(time_limit: str, name: str) -> int:
    """Return the minutes of sbatch's ``--time``: minutes, m:s, h:m:s, days-h, days-h:m or days-h:m:s; or no limit."""
    if time_limit.upper() in ("0", "UNLIMITED", "INFINITE"):
        return _UNLIMITED
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if match is None:
        raise ValueError(f"{name} must be a time limit of sbatch, e.g. 90, 12:00:00 or 1-12:00:00; got {time_limit}.")
    days, *rest = match.groups()
    a, b, c = (int(part or 0) for part in rest)
    if days is None and rest[2] is None:  # minutes, or minutes:seconds
        a, b, c = 0, a, b
    return max(1, (int(days or 0) * 24 + a) * 60 + b + (c > 0))


def _submit(
    jobs: Sequence[Job], retries: int, parameters: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Job], list[Failure]]:
    """Submit job arrays and return the jobs by Slurm's ids, such as ``12_0``, and the rejected ones.

    Raises:
        ValueError: all were rejected.
    """
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise FileNotFoundError(
                f"`{program}` was not found. Launch this sweep where Slurm's commands are available."
            )
    try:
        submitit = importlib.import_module("submitit")
    except ImportError as error:
        raise ImportError(
            "The launcher `slurm` requires submitit, which is not installed. Run pip install "
            "'domainbed-reasoning[slurm]'."
        ) from error
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=retries)
    executor.update_parameters(**parameters)
    submitted: dict[str, Job] = {}
    size = _array_size()
    for first in range(0, len(jobs), size):
        part = jobs[first : first + size]
        try:
            with _without_ctrl_c():
                with executor.batch():
                    handles = [executor.submit(SlurmJob(job.command, retries)) for job in part]
                taken = {handle.job_id: job for handle, job in zip(handles, part, strict=True)}
                submitted |= taken
                _note(taken, folder)
        except submitit.core.utils.FailedJobError as error:
            if submitted:
                return submitted, [Failure(job, None, f"rejected by sbatch: {error}") for job in jobs[first:]]
            raise ValueError(
                f"sbatch rejected the jobs. {error}\nIts options come from {OPTIONS} "
                f"({os.environ.get(OPTIONS, '')!r}). Before relaunching, run `sweep delete_incomplete` to remove the "
                "jobs' folders; it also removes those of jobs that are queued or running."
            ) from error
        except KeyboardInterrupt:
            if submitted:
                print(f"\n{len(submitted)} of {len(jobs)} jobs submitted:\n{how_to_follow(submitted)}")
            raise
    return submitted, []


def _note(submitted: Mapping[str, Job], folder: Path) -> None:
    try:
        note_submitted(submitted, folder)
    except OSError as error:
        print(f"Jobs were submitted to Slurm, but could not be recorded ({error}):\n{how_to_follow(submitted)}")
        raise


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Delay Ctrl-C, also for sbatch, until the submitted jobs are known."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by child processes
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if pressed:
        raise KeyboardInterrupt


def _array_size() -> int:
    """Return the maximum number of jobs of an array: its indices must be below MaxArraySize."""
    size = slurm_setting("MaxArraySize")
    return max(1, int(size)) if size.isdigit() else _ARRAY
