"""A launcher for DomainBed's registry: jobs on Ray, on this machine or on a cluster.

    pip install 'domainbed-reasoning[ray]'
    python -m domainbed.scripts.sweep launch --command_launcher ray …                              this machine
    RAY_ADDRESS=head:6379 python -m domainbed.scripts.sweep launch --command_launcher ray …        an existing cluster

Ray queues the jobs and assigns each a GPU or a fraction of one, or a share of the cores. An existing cluster keeps
running; a Ray that was started on this machine ends with the launcher. Every node of a cluster must have the sweep's
folders, the data and this interpreter at the same paths, as DomainBed requires; jobs get the environment and the
working directory of the sweep.

A job that fails, is killed or loses its worker or node is restarted, on another node if necessary; see `attempts` for
how duplicate records are avoided. Ctrl-C, SIGTERM and the death of the launcher end all jobs.

Environment variables, all optional:
    RAY_ADDRESS: the cluster, as for Ray itself.
    DOMAINBED_REASONING_GPUS_PER_JOB: such as ``1`` or ``0.5`` (default: 1 if the cluster has GPUs, else 0).
    DOMAINBED_REASONING_CPUS_PER_JOB: (default: the cores per GPU of the node with the fewest; 1 for jobs without a
        GPU).
    DOMAINBED_REASONING_RETRIES: how often a failed job is restarted (default: 1).
    DOMAINBED_REASONING_TARGETS: target environments, as for the launcher `parallel`.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from domainbed_reasoning.jobs.results_file import join_earlier
from domainbed_reasoning.sweeps.launchers.attempts import DEFAULT_RETRIES, RETRIES
from domainbed_reasoning.sweeps.launchers.jobs import (
    LOG,
    Failure,
    Job,
    chosen_jobs,
    report,
    report_interrupt,
    whole_number,
)
from domainbed_reasoning.sweeps.launchers.processes import ended_by_sigterm, threads_of, visible_gpus
from domainbed_reasoning.terminal import printable_streams

GPUS = "DOMAINBED_REASONING_GPUS_PER_JOB"
CPUS = "DOMAINBED_REASONING_CPUS_PER_JOB"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 15
_CONNECT_SECONDS = 10
# Ray uses gRPC, in which both sides begin with HTTP/2's preface and settings frames.
_SETTINGS = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
# A Ray worker whose launcher has died kills its children before it ends. The attempt is therefore a grandchild with the
# worker's pipe as its standard input: it detects the end of the worker and ends the train process.
_GRANDCHILD = ("sh", "-c", 'exec 3<&0; "$@" <&3 & wait $!', "sh")


@dataclass(frozen=True)
class Share:
    """The resources of one job.

    Attributes:
        cpus: cores.
        gpus: GPUs.
    """

    cpus: float
    gpus: float

    def fits(self, resources: Mapping[str, float]) -> int:
        """Return the number of parallel jobs on a node with Ray's ``resources``."""
        room = [resources.get(name, 0.0) / part for name, part in (("CPU", self.cpus), ("GPU", self.gpus)) if part]
        return int(min(room) + 1e-6)

    def __str__(self) -> str:
        """Describe it."""
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


@printable_streams()
def ray_launcher(commands: Sequence[str]) -> list[Failure]:
    """Run the train commands of a sweep on Ray, and report failures.

    Args:
        commands: shell strings, as DomainBed passes them to every launcher.

    Returns:
        The failures; DomainBed ignores them, so they are also printed at the end.

    Raises:
        ImportError: Ray is not installed.
        ValueError: an environment variable has an invalid value, or requests more than the machine has.
        ConnectionError: there is no Ray at RAY_ADDRESS.
    """
    jobs = chosen_jobs(commands)
    if not jobs:
        return []
    retries = whole_number(RETRIES, DEFAULT_RETRIES, least=0)
    ray = _start_or_join()
    joined = bool(_address())
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_of(nodes)
        at_a_time = sum(share.fits(node) for node in nodes)
        where = f"{len(nodes)} node(s) of the cluster at {os.environ['RAY_ADDRESS']}" if joined else "this machine"
        if not at_a_time:
            lacking = f"no node has {share}; set {GPUS} and {CPUS} to request less"
            if not joined:
                raise ValueError(f"No job could start: {lacking}.")
            print(f"Waiting for a node to join: {lacking}.")
        print(f"{len(jobs)} jobs on {where}, {at_a_time} at a time, {share} each; the output of each is in its {LOG}.")
        with ended_by_sigterm():
            failures = _run_all(ray, jobs, share, retries)
    except (KeyboardInterrupt, SystemExit):
        report_interrupt()
        raise
    finally:
        ray.shutdown()
    report(failures, len(jobs))
    return failures


def _start_or_join() -> Any:
    """Start Ray on this machine, or join the one at RAY_ADDRESS; return its module."""
    # No usage statistics, and no warning about the behavior of later versions.
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(name, "0")
    address = _address()
    if address:
        _check_that_it_answers(address)
        # If there is a token, the cluster requires it; clients must enable it before Ray is imported.
        if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            "The launcher `ray` requires Ray, which is not installed. Run pip install 'domainbed-reasoning[ray]'."
        ) from error
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            ray.init(address=address, **quiet)
        else:
            # By default, Ray counts every name in CUDA_VISIBLE_DEVICES as a GPU, even "-1".
            ray.init(address="local", include_dashboard=False, num_gpus=len(visible_gpus()), **quiet)
    return ray


def _address() -> str:
    """Return the address of the cluster; empty for a Ray on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


def _check_that_it_answers(address: str) -> None:
    """Check that a Ray server answers; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto" or ("://" in address and not address.startswith("ray://")):
        return
    if not (host and colon and port.isdigit()):
        raise ValueError(f"RAY_ADDRESS must be the host:port of `ray start --head`, e.g. head:6379; got {address}.")
    hint = "Unset it to start Ray on this machine."
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS) as connection:
            if not os.environ.get("RAY_USE_TLS"):
                connection.sendall(_HELLO)
                answer = connection.recv(9)
                if answer[3:4] != _SETTINGS:
                    raise ConnectionError("not a Ray server; the default port of `ray start` is 6379")
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"No Ray answers at RAY_ADDRESS={address} ({error}). {hint}") from error


def share_of(nodes: Sequence[Mapping[str, float]]) -> Share:
    """Return the resources of a job, from the environment or from the nodes' resources.

    By default, a job with GPUs gets as many cores as allow using all GPUs of every node that has enough GPUs for it;
    nodes without GPUs, and a head node without cores, are ignored.

    Raises:
        ValueError: a variable is not a valid number.
    """
    gpus_a_job = _number(GPUS, 1.0 if any(node.get("GPU") for node in nodes) else 0.0)
    holding = [node for node in nodes if node.get("GPU", 0.0) >= gpus_a_job > 0 and node.get("CPU", 0.0) >= 1]
    cores = (float(node["CPU"] * gpus_a_job // node["GPU"]) for node in holding)
    cpus_a_job = _number(CPUS, max(1.0, min(cores, default=1.0)))
    if gpus_a_job > 1 and gpus_a_job % 1:
        raise ValueError(f"{GPUS} must be a fraction of one GPU or a whole number; got {gpus_a_job:g}.")
    if not (cpus_a_job or gpus_a_job):
        raise ValueError(f"{GPUS} and {CPUS} cannot both be 0.")
    return Share(cpus_a_job, gpus_a_job)


def _number(variable: str, default: float) -> float:
    chosen = os.environ.get(variable, "")
    try:
        number = float(chosen or default)
    except ValueError:
        number = -1
    if not 0 <= number < float("inf"):
        raise ValueError(f"{variable} must be a number, e.g. 1 or 0.5; got {chosen!r}.")
    return number


def _run_all(ray: Any, jobs: Sequence[Job], share: Share, retries: int) -> list[Failure]:
    attempt = _remote_attempt(ray, share)
    environment = _environment(share)
    failures: list[Failure] = []
    running: dict[Any, tuple[Job, int]] = {}
    shown = ""

    def submit(job: Job, number: int) -> None:
        name = f"attempt {number} of {retries + 1}"
        module = [*_GRANDCHILD, sys.executable, "-m", "domainbed_reasoning.sweeps.launchers.attempts"]
        reference = attempt.remote([*module, "--name", name, "--command", job.command], os.getcwd(), environment)
        running[reference] = (job, number)

    try:
        for job in jobs:
            submit(job, 1)
        with tqdm(total=len(jobs), unit="job", dynamic_ncols=True, file=sys.stderr, disable=None) as bar:
            while running:
                ended, _ = ray.wait(list(running), num_returns=1, timeout=_POLL_SECONDS)
                for reference in ended:
                    job, number = running.pop(reference)
                    failure = _failure(ray, job, reference)
                    if failure and number <= retries:
                        bar.write(
                            f"RETRYING: {job.name} ({failure.cause}), attempt {number + 1} of {retries + 1}",
                            file=sys.stderr,
                        )
                        submit(job, number + 1)
                        continue
                    if failure:
                        failures.append(failure)
                        bar.write(f"FAILED: {job.name} ({failure.cause})", file=sys.stderr)
                        try:
                            join_earlier(job.folder)
                        except OSError as error:
                            bar.write(f"Its earlier records could not be joined: {error}", file=sys.stderr)
                    bar.update()
                what_runs = _what_runs([job for job, _ in running.values()], failures)
                if what_runs != shown or sys.stderr.isatty():  # in a file, one line per change
                    bar.set_postfix_str(what_runs)
                shown = what_runs
    finally:
        _cancel(ray, list(running))
    return failures


def _remote_attempt(ray: Any, share: Share) -> Any:
    """Return the Ray function that runs one attempt on a worker; it only uses the standard library.

    The worker has the write end of a pipe to the attempt's standard input, so the attempt ends when the worker does.
    """

    @ray.remote(max_retries=0, num_cpus=share.cpus, num_gpus=share.gpus)  # type: ignore[untyped-decorator]
    def attempt(command: list[str], folder: str, environment: dict[str, str]) -> tuple[int, str]:
        # The train process writes to the job's log; this file is for errors before it starts.
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            try:
                while process.poll() is None:  # `wait` would not notice a cancellation
                    time.sleep(0.1)
            finally:
                assert process.stdin is not None
                process.stdin.close()
                process.wait()
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        return process.returncode, lines[-1] if lines else ""

    return attempt


def _environment(share: Share) -> dict[str, str]:
    """Return this process's variables, without those that Ray sets on its workers."""
    kept: dict[str, str] = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    kept.pop("CUDA_VISIBLE_DEVICES", None)
    kept |= threads_of(share.cpus)
    return kept if share.gpus else kept | {"CUDA_VISIBLE_DEVICES": ""}


def _failure(ray: Any, job: Job, reference: Any) -> Failure | None:
    try:
        exit_code, message = ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        # The message is in the last line for an exception in the attempt, in the first for a dead worker or node.
        in_attempt = isinstance(error, ray.exceptions.RayTaskError)
        return Failure(job, None, lines[-1] if in_attempt else f"{type(error).__name__}: {lines[0].partition('. ')[0]}")
    if exit_code == 0:
        return None
    failure = Failure(job, exit_code if exit_code <= 128 else 128 - exit_code)
    return Failure(job, failure.exit_code, f"{failure.cause}: {message}") if message else failure


def _what_runs(left: Sequence[Job], failures: Sequence[Failure]) -> str:
    running = sum(job.log.exists() for job in left)
    failed = f", {len(failures)} failed" if failures else ""
    return f"{running} running, {len(left) - running} waiting{failed}"


def _cancel(ray: Any, references: Sequence[Any]) -> None:
    """Take the waiting jobs out of the queue and end the running ones: gently, then by force."""
    left = list(references)
    for force in (False, True):
        for reference in left:
            ray.cancel(reference, force=force)
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=_GRACE_SECONDS)
