"""Replacement of earlier records in DomainBed's ``results.jsonl`` after a restart.

DomainBed restarts a killed job at step 0 and appends, and its `collect_results` would count a step twice. Earlier
records are therefore moved to ``results.earlier.jsonl`` before a job starts. Afterwards one rule applies: **a record of
step s replaces all earlier ones of steps s and above**. A job that starts at step 0 thereby replaces all of them, one
that continues after step s keeps those up to s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.jobs.job_files import RESULTS
from domainbed_reasoning.terminal import get_logger

EARLIER = "results.earlier.jsonl"
_OLD_EARLIER = re.compile(re.escape(RESULTS) + r"\.attempt-(\d+)")  # one file per attempt, from older versions
MEASURED = ("step_time", "mem_gb")  # values that are measured, not computed
_ADDED = ("well_formed",)  # by `add_to_record`, which a kill may have prevented
_log = get_logger(__name__)


def add_record(run: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Append a record to those of a run; it replaces records of the same and later steps."""
    return [*(before for before in run if before["step"] < record["step"]), record]


def without_replaced(lines: Iterable[str]) -> list[str]:
    """Return the lines of records that are not replaced by a later line; truncated lines are dropped."""
    run: list[Mapping[str, Any]] = []
    for line in lines:
        try:
            run = add_record(run, {"step": int(json.loads(line)["step"]), "line": line})
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [record["line"] for record in run]


def set_aside(output_dir: Path, args: Mapping[str, Any] | None = None) -> str:
    """Move records from ``results.jsonl`` to ``results.earlier.jsonl``; truncated lines are moved as well.

    Args:
        output_dir: of the job.
        args: DomainBed's arguments; records of jobs with other arguments are kept. None moves all records.

    Returns:
        The lines that were moved.

    Raises:
        OSError: the files cannot be written.
    """
    results = output_dir / RESULTS
    kept: list[bytes] = []
    moved: list[bytes] = []
    for line in _lines(results):
        record = _record(line)
        (moved if args is None or record is None or record.get("args") == args else kept).append(line + b"\n")
    if moved:
        with (output_dir / EARLIER).open("ab") as earlier:
            earlier.writelines(moved)
        _log.info("Moved %d earlier records of this job to %s.", len(moved), output_dir / EARLIER)
    if kept and moved:
        _write(results, kept)
    elif not kept:
        results.unlink(missing_ok=True)
    return b"".join(moved).decode("utf-8", "replace")


def join_earlier(output_dir: Path) -> None:
    """Merge earlier records that were not replaced into ``results.jsonl``; written only if it changes."""
    results = output_dir / RESULTS
    old = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _OLD_EARLIER.fullmatch(path.name))]
    paths = [*(path for _, path in sorted(old)), output_dir / EARLIER, results]
    lines = [line.decode("utf-8", "replace") for path in paths for line in _lines(path)]
    joined = [f"{line}\n".encode() for line in without_replaced(lines)]
    if b"".join(joined) != (results.read_bytes() if results.is_file() else b""):
        _write(results, joined)


def own_records(output_dir: Path, args: Mapping[str, Any]) -> str:
    """Return the lines of ``results.jsonl`` written by the job with these arguments."""
    own = [line + b"\n" for line in _lines(output_dir / RESULTS) if (_record(line) or {}).get("args") == args]
    return b"".join(own).decode("utf-8", "replace")


def add_to_record(output_dir: Path, args: Mapping[str, Any], step: int, values: Mapping[str, float]) -> bool:
    """Add values to the last line of ``results.jsonl``, if it is the record of ``step`` of the job with these args.

    DomainBed averages the updates' values before it evaluates, so values of the evaluation other than accuracies can
    only be added afterwards.

    Returns:
        Whether the last line is that record.
    """
    lines = _lines(output_dir / RESULTS)
    record = (_record(lines[-1]) if lines else None) or {}
    if (record.get("step"), record.get("args")) != (step, args):
        return False
    complete = {**record, **values}
    if complete != record:
        added = json.dumps(complete, sort_keys=True).encode()
        _write(output_dir / RESULTS, [line + b"\n" for line in [*lines[:-1], added]])
    return True


def restore_measured(output_dir: Path, earlier: str) -> None:
    """Restore the originally measured times and memory of replayed records in ``results.jsonl``.

    Args:
        output_dir: of the job.
        earlier: lines returned by `own_records` and `set_aside`.
    """
    known = [record for record in map(_record, earlier.encode().split(b"\n")) if record is not None]
    replayed = _lines(output_dir / RESULTS)
    if not known or not replayed:
        return
    lines = []
    for line in replayed:
        record = _record(line) or {}
        for old in known:
            if _computed(old) == _computed(record):
                measured = {name: old[name] for name in MEASURED if name in old}
                line = json.dumps(record | measured, sort_keys=True).encode()
        lines.append(line + b"\n")
    _write(output_dir / RESULTS, lines)


def _computed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in (*MEASURED, *_ADDED)}


def _lines(path: Path) -> list[bytes]:
    """Return the lines of a file without line ends; [] if there is no file."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    return lines if lines[-1] else lines[:-1]


def _write(path: Path, lines: Iterable[bytes]) -> None:
    with replacing(path) as file:
        file.writelines(lines)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
