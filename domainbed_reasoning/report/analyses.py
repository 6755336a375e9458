"""What analyses left in a sweep's folder ``analysis``: texts beside the paper, PNG as figures, CSV as tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from domainbed_reasoning.collect.tables import ABSENT, Table
from domainbed_reasoning.plain_files import open_plain_text, plain_lines, read_plain
from domainbed_reasoning.report.blocks import Code, Figure, Fold, Text

FOLDER = "analysis"
_ORDER = (".txt", ".png", ".csv")
_ROWS, _COLUMNS, _CHARACTERS = 40, 18, 200
_OPEN = 12  # rows of a table that is shown from the start
_LARGEST_PICTURE = 4_000_000  # bytes
_LARGEST_TEXT = 4_000  # characters
_LONGEST_LINE = 1 << 16  # bytes of a table
_JOB = re.compile(r"([0-9a-f]{8})[0-9a-f]{24}(/\w+\.pkl)?")  # a job, or a checkpoint of it: its head is enough


def analyses(folder: Path) -> Iterator[Table | Figure | Text | Code | Fold]:
    """Yield what lies below ``folder / "analysis"``: of each name its text, its figure, its table.

    Args:
        folder: of the sweep.
    """
    below = folder / FOLDER
    paths = [path for path in below.rglob("*") if path.is_file() and path.suffix.lower() in _ORDER]
    for path in sorted(paths, key=lambda path: (path.with_suffix(""), _ORDER.index(path.suffix.lower()))):
        name = path.relative_to(below).as_posix()
        if path.suffix.lower() == ".csv":
            table = _table(path, name)
            long = isinstance(table, Table) and len(table.rows) > _OPEN
            yield Fold(f"The table {name}", (table,)) if long else table
        elif path.suffix.lower() == ".txt":
            with open_plain_text(path, errors="replace") as file:
                text = file.read(_LARGEST_TEXT).strip()
            yield Code(_title(name), text, "text")
        else:
            size = path.stat().st_size
            if size > _LARGEST_PICTURE:
                yield Text(f"`{FOLDER}/{name}` is left out: {size / 1e6:.1f} MB.")
            else:
                described = f"The plot {name}; its numbers are in the table of that name."
                yield Figure(_title(name), described, "image/png", read_plain(path, _LARGEST_PICTURE))


def _title(name: str) -> str:
    return name.rpartition(".")[0].replace("_", " ").replace("/", ", ")


def _table(path: Path, name: str) -> Table | Text:
    rows, count = [], 0
    for row in filter(None, csv.reader(plain_lines(path, _LONGEST_LINE))):
        count += 1
        if count <= _ROWS + 1:
            rows.append([_shown(text) for text in row[:_COLUMNS]])
    if count < 2:
        return Text(f"`{FOLDER}/{name}` holds no rows.")
    width = len(rows[0])
    shown = tuple(tuple([*row, *[ABSENT] * width][:width]) for row in rows[1:])
    more = f" The first {_ROWS} of {count - 1} rows." if count - 1 > _ROWS else ""
    return Table(_title(name), tuple(rows[0]), shown, f"From {FOLDER}/{name}.{more}")


def _shown(text: str) -> str:
    """Return a cell's text: a number with four digits where it has more, a job by the head of its name."""
    if job := _JOB.fullmatch(text):
        return job[1] + (job[2] or "")
    try:
        number = float(text)
    except ValueError:
        return (text or ABSENT) if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
    return text if text.lstrip("-").isdigit() else f"{number:.4g}"
