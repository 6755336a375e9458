"""Export and import of chains in the formats of other projects, without loss in either direction.

| format     | file           | read by                                                        |
|------------|----------------|----------------------------------------------------------------|
| `jsonl`    | JSON lines     | this project: one record per line, see `store`                 |
| `parquet`  | Parquet        | this project; pandas, DuckDB                                   |
| `internvl` | JSON lines     | InternVL's fine-tuning: `image`, `width`, `height`, `conversations` |
| `llava`    | one JSON array | LLaVA's fine-tuning: `id`, `image`, `conversations`            |
| `sharegpt` | one JSON array | LLaMA-Factory: `conversations`, `images`                       |
| `messages` | Parquet        | Hugging Face `datasets`, TRL: `messages`, `images`             |

In other projects' formats a record's provenance is stored in an extra field, `domainbed_reasoning`, which their readers
ignore. Fields of an imported row that our records lack are kept in `foreign` and restored on export to that format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.conversations import (
    OPENAI,
    SHAREGPT,
    TurnStyle,
    image_of,
    is_answer,
    question_and_chain,
    text_of,
    turns_of,
)
from domainbed_reasoning.chains.json_rows import ExchangeError as ExchangeError
from domainbed_reasoning.chains.json_rows import read_json
from domainbed_reasoning.chains.parquet import (
    OWN_FIELD,
    message_schema,
    own_schema,
    read_parquet,
    to_columns,
    to_message_columns,
    write_parquet,
)
from domainbed_reasoning.chains.record import (
    MAX_LINE_BYTES,
    VERSION,
    check_image_path,
    check_json_value,
    check_record,
    parse_json,
    take_version,
)
from domainbed_reasoning.chains.store import Record, write_records
from domainbed_reasoning.files import format_version
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.files.plain import open_plain
from domainbed_reasoning.registry import unknown

# Reads an image: its path → width, height and bytes.
ImageInfo = Callable[[str], tuple[int, int, bytes]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """The layout of chains in a file.

    Attributes:
        file: ``lines`` of JSON, a JSON ``array``, or ``parquet``.
        fields: of a row, in order, beside `OWN_FIELD`; empty if rows are records of this project.
        style: of its turns.
        mark: the field by which a row is recognized: the first format in the table whose mark it has.
    """

    file: str
    fields: tuple[str, ...] = ()
    style: TurnStyle = SHAREGPT
    mark: str = ""


FORMATS = {
    "jsonl": Format("lines"),
    "parquet": Format("parquet"),
    "messages": Format("parquet", ("messages", "images"), OPENAI, mark="messages"),
    "sharegpt": Format("array", ("conversations", "images"), mark="images"),
    "internvl": Format("lines", ("id", "image", "width", "height", "conversations"), mark="width"),
    "llava": Format("array", ("id", "image", "conversations"), mark="conversations"),
}


def export_records(
    path: Path,
    form: str,
    records: Iterable[Record],
    question: str = "",
    image_info: ImageInfo | None = None,
    embed_images: bool = False,
) -> int:
    """Write records to ``path`` in the format ``form`` and return their number.

    Args:
        path: of the new file.
        form: a key of `FORMATS`.
        records: in order.
        question: the prompt of the formats that have one; a record's own `question` takes precedence.
        image_info: reads an image, for its size (`internvl`) and bytes (``embed_images``).
        embed_images: store the images' bytes in a `messages` file.

    Raises:
        ExchangeError: unknown format, or one that lacks ``question`` or ``image_info``.
        OSError: if it cannot be written; no partial file is left.
    """
    if form not in FORMATS:
        raise ExchangeError(str(unknown("format", form, FORMATS)))
    layout = FORMATS[form]
    records = map(_checked, records)
    if not layout.fields:
        if layout.file == "lines":
            return write_records(path, records)
        versioned = ({**record, format_version.KEY: VERSION} for record in records)
        return write_parquet(path, map(to_columns, versioned), own_schema())
    if not question:
        raise ExchangeError(f"Format {form!r} includes the question. Pass --dataset and --data_dir.")
    if image_info is None and "width" in layout.fields:
        raise ExchangeError(f"Format {form!r} includes the image sizes. Pass --dataset and --data_dir.")
    if image_info is None and embed_images and layout.style.is_typed:
        raise ExchangeError("--embed-images reads the images. Pass --dataset and --data_dir.")
    rows = (_with_own(_to_row(record, layout, question, image_info, embed_images), record, form) for record in records)
    if layout.file == "parquet":
        return write_parquet(path, map(to_message_columns, rows), message_schema())
    return _write_json(path, rows, as_lines=layout.file == "lines")


def import_records(path: Path, *, check_paths: bool = True) -> Iterator[tuple[int, Record]]:
    """Yield (row or line number from 1, record) of a file in any of the formats, detected row by row.

    Args:
        path: of the file.
        check_paths: require image paths below the dataset's folder; otherwise the caller resolves them.

    Raises:
        ExchangeError: a file or row in none of them.
        ParquetError: if a Parquet file cannot be read.
    """
    try:
        open_plain(path).close()
    except FileNotFoundError as error:
        raise ExchangeError(f"{path}: no such file.") from error
    except OSError as error:
        raise ExchangeError(f"{path}: cannot be read ({error.strerror}). Pass a readable file.") from error
    rows = enumerate(read_parquet(path), 1) if path.suffix == ".parquet" else read_json(path)
    for number, row in rows:
        record = row
        try:
            if problem := check_json_value(row):
                raise ValueError(f"{problem}. Remove the row")
            record = _from_row(row)
            if problem := check_record(record, check_paths=check_paths) or _too_long(record):
                raise ValueError(f"{problem}. Correct or remove the row")
            if newer := take_version(record):
                raise ValueError(f"{newer}. {format_version.UPGRADE}")
        except ValueError as error:
            raise ExchangeError(f"{path}, row {number}: {error}.") from error
        yield number, record


def _too_long(record: Record) -> str | None:
    size = len(json.dumps(record, ensure_ascii=False).encode())
    return f"{size:,} bytes, above the limit for a line of a chain file" if size >= MAX_LINE_BYTES else None


def _checked(record: Record) -> Record:
    """Return a record whose image is below the dataset's folder.

    Raises:
        ExchangeError: for any other record.
    """
    if problem := check_record(record):
        raise ExchangeError(f"Cannot export a record: {problem}.")
    return record


# ---- rows of other projects ----


def _to_row(record: Record, layout: Format, question: str, image_info: ImageInfo | None, embed_images: bool) -> Row:
    """Return a record in another format, without its provenance."""
    path, style = record["image"], layout.style
    embed = embed_images and style.is_typed
    width, height, data = image_info(path) if image_info and (embed or "width" in layout.fields) else (0, 0, None)
    values = {
        "id": path,
        "image": path,
        "width": width,
        "height": height,
        "images": [{"bytes": data if embed else None, "path": path}] if style.is_typed else [path],
        style.turns: style.write(record.get("question", question), record["chain"]),
    }
    return {name: values[name] for name in layout.fields}


def _with_own(row: Row, record: Record, form: str) -> Row:
    """Return the row with the record's provenance and its foreign fields from an import in this format.

    Foreign fields come from the chain file, which may be untrusted: they add keys but never replace ours.

    Raises:
        ExchangeError: the record's ``foreign`` is invalid.
    """
    own = {key: value for key, value in record.items() if key not in ("image", "chain")}
    foreign = record.get("foreign")
    if isinstance(foreign, dict) and foreign.get("format") == form:
        fields, there = foreign.get("fields", {}), foreign.get("turns", [])
        is_row = isinstance(fields, dict) and isinstance(there, list) and all(isinstance(turn, dict) for turn in there)
        if not is_row:
            raise ExchangeError(f"The record of {record['image']!r} has an invalid 'foreign'. Remove that key.")
        row = row | {key: value for key, value in fields.items() if _may_be_added(key, value, form)}
        if there:
            style = FORMATS[form].style
            row[style.turns] = [
                turn | {style.content: style.answer(record["chain"])}
                if style.content in turn and turn[style.content] is None and is_answer(turn)
                else {key: _without_places(value) for key, value in turn.items()}
                for turn in there
            ]
    return row | {OWN_FIELD: own}


_RESERVED = ("image", "images", "chain", OWN_FIELD)
_MEDIA = re.compile("image|img|picture|photo|video|audio", re.IGNORECASE)


def _may_be_added(key: str, value: Any, form: str) -> bool:
    """Return whether a foreign field may be exported: not one of ours, and no path out of the folder."""
    if key in _RESERVED or key == FORMATS[form].style.turns:
        return False
    return not _MEDIA.search(key) or all(check_image_path(text) is None for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _without_places(value: Any) -> Any:
    """Return a turn's content with only the types and texts of its parts; the image's place is a field of the row."""
    if not isinstance(value, list):
        return value
    return [
        {key: part[key] for key in ("type", "text") if key in part} if isinstance(part, dict) else part
        for part in value
    ]


def _from_row(row: Any) -> Record:
    """Return the record in a row of any format.

    Raises:
        ValueError: the row contains none.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if row.get("chain") is not None:
        return row
    own = row.get(OWN_FIELD)
    if isinstance(own, str):
        try:
            own = parse_json(own)
        except ValueError as error:
            raise ValueError(f"the field {OWN_FIELD!r} is not valid JSON ({error}); remove it") from error
    try:
        name, turns = turns_of(row)
    except ValueError:
        image_of(row, [])  # report a missing image first
        raise
    image = image_of(row, turns)
    question, chain = question_and_chain(turns)
    if isinstance(own, dict):
        return {"image": image, "chain": chain, **own}
    record: Record = {"image": image, "chain": chain, "question": question}
    foreign = _foreign({key: value for key, value in row.items() if value is not None} | {name: turns}, name, record)
    try:
        json.dumps(foreign)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a value cannot be stored as JSON ({error}); remove its column") from error
    return record | ({"foreign": foreign} if foreign else {})


def _foreign(row: Row, name: str, record: Record) -> Row:
    """Return the parts of a row, with turns in that field, that our own row of the same record lacks."""
    others = {form: layout for form, layout in FORMATS.items() if layout.fields and layout.style.turns == name}
    form = next(form for form, layout in others.items() if layout.mark in row)
    style = FORMATS[form].style
    fields = {key: value for key, value in row.items() if key not in ("image", "images", style.turns, OWN_FIELD)}
    foreign: Row = {"format": form}
    if fields:
        foreign["fields"] = fields
    if _without_nulls(row[style.turns]) != _without_nulls(style.write(record["question"], record["chain"])):
        content = style.content
        foreign["turns"] = [
            turn | {content: None} if is_answer(turn) and text_of(turn.get(content)) == record["chain"] else turn
            for turn in row[style.turns]
        ]
    return foreign if len(foreign) > 1 else {}


def _without_nulls(value: Any) -> Any:
    """Return a JSON value without null keys, which are absent keys in Parquet."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _write_json(path: Path, rows: Iterable[Row], as_lines: bool) -> int:
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(b"" if as_lines else b"[")
        for row in rows:
            file.write(b"" if as_lines else b",\n" if count else b"\n")
            file.write(json.dumps(row, ensure_ascii=False).encode() + (b"\n" if as_lines else b""))
            count += 1
        file.write(b"" if as_lines else b"\n]\n")
    return count
