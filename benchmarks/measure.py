"""What every benchmark shares: interleaved timing, the row of the table, the table, the file of results."""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from domainbed_reasoning.files.atomic import replace_text

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
REPEATS = 5


@dataclass(frozen=True)
class BenchmarkRow:
    """One comparison.

    Attributes:
        what: is measured.
        against: the peer.
        ours: in ``unit``, the median.
        peer: in ``unit``, the median.
        unit: ``s``, ``ms`` or ``MB``.
        limit: the largest ratio peer / ours that counted operations or bytes allow; NaN where nothing is counted.
        bar: what is asked for, in words.
        passed: whether it is reached.
        equal: how far the outputs of both are apart.
    """

    what: str
    against: str
    ours: float
    peer: float
    unit: str
    limit: float
    bar: str
    passed: bool
    equal: str

    @property
    def ratio(self) -> float:
        """How many times the peer's time or memory ours is."""
        return self.peer / self.ours


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Return the seconds of every contender's calls, one after the other in every round, after a round that warms up.

    What else the machine does then meets all of them alike. The order turns from round to round.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats + 1):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            began = time.perf_counter()
            contenders[name]()
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each contender."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio_of(seconds: Mapping[str, Sequence[float]], peer: str, ours: str) -> float:
    """Return the median over the rounds of peer / ours: what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(seconds[peer], seconds[ours], strict=True))


def use_domainbed() -> None:
    """Make `domainbed` importable.

    Raises:
        SystemExit: there is none.
    """
    from domainbed_reasoning.bridge import upstream

    if upstream.use_domainbed() is None:
        raise SystemExit(upstream.MISSING)
    import _domainbed_reasoning_hook  # noqa: F401 - the hook, where no `.pth` file installed it


def table(rows: Sequence[BenchmarkRow]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| What | Against | Ours | Peer's | Ratio | Limit | Bar | | Outputs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        limit = "–" if math.isnan(row.limit) else f"{row.limit:.2f}"
        cells = [row.what, row.against, _number(row.ours, row.unit), _number(row.peer, row.unit)]
        cells += [f"{row.ratio:.2f}", limit, row.bar, "pass" if row.passed else "MISSED", row.equal]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def machine() -> str:
    """Return a name for this kind of machine: processor and cores, nothing that tells one machine from another."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := pathlib.Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
        model = found[1] if found else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {cores} cores".lower()).strip("-")


def write_results(
    rows: Sequence[BenchmarkRow], command: str, seconds: float, folder: pathlib.Path, name: str
) -> pathlib.Path:
    """Write the rows with what it takes to run them again; return the file."""
    record: dict[str, Any] = {
        "machine": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "command": command,
        "seconds": round(seconds),
        "versions": versions(),
        "rows": [
            {**asdict(row), "limit": None if math.isnan(row.limit) else row.limit, "ratio": row.ratio} for row in rows
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    replace_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def commit() -> str:
    """Return the checkout's commit, with ``-dirty`` where files differ from it."""
    asked = subprocess.run(
        ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return asked.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that are measured."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "trl"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
