"""A sweep's jobs in Slurm: which were submitted, their states, and waiting for them.

The folder ``slurm`` of a sweep contains submitit's files and ``jobs.jsonl``, a line per job with Slurm's id, the
cluster and the train command, from which any process can identify the jobs and wait for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from domainbed_reasoning.jobs.results_file import join_earlier
from domainbed_reasoning.sweeps.launchers.jobs import LOG, Failure, Job, parse_job, report

_FOLDER = "slurm"
_JOBS = "jobs.jsonl"
_POLL_SECONDS = 5.0
# States of ended jobs; in all other states of `squeue`, a job waits, runs or will run again.
_OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
_STARTED = frozenset("CONFIGURING RUNNING COMPLETING SUSPENDED STOPPED SIGNALING".split())
_PURGED = "PURGED"


def folder_of(sweep: Path) -> Path:
    """Return the folder of a sweep's submitted jobs and Slurm's logs."""
    return sweep / _FOLDER


def note_submitted(submitted: Mapping[str, Job], folder: Path) -> None:
    """Record the Slurm ids of jobs.

    Args:
        submitted: jobs by Slurm's ids, such as ``12_0``.
        folder: of the sweep, see `folder_of`.
    """
    cluster = slurm_setting("ClusterName")
    lines = [
        json.dumps({"slurm": identifier, "cluster": cluster, "command": job.command})
        for identifier, job in submitted.items()
    ]
    with open(folder / _JOBS, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in ["", *lines]))  # after a truncated line, begin a new one


def slurm_setting(name: str) -> str:
    """Return a setting of Slurm's controller, from `scontrol`; "" if unknown."""
    try:
        config = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
    match = re.search(rf"^{name}\s*=\s*(\S+)", config, re.MULTILINE)
    return match[1] if match else ""


def _noted(sweep: Path) -> Iterator[dict[str, str]]:
    """Yield the recorded jobs of a sweep, without truncated lines."""
    try:
        lines = (folder_of(sweep) / _JOBS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            noted = json.loads(line)
            yield {name: str(noted[name]) for name in ("slurm", "cluster", "command")}
        except (ValueError, KeyError, TypeError):
            continue


def submitted_for(sweep: Path) -> dict[str, Job]:
    """Return all submitted jobs of a sweep by Slurm's ids, in order of submission.

    Args:
        sweep: its folder, which may have been moved since.
    """
    found = {}
    for noted in _noted(sweep):
        job = parse_job(noted["command"])
        options = {**job.options, "output_dir": (str(sweep / job.folder.name),)}
        found[noted["slurm"]] = dataclasses.replace(job, options=options)
    return found


def with_slurm(sweep: Path) -> dict[str, str]:
    """Return the ids and states of a sweep's submitted jobs that have not ended.

    Args:
        sweep: its folder.

    Raises:
        ConnectionError: jobs have been submitted, and Slurm cannot be queried here.
    """
    submitted = {path.name.partition("_")[0] for path in folder_of(sweep).glob("*_submitted.pkl")}
    clusters = {noted["cluster"] for noted in _noted(sweep)} - {""}
    if clusters and (here := slurm_setting("ClusterName")) and clusters != {here}:
        raise ConnectionError(
            f"they were submitted to the cluster {', '.join(sorted(clusters - {here}))}, not to {here}"
        )
    states = _all_states(submitted) if submitted else {}
    return {identifier: state for identifier, state in states.items() if state not in _OVER}


def how_to_follow(submitted: Mapping[str, Job]) -> str:
    """Return the commands and files for following jobs, by Slurm's ids."""
    arrays = sorted({int(identifier.partition("_")[0]) for identifier in submitted})
    folders = sorted({str(folder_of(job.folder.absolute().parent)) for job in submitted.values()})
    return (
        f"    squeue --jobs={','.join(map(str, arrays))}\n    scancel {' '.join(map(str, arrays))}      cancels them\n"
        f"The output of each is in its {LOG}, Slurm's logs are in {', '.join(folders)}."
    )


def wait_for_sweeps(sweeps: Iterable[Path], earlier: Collection[str] = ()) -> list[Failure]:
    """Wait for all submitted jobs of some sweeps, and report failures.

    Args:
        sweeps: their folders.
        earlier: ids of previously submitted jobs, whose failures have been reported if they have ended.

    Returns:
        The failures, which are also printed at the end.
    """
    left: dict[str, Job] = {}
    for sweep in sweeps:
        found = submitted_for(sweep)
        try:
            alive: Collection[str] = with_slurm(sweep)
        except ConnectionError:  # `wait_for` retries until Slurm responds
            alive = found
        left |= {name: job for name, job in found.items() if not job.is_done and (name in alive or name not in earlier)}
    if not left:
        return []
    try:
        failures = wait_for(left)
    except KeyboardInterrupt:
        print(f"\nThe jobs keep running. To follow them:\n{how_to_follow(left)}")
        raise
    report(failures, len(left))
    return failures


def wait_for(submitted: Mapping[str, Job]) -> list[Failure]:
    """Wait for all jobs and return the failures.

    Args:
        submitted: the jobs by Slurm's ids.
    """
    left = dict(submitted)
    failures: list[Failure] = []
    states: dict[str, str] = {}
    answers, shown = True, ""
    with tqdm(total=len(left), unit="job", dynamic_ncols=True, file=sys.stderr, disable=None) as bar:

        def say(line: str) -> None:
            bar.write(line, file=sys.stderr)

        while left:
            before = states
            try:
                states = _states(list(left))
                answers = True
            except ConnectionError as error:
                if answers:
                    say(f"Slurm does not respond ({error}); retrying.")
                answers = False
            for identifier, state in states.items():
                if state == "PENDING" and before.get(identifier) in _STARTED:
                    say(f"REQUEUED: {left[identifier].name} (Slurm job {identifier})")
                if state not in {*_OVER, _PURGED}:
                    continue
                job = left.pop(identifier)
                bar.update()
                failure = _failure(identifier, job, state)
                if failure is not None:
                    failures.append(failure)
                    say(f"FAILED: {job.name} ({failure.cause})")
                    try:
                        join_earlier(job.folder)
                    except OSError as error:
                        say(f"Its earlier records could not be joined: {error}")
            states = {identifier: state for identifier, state in states.items() if identifier in left}
            counts = Counter(state.lower() for state in states.values())
            counts.update({"failed": len(failures)} if failures else {})
            what_runs = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
            if what_runs != shown or sys.stderr.isatty():  # in a file, one line per change
                bar.set_postfix_str(what_runs)
            shown = what_runs
            if left:
                time.sleep(_POLL_SECONDS)
    return failures


def _states(identifiers: Sequence[str]) -> dict[str, str]:
    """Return the state of every job, from Slurm's controller."""
    known = _all_states({identifier.partition("_")[0] for identifier in identifiers})
    return {identifier: known.get(identifier, _PURGED) for identifier in identifiers}


def _all_states(arrays: Iterable[str]) -> dict[str, str]:
    """Return the state of every job of the arrays in Slurm's controller, which forgets ended jobs after a while.

    Accounting (`sacct`) is not used: many clusters have none.

    Raises:
        ConnectionError: Slurm does not respond.
    """
    jobs = ",".join(sorted(arrays))
    # Variables such as SQUEUE_PARTITION would hide jobs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", "--format=%i %T"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise ConnectionError("`squeue` was not found") from error
    if result.returncode and "Invalid job id" not in result.stderr:
        raise ConnectionError(result.stderr.strip() or f"squeue: exit code {result.returncode}")
    lines = (line.split(maxsplit=1) for line in result.stdout.splitlines() if " " in line.strip())
    return {identifier: state.strip() for identifier, state in lines}


def _failure(identifier: str, job: Job, state: str) -> Failure | None:
    if state == "COMPLETED" or (state == _PURGED and job.is_done):
        return None
    folder = folder_of(job.folder.absolute().parent)
    result = folder / f"{identifier}_0_result.pkl"
    outcome = "left the queue before completing" if state == _PURGED else f"state {state}"
    if result.exists():
        status, trace = importlib.import_module("submitit").core.utils.pickle_load(result)
        last = str(trace).strip().splitlines()[-1] if status == "error" else ""
        outcome += f", {last.rpartition('Error: ')[2]}" if last else ""
    logs = sorted(folder.glob(f"{identifier}_*log.out"))
    return Failure(job, None, f"Slurm job {identifier}: {outcome}; Slurm's log: {', '.join(map(str, logs)) or 'none'}")
