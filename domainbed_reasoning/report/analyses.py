"""What the analyses left in a sweep's folder ``analysis``: CSV files as tables, PNG files as figures."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from domainbed_reasoning.collect.tables import Table
from domainbed_reasoning.report.blocks import Figure, Text

FOLDER = "analysis"
_ROWS, _COLUMNS, _CHARACTERS = 40, 14, 200
_LARGEST_PICTURE = 4_000_000  # bytes


def analyses(folder: Path) -> Iterator[Table | Figure | Text]:
    """Yield the tables and figures below ``folder / "analysis"``, a file's figure after its table.

    Args:
        folder: of the sweep.
    """
    below = folder / FOLDER
    for path in sorted(path for path in below.rglob("*") if path.is_file()):
        name = path.relative_to(below).as_posix()
        if path.suffix.lower() == ".csv":
            yield _table(path, name)
        elif path.suffix.lower() == ".png":
            size = path.stat().st_size
            if size > _LARGEST_PICTURE:
                yield Text(f"`{FOLDER}/{name}` is left out: {size / 1e6:.1f} MB.")
            else:
                yield Figure(
                    _title(name),
                    f"The plot {name}; its numbers are in the table of that name.",
                    "image/png",
                    path.read_bytes(),
                )


def _title(name: str) -> str:
    return name.rpartition(".")[0].replace("_", " ").replace("/", ", ")


def _table(path: Path, name: str) -> Table | Text:
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = [[_shown(text) for text in row[:_COLUMNS]] for row in csv.reader(file) if row]
    if len(rows) < 2:
        return Text(f"`{FOLDER}/{name}` holds no rows.")
    width = len(rows[0])
    shown = tuple(tuple([*row, *[""] * width][:width]) for row in rows[1 : _ROWS + 1])
    more = f" The first {_ROWS} of {len(rows) - 1} rows." if len(rows) - 1 > _ROWS else ""
    return Table(_title(name), tuple(rows[0]), shown, f"From {FOLDER}/{name}.{more}")


def _shown(text: str) -> str:
    """Return a cell's text, its number with four digits where it has more."""
    try:
        number = float(text)
    except ValueError:
        return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
    return text if len(text) <= 7 or number == int(number) else f"{number:.4g}"
