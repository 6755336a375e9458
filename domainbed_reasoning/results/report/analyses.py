"""Reads a sweep's ``analysis`` folder: TXT files as text, PNG as figures, CSV as tables."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path

from domainbed_reasoning.files.plain import open_plain_text, plain_lines, read_plain
from domainbed_reasoning.images.decode import file_below, read_rgb, reject_truncated_images
from domainbed_reasoning.results.report.blocks import Block, Code, Details, Figure
from domainbed_reasoning.results.tables import ABSENT, Table

FOLDER = "analysis"
_ORDER = (".txt", ".png", ".csv")
_ROWS, _COLUMNS, _CHARACTERS = 40, 18, 200
_EXPANDED = 12  # tables with at most this many rows are expanded initially
_LARGEST = {".png": 4_000_000, ".csv": 50_000_000, ".txt": 50_000_000}  # bytes
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_TEXT = 4_000  # characters
_LONGEST_LINE = 1 << 16  # bytes of a table
_JOB = re.compile(r"([0-9a-f]{8})[0-9a-f]{24}(/\w+\.pkl)?")  # a job or one of its checkpoints; shown shortened


def analysis_blocks(folder: Path) -> Iterator[Block]:
    """Yield the files below ``folder / "analysis"``: for each name its text, figure and table.

    Args:
        folder: of the sweep.
    """
    below = folder / FOLDER
    paths = [path for path in below.rglob("*") if path.suffix.lower() in _ORDER and not path.is_dir()]
    for path in sorted(paths, key=lambda path: (path.with_suffix(""), _ORDER.index(path.suffix.lower()))):
        name = path.relative_to(below).as_posix()
        try:
            yield _block(file_below(folder, path.relative_to(folder)), name)
        except (OSError, csv.Error) as error:
            yield Code(f"Left out: {FOLDER}/{_title(name)}", str(error), "text")


def _block(path: Path, name: str) -> Table | Figure | Code | Details:
    """Return the content of a file.

    Raises:
        OSError: if it is not a regular file, too large, or not an image.
        csv.Error: if it is not a valid table.
    """
    if not path.is_file():
        raise OSError(f"{FOLDER}/{name} is not a regular file.")
    kind, size = path.suffix.lower(), path.stat().st_size
    if size > _LARGEST[kind]:
        raise OSError(f"{FOLDER}/{name}: {size / 1e6:.1f} MB is too large; the limit is {_LARGEST[kind] / 1e6:.0f} MB.")
    if kind == ".csv":
        table = _table(path, name)
        long = isinstance(table, Table) and len(table.rows) > _EXPANDED
        return Details(f"The table {name}", (table,)) if long else table
    if kind == ".txt":
        with open_plain_text(path, errors="replace") as file:
            return Code(_title(name), file.read(_LARGEST_TEXT).strip(), "text")
    data = read_plain(path, _LARGEST[kind])
    with reject_truncated_images():
        read_rgb(data, f"{FOLDER}/{name}")
    if not data.startswith(_PNG):
        raise OSError(f"{FOLDER}/{name} is not a PNG file.")
    return Figure(_title(name), f"The plot {name}; its numbers are in the table of the same name.", "image/png", data)


def _title(name: str) -> str:
    return name.rpartition(".")[0].replace("_", " ").replace("/", ", ")


def _table(path: Path, name: str) -> Table | Code:
    rows, count = [], 0
    for row in filter(None, csv.reader(plain_lines(path, _LONGEST_LINE))):
        count += 1
        if count <= _ROWS + 1:
            rows.append([_shown(text) for text in row[:_COLUMNS]])
    if count < 2:
        return Code(f"The table {_title(name)}", "No rows.", "text")
    width = len(rows[0])
    shown = tuple(tuple([*row, *[ABSENT] * width][:width]) for row in rows[1:])
    more = f" The first {_ROWS} of {count - 1} rows." if count - 1 > _ROWS else ""
    return Table(_title(name), tuple(rows[0]), shown, f"From {FOLDER}/{name}.{more}")


def _shown(text: str) -> str:
    """Return a cell's text: numbers with four significant digits, job names shortened."""
    if job := _JOB.fullmatch(text):
        return job[1] + (job[2] or "")
    try:
        number = float(text[:_CHARACTERS])
    except ValueError:
        number = math.nan
    if len(text) > _CHARACTERS:
        return text[: _CHARACTERS - 1] + "…"
    if math.isnan(number):
        return text or ABSENT
    return text if text.lstrip("-").isdigit() else f"{number:.4g}"
