"""What Slurm has of a sweep's jobs: which were submitted, what has become of each, and waiting until all are over.

The folder ``slurm`` of a sweep holds what submitit keeps of each job, and ``jobs.jsonl``, a line a job with Slurm's id,
the cluster and the train command: so another process than the one that submitted them can tell what they are, and wait.
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
# Of a job that is over; all other states of `squeue` are of one that waits, runs or will run again.
_OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
_STARTED = frozenset("CONFIGURING RUNNING COMPLETING SUSPENDED STOPPED SIGNALING".split())
_PURGED = "PURGED"


def folder_of(sweep: Path) -> Path:
    """Return where the launcher keeps what it has submitted for a sweep, and what Slurm said."""
    return sweep / _FOLDER


def note_submitted(submitted: Mapping[str, Job], folder: Path) -> None:
    """Keep which job has which of Slurm's ids.

    Args:
        submitted: Slurm's ids, as in ``12_0``, and the jobs.
        folder: where the launcher keeps such things of their sweep.
    """
    cluster = slurm_setting("ClusterName")
    lines = [
        json.dumps({"slurm": identifier, "cluster": cluster, "command": job.command})
        for identifier, job in submitted.items()
    ]
    with open(folder / _JOBS, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in ["", *lines]))  # apart from a line that was cut short


def slurm_setting(name: str) -> str:
    """Return one of the controller's settings, as `scontrol` says it; "" where it does not."""
    try:
        said = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
    match = re.search(rf"^{name}\s*=\s*(\S+)", said, re.MULTILINE)
    return match[1] if match else ""


def _noted(sweep: Path) -> Iterator[dict[str, str]]:
    """Yield the lines of a sweep's jobs, without what a kill or a full disk cut short."""
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
    """Return a sweep's jobs by Slurm's ids, from this call or any before, the first one first.

    Args:
        sweep: its folder; what was submitted before it was moved is taken to be in it too.
    """
    found = {}
    for noted in _noted(sweep):
        job = parse_job(noted["command"])
        options = {**job.options, "output_dir": (str(sweep / job.folder.name),)}
        found[noted["slurm"]] = dataclasses.replace(job, options=options)
    return found


def with_slurm(sweep: Path) -> dict[str, str]:
    """Return a sweep's jobs that Slurm has not done with, from this call or any before: their ids and states.

    Args:
        sweep: its folder.

    Raises:
        ConnectionError: jobs have been submitted, and Slurm cannot be asked here what has become of them.
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
    """Return what a person may call and read to follow jobs, given by Slurm's ids."""
    arrays = sorted({int(identifier.partition("_")[0]) for identifier in submitted})
    folders = sorted({str(folder_of(job.folder.absolute().parent)) for job in submitted.values()})
    return (
        f"    squeue --jobs={','.join(map(str, arrays))}\n    scancel {' '.join(map(str, arrays))}      cancels them\n"
        f"The output of each is in its {LOG}, Slurm's logs are in {', '.join(folders)}."
    )


def wait_for_sweeps(sweeps: Iterable[Path], earlier: Collection[str] = ()) -> list[Failure]:
    """Wait until Slurm has done with the jobs of some sweeps, whichever call submitted them, and say which failed.

    Args:
        sweeps: their folders.
        earlier: ids of jobs that earlier calls submitted: what has become of them was said then, if Slurm has done
            with them.

    Returns:
        The failures, printed as well, after everything else.
    """
    left: dict[str, Job] = {}
    for sweep in sweeps:
        found = submitted_for(sweep)
        try:
            alive: Collection[str] = with_slurm(sweep)
        except ConnectionError:  # the waiting asks until it answers
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
    """Return the failures when all jobs are over.

    Args:
        submitted: Slurm's ids and the jobs.
    """
    left = dict(submitted)
    failures: list[Failure] = []
    states: dict[str, str] = {}
    answers, shown = True, ""
    with tqdm(total=len(left), unit="job", dynamic_ncols=True, file=sys.stderr) as bar:

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
            if what_runs != shown or sys.stderr.isatty():  # a file gets a line a change, not a line a poll
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
    """Return the state of every job of the arrays that Slurm's controller knows; it forgets those that are over.

    Accounting (`sacct`) is not asked: many machines have none.

    Raises:
        ConnectionError: it does not answer.
    """
    jobs = ",".join(sorted(arrays))
    # Its variables, as SQUEUE_PARTITION, would hide jobs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", "--format=%i %T"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise ConnectionError("`squeue` was not found") from error
    if said.returncode and "Invalid job id" not in said.stderr:
        raise ConnectionError(said.stderr.strip() or f"squeue: exit code {said.returncode}")
    lines = (line.split(maxsplit=1) for line in said.stdout.splitlines() if " " in line.strip())
    return {identifier: state.strip() for identifier, state in lines}


def _failure(identifier: str, job: Job, state: str) -> Failure | None:
    if state == "COMPLETED" or (state == _PURGED and job.is_done):
        return None
    folder = folder_of(job.folder.absolute().parent)
    result = folder / f"{identifier}_0_result.pkl"
    said = "left its queue unfinished" if state == _PURGED else f"state {state}"
    if result.exists():
        outcome, trace = importlib.import_module("submitit").core.utils.pickle_load(result)
        last = str(trace).strip().splitlines()[-1] if outcome == "error" else ""
        said += f", {last.rpartition('Error: ')[2]}" if last else ""
    logs = sorted(folder.glob(f"{identifier}_*log.out"))
    return Failure(job, None, f"Slurm job {identifier}: {said}; its log there: {', '.join(map(str, logs)) or 'none'}")
