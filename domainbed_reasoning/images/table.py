"""Images listed in a table: CSV, JSON Lines or Parquet with a row an image, beside class folders.

A row has the columns ``path`` (below the dataset's folder, with ``/``), ``label`` (name of the class) and ``domain``;
others are ignored. With a column ``split`` a dataset may take the rows of some splits alone. Rows are read one by one
and kept as bytes and numbers: a million take some seconds and about 50 MB.
"""

from __future__ import annotations

import csv
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.image_names import composed
from domainbed_reasoning.chains.record import check_image_path, parse_json
from domainbed_reasoning.files.plain import open_plain, open_plain_text
from domainbed_reasoning.images.paths import Paths

COLUMNS = ("path", "label", "domain", "split")
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
_MAX_LINE = 1 << 20
_ROWS = 8192  # of a Parquet file that are in memory at a time


class TableError(ValueError):
    """An invalid table of images; the message gives file, row, problem and fix."""

    def __init__(self, path: Path, line: int | None, problem: str):
        super().__init__(f"{path}{'' if line is None else f', line {line}'}: {problem}.")


@dataclass(frozen=True)
class ImageTable:
    """The images of a table.

    Attributes:
        file: the table.
        classes: names in sorted order, as the label column has them.
        paths: per domain, of its images in the table's order, below the dataset's folder.
        labels: per domain, the index of each image's class.
    """

    file: Path
    classes: tuple[str, ...]
    paths: tuple[Paths, ...]
    labels: tuple[array[int], ...]


def read_table(
    file: Path,
    domains: Sequence[str],
    columns: Mapping[str, str] | None = None,
    splits: Sequence[str] | None = None,
) -> ImageTable:
    """Return the images of a table.

    Args:
        file: its ending tells its format: .csv, .tsv, .jsonl or .parquet.
        domains: values of the domain column, in the order of DomainBed's environments.
        columns: names of the columns that are called otherwise than `COLUMNS`.
        splits: values of the split column whose rows count; None takes all rows and needs no such column.

    Raises:
        TableError: the table cannot be read, lacks a column, or has a row that cannot be used, a domain that is not
            listed, an image twice, or no image of a listed domain.
    """
    names = {name: (columns or {}).get(name, name) for name in COLUMNS[: 4 if splits is not None else 3]}
    numbers = {name: number for number, name in enumerate(domains)}
    classes: dict[str, int] = {}
    labels = [array("i") for _ in domains]
    seen: set[str] = set()

    paths = [Paths() for _ in domains]
    for line, row in _rows(file, list(names.values())):
        *cells, split = [*row, None] if splits is None else row
        if splits is not None and _text(file, line, ("split", names["split"]), split) not in splits:
            continue  # test rows may have no label
        path, label, domain = (
            _text(file, line, name, value) for name, value in zip(list(names.items())[:3], cells, strict=True)
        )
        if (number := numbers.get(domain)) is None:
            known = ", ".join(domains)
            raise TableError(file, line, f"the domain {domain!r:.80} is not among the environments ({known})")
        if problem := check_image_path(path):
            raise TableError(file, line, problem)
        if (form := composed(path)) in seen:
            raise TableError(file, line, f"the image {path!r:.200} is listed twice. Keep one of the rows")
        seen.add(form)
        paths[number].append(path)
        labels[number].append(classes.setdefault(label, len(classes)))
    del seen
    for number, name in enumerate(domains):
        if not labels[number]:
            rows = "row" if splits is None else f"row of the split {' or '.join(map(repr, splits))}"
            raise TableError(file, None, f"no {rows} has the domain {name!r:.80}. Correct the environments")
    ordered = tuple(sorted(classes))
    place = {classes[name]: index for index, name in enumerate(ordered)}
    return ImageTable(
        file,
        ordered,
        tuple(paths),
        tuple(array("i", map(place.__getitem__, of_domain)) for of_domain in labels),
    )


def _text(file: Path, line: int, column: tuple[str, str], value: Any) -> str:
    """Return a cell as text; whole numbers are accepted for classes and domains, and in paths what files' names have.

    Args:
        file: the table.
        line: number of the line.
        column: what it is to us, and its name in the table.
        value: of the cell.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    is_line = _is_one_line if column[0] == "path" else str.isprintable
    if not isinstance(value, str) or not value.strip() or not is_line(value):
        raise TableError(file, line, f"{column[1]!r} must be non-empty text of one line, got {value!r:.80}")
    return value


def _is_one_line(text: str) -> bool:
    return not any(unicodedata.category(character) == "Cc" for character in text)


def _rows(file: Path, names: list[str]) -> Iterator[tuple[int, list[Any]]]:
    """Yield line number, from 1, and the values of the columns of every row."""
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise TableError(file, None, f"the name of a table must end in {', '.join(ENDINGS)}")
    try:
        yield from reader(file, names)
    except OSError as error:
        raise TableError(file, None, f"cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise TableError(file, None, f"not UTF-8 ({error.reason} at byte {error.start})") from error


def _places(file: Path, names: list[str], found: Sequence[Any]) -> list[int]:
    for name in names:
        if list(found).count(name) != 1:
            how = "is missing" if name not in found else "is there more than once"
            there = ", ".join(map(str, found))[:300]
            raise TableError(
                file, None, f"the column {name!r} {how}. It has the columns {there}; rename one with [columns]"
            )
    return [list(found).index(name) for name in names]


def _csv_rows(file: Path, names: list[str]) -> Iterator[tuple[int, list[Any]]]:
    with open_plain_text(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            places = _places(file, names, next(reader, []))
            for row in reader:
                if row:
                    if len(row) <= max(places):
                        raise TableError(file, reader.line_num, f"has {len(row)} cells, fewer than the header")
                    yield reader.line_num, [row[place] for place in places]
        except csv.Error as error:
            raise TableError(file, reader.line_num, f"not CSV ({error})") from error


def _jsonl_rows(file: Path, names: list[str]) -> Iterator[tuple[int, list[Any]]]:
    with open_plain(file) as lines:
        number = 0
        while line := lines.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise TableError(file, number, f"longer than {_MAX_LINE:,} bytes")
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise TableError(file, number, f"not JSON ({str(error):.200})") from error
            if not isinstance(row, dict) or (missing := next((name for name in names if name not in row), None)):
                problem = f"the key {missing!r} is missing" if isinstance(row, dict) else "not a JSON object"
                raise TableError(file, number, problem)
            yield number, [row[name] for name in names]


def _parquet_rows(file: Path, names: list[str]) -> Iterator[tuple[int, list[Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TableError(
            file, None, "reading Parquet needs the package pyarrow: pip install 'domainbed-reasoning[parquet]'"
        ) from error
    with open_plain(file) as opened:
        try:
            table = pyarrow.parquet.ParquetFile(opened)
            _places(file, names, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(_ROWS, columns=names):
                for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    number += 1
                    yield number, list(row)
        except pyarrow.ArrowException as error:
            raise TableError(file, None, f"not Parquet ({str(error):.200})") from error
