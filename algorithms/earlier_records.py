"""Records that an earlier process of the same job, killed since, left in DomainBed's ``results.jsonl``.

DomainBed starts at step 0 again and appends, and `collect_results` would count a step twice. The earlier records are
therefore moved to ``results.earlier.jsonl``; what they say is written again as the job is replayed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domainbed_reasoning.atomic import replace_text

_MEASURED = ("step_time", "mem_gb")  # of a record: what was measured, not computed


def set_aside(output_dir: Path, args: Mapping[str, Any]) -> str:
    """Move the records of the job with these arguments, and any that were cut off, out of ``results.jsonl``.

    Args:
        output_dir: of the job.
        args: DomainBed's, as its records hold them.

    Returns:
        the lines that were moved.
    """
    results = output_dir / "results.jsonl"
    if not results.is_file():
        return ""
    stay, go = [], []
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _record(line)
        (go if record is None or record.get("args") == args else stay).append(line + "\n")
    if go:
        with (output_dir / "results.earlier.jsonl").open("a", encoding="utf-8") as earlier:
            earlier.writelines(go)
        replace_text(results, "".join(stay))
        print(f"{len(go)} earlier records of this job are now in {output_dir / 'results.earlier.jsonl'}.", flush=True)
    return "".join(go)


def own_records(output_dir: Path, args: Mapping[str, Any]) -> str:
    """Return the lines of ``results.jsonl`` that the job with these arguments has written."""
    results = output_dir / "results.jsonl"
    if not results.is_file():
        return ""
    lines = results.read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if (_record(line) or {}).get("args") == args)


def restore_measured(output_dir: Path, earlier: str) -> None:
    """Give replayed records in ``results.jsonl`` the times and memory that were measured when they were computed.

    Args:
        output_dir: of the job.
        earlier: what `own_records` and `set_aside` returned.
    """
    results = output_dir / "results.jsonl"
    known = [record for record in map(_record, earlier.splitlines()) if record is not None]
    if not known or not results.is_file():
        return
    lines = []
    for line in results.read_text(encoding="utf-8").splitlines():
        record = _record(line) or {}
        for old in known:
            if _computed(old) == _computed(record):
                line = json.dumps(old, sort_keys=True)
        lines.append(line + "\n")
    replace_text(results, "".join(lines))


def _computed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _MEASURED}


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
