"""Records that an earlier process of the same job, killed since, left in DomainBed's ``results.jsonl``.

DomainBed starts at step 0 again and appends, and `collect_results` would count a step twice. The earlier records are
therefore moved to ``results.earlier.jsonl``; what they say is written again as the job is replayed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domainbed_reasoning.files.atomic import replacing

_MEASURED = ("step_time", "mem_gb")  # of a record: what was measured, not computed


def set_aside(output_dir: Path, args: Mapping[str, Any]) -> str:
    """Move the records of the job with these arguments, and any that were cut off, out of ``results.jsonl``.

    Args:
        output_dir: of the job.
        args: DomainBed's, as its records hold them.

    Returns:
        the lines that were moved.
    """
    stay: list[bytes] = []
    go: list[bytes] = []
    for line in _lines(output_dir):
        record = _record(line)
        (go if record is None or record.get("args") == args else stay).append(line + b"\n")
    if go:
        with (output_dir / "results.earlier.jsonl").open("ab") as earlier:
            earlier.writelines(go)
        with replacing(output_dir / "results.jsonl") as results:
            results.writelines(stay)
        print(f"{len(go)} earlier records of this job are now in {output_dir / 'results.earlier.jsonl'}.", flush=True)
    return b"".join(go).decode("utf-8", "replace")


def own_records(output_dir: Path, args: Mapping[str, Any]) -> str:
    """Return the lines of ``results.jsonl`` that the job with these arguments has written."""
    own = [line + b"\n" for line in _lines(output_dir) if (_record(line) or {}).get("args") == args]
    return b"".join(own).decode("utf-8", "replace")


def restore_measured(output_dir: Path, earlier: str) -> None:
    """Give replayed records in ``results.jsonl`` the times and memory that were measured when they were computed.

    Args:
        output_dir: of the job.
        earlier: what `own_records` and `set_aside` returned.
    """
    known = [record for record in map(_record, earlier.encode().split(b"\n")) if record is not None]
    there = _lines(output_dir)
    if not known or not there:
        return
    lines = []
    for line in there:
        record = _record(line) or {}
        for old in known:
            if _computed(old) == _computed(record):
                line = json.dumps(old, sort_keys=True).encode()
        lines.append(line + b"\n")
    with replacing(output_dir / "results.jsonl") as results:
        results.writelines(lines)


def _computed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _MEASURED}


def _lines(output_dir: Path) -> list[bytes]:
    """Return the lines of ``results.jsonl``, without their ends; [] where there is none."""
    results = output_dir / "results.jsonl"
    lines = results.read_bytes().split(b"\n") if results.is_file() else [b""]
    return lines if lines[-1] else lines[:-1]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
