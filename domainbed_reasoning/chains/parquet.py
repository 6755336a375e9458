"""Chains in Parquet files: our own columns, and Hugging Face's `messages` and `images`. Requires pyarrow.

Fields without a column are stored as JSON in the column `extra`.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from domainbed_reasoning.chains.conversations import to_typed
from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files import confined
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.files.plain import open_plain

Row = dict[str, Any]

# The field that stores our provenance in other formats.
OWN_FIELD = "domainbed_reasoning"

# Rows in memory at a time: when writing our own files, and when reading any file.
_ROWS = 2048
_ROWS_READ = 64

# Limits for reading a file. Our own files compress to a tenth of their content, those of equal chains to a hundredth.
_MEMORY = 2 << 30
_LEAST_BYTES = 64 << 20
_MOST_PACKED = 200
_ROW_BYTES = 200  # overhead per row, in addition to its content
_MAX_ROW_BYTES = 32 << 20
_MAX_COLUMNS = 10_000
_BYTES_A_SECOND = 1_000_000
_BOUNDS = {"thrift_string_size_limit": 16 << 20, "thrift_container_size_limit": 1 << 20}
_TOO_LARGE = "it expands to far more data than its size suggests, beyond the memory or time limit"


class ParquetError(ValueError):
    """A Parquet file that cannot be read, or pyarrow is not installed."""


# Our own columns; every other key of a record, and a value of another type, is in `extra` as JSON.
_COLUMNS: dict[str, type] = {
    "image": str,
    "chain": str,
    "verdict": str,
    "rule": str,
    "reason": str,
    "attempt": int,
    "teacher": str,
    "model": str,
    "prompt_version": str,
    "sha256": str,
    "label_conditioned": bool,
    "verified": bool,
    "finish": str,
    "seconds": float,
    "time": str,
}


# How Hugging Face's `datasets` reads a `messages` file: without it images would be structs, which no collator takes.
_TEXT = {"dtype": "string", "_type": "Value"}
_FEATURES = {
    "messages": [{"role": _TEXT, "content": [{"type": _TEXT, "text": _TEXT}]}],
    "images": [{"_type": "Image"}],
    OWN_FIELD: _TEXT,
    "extra": _TEXT,
}


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ParquetError(
            "Parquet files require pyarrow, which is not installed. Run pip install 'domainbed-reasoning[parquet]'."
        ) from error
    return pyarrow


def own_schema() -> Any:
    """Return the schema of our own Parquet files."""
    arrow = _pyarrow()
    types = {str: arrow.string(), int: arrow.int64(), bool: arrow.bool_(), float: arrow.float64()}
    return arrow.schema([(name, types[kind]) for name, kind in _COLUMNS.items()] + [("extra", arrow.string())])


def message_schema() -> Any:
    """Return the schema of the `messages` files."""
    arrow = _pyarrow()
    part = arrow.struct([("type", arrow.string()), ("text", arrow.string())])
    turn = arrow.struct([("role", arrow.string()), ("content", arrow.list_(part))])
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = [("messages", arrow.list_(turn)), ("images", arrow.list_(image)), (OWN_FIELD, arrow.string())]
    told = {"huggingface": json.dumps({"info": {"features": _FEATURES}})}
    return arrow.schema([*columns, ("extra", arrow.string())], metadata=told)


def to_columns(record: Mapping[str, Any]) -> Row:
    """Return a record as a row of our own files."""
    row: Row = dict.fromkeys(_COLUMNS)
    extra = {}
    for key, value in record.items():
        if key in _COLUMNS and type(value) is _COLUMNS[key] and (type(value) is not int or abs(value) < 1 << 63):
            row[key] = value
        else:
            extra[key] = value
    return row | {"extra": json.dumps(extra, ensure_ascii=False) if extra else None}


def to_message_columns(row: Mapping[str, Any]) -> Row:
    """Return a `messages` row with typed turns, and fields without a column as JSON."""
    extra = {key: value for key, value in row.items() if key not in _FEATURES}
    return {
        "messages": to_typed(row["messages"]),
        "images": row["images"],
        OWN_FIELD: json.dumps(row[OWN_FIELD], ensure_ascii=False),
        "extra": json.dumps(extra, ensure_ascii=False) if extra else None,
    }


def write_parquet(path: Path, rows: Iterable[Row], schema: Any) -> int:
    """Write rows atomically and return their number."""
    arrow = _pyarrow()
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _ROWS:
                writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema))
                count += len(batch)
                batch = []
        writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema))
        count += len(batch)
    return count


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, ours or another's, without null columns.

    A child process with bounded memory decodes the file: a few kilobytes can expand to gigabytes.

    Raises:
        ParquetError: if it is not a readable Parquet file, or exceeds the bounds on memory and time.
    """
    _pyarrow()
    fix = "Write it again, or pass another file."
    try:
        open_plain(path).close()
    except OSError as error:
        raise ParquetError(f"{path}: cannot be read ({error.strerror}). Pass a readable file.") from error
    with confined.child(__name__, str(path), ARROW_DEFAULT_MEMORY_POOL="system") as process:
        answers: Any = process.stdout
        while True:
            try:
                answer = pickle.load(answers)  # of our own process
            except (EOFError, pickle.UnpicklingError):
                failed = f"its reader failed with exit code {process.wait()}"
                raise ParquetError(f"{path}: {_TOO_LARGE if process.returncode < 0 else failed}. {fix}") from None
            if answer is None:
                return
            if isinstance(answer, str):
                raise ParquetError(f"{path}: {answer}. {fix}")
            try:
                row = _from_columns(answer)
            except ParquetError as error:
                raise ParquetError(f"{path}: not a readable Parquet file ({error}). {fix}") from error
            yield row


def read_features(path: Path) -> Row:
    """Return what Hugging Face's `datasets` recorded of a file's columns, by name; {} if nothing.

    Raises:
        ParquetError: as `read_parquet`.
    """
    _pyarrow()
    with confined.child(__name__, str(path), "features", ARROW_DEFAULT_MEMORY_POOL="system") as process:
        answers: Any = process.stdout
        try:
            answer = pickle.load(answers)  # of our own process
            told = answer if isinstance(answer, str) else parse_json(answer.decode()) if answer else {}
        except (EOFError, pickle.UnpicklingError, ValueError):
            told = "not a readable Parquet file"
    if isinstance(told, str):
        raise ParquetError(f"{path}: {told}. Write it again, or pass another file.")
    features = told.get("info", {}).get("features", {}) if isinstance(told, dict) else {}
    return features if isinstance(features, dict) else {}


def in_child(path: str, wanted: str = "rows") -> None:
    """Write the rows of a file to the parent process, then None or an error message; or its ``features``."""
    answers = confined.take_output()
    arrow = _pyarrow()
    with open_plain(path) as content:
        size = os.fstat(content.fileno()).st_size
        confined.limit(_MEMORY, 60 + size // _BYTES_A_SECOND)
        left = _LEAST_BYTES + _MOST_PACKED * size
        try:
            if wanted == "features":
                with arrow.parquet.ParquetFile(content, **_BOUNDS) as file:
                    pickle.dump((file.schema_arrow.metadata or {}).get(b"huggingface", b""), answers)
                answers.flush()
                return
            for row in _rows(arrow, content):
                data = pickle.dumps(row)
                left -= len(data) + _ROW_BYTES
                if left < 0 or len(data) > _MAX_ROW_BYTES:
                    raise MemoryError
                answers.write(data)
            answer = None
        except MemoryError:
            answer = _TOO_LARGE
        except Exception as error:  # damaged files make the library raise anything
            memory = isinstance(error, arrow.ArrowMemoryError)
            detail = f"{type(error).__name__}: {str(error):.300}"
            answer = _TOO_LARGE if memory else f"not a readable Parquet file ({detail})"
        pickle.dump(answer, answers)
        answers.flush()


def _rows(arrow: Any, content: BinaryIO) -> Iterator[Row]:
    with arrow.parquet.ParquetFile(content, pre_buffer=False, buffer_size=1 << 20, **_BOUNDS) as file:
        if file.metadata.num_columns > _MAX_COLUMNS:
            raise ParquetError(f"it has {file.metadata.num_columns:,} columns")
        for batch in file.iter_batches(_ROWS_READ, use_threads=False):
            yield from batch.to_pylist()


def _from_columns(row: Mapping[str, Any]) -> Row:
    out = {key: value for key, value in row.items() if value is not None and key != "extra"}
    extra = row.get("extra")
    if not isinstance(extra, str):  # another's column of that name
        return out if extra is None else out | {"extra": extra}
    try:
        more = parse_json(extra) if extra else {}
    except ValueError as error:
        raise ParquetError(f"the column 'extra' is not valid JSON ({error})") from error
    if not isinstance(more, dict):
        raise ParquetError(f"the column 'extra' must contain a JSON object, got {extra:.40}")
    return out | more
