"""Validation of the records in a chain file, which may come from untrusted sources.

Records that pass can be counted, shown, exported and trained on without further checks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from domainbed_reasoning.files import format_version

VERSION = 2  # of a chain file's lines, see `format_version`

ACCEPTED = "accepted"
REJECTED = "rejected"

# A chain has a few hundred tokens; a file with longer lines is not a chain file.
MAX_LINE_BYTES = 1 << 20

# Lists and objects within each other: our own records have 3 levels; Python's JSON gives up near 1000.
MAX_DEPTH = 64

Record = dict[str, Any]

# Types of the optional keys, where present and not null.
_KINDS: dict[str, tuple[type, ...]] = {
    format_version.KEY: (int,),
    "raw": (str,),
    "normalized": (list,),
    "rule": (str,),
    "reason": (str,),
    "attempt": (int,),
    "teacher": (str,),
    "model": (str,),
    "prompt_version": (str,),
    "question": (str,),
    "sha256": (str,),
    "finish": (str,),
    "time": (str,),
    "label_conditioned": (bool,),
    "verified": (bool,),
    "seconds": (int, float),
    "usage": (dict,),
    "sampling": (dict,),
}
_USAGE: dict[str, tuple[type, ...]] = {
    "prompt_tokens": (int,),
    "completion_tokens": (int,),
    "dollars": (int, float),
}
_MOST = 1 << 53  # largest integer that all JSON parsers represent exactly


class ChainFileError(ValueError):
    """An invalid chain file; the message gives file, line, problem and fix."""

    def __init__(self, path: str | os.PathLike[str], line: int | None, problem: str, fix: str):
        place = f"{os.fspath(path)}, line {line}" if line else os.fspath(path)
        super().__init__(f"{place}: {problem}. {fix}")
        self.path = os.fspath(path)
        self.line = line


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is invalid, or JSON parsers disagree on it: duplicate keys, NaN or infinite numbers, or
            unbounded nesting.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def parse_json_at(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that starts at ``text[at]``, and the position after it.

    Raises:
        json.JSONDecodeError: if it is invalid or incomplete.
        ValueError: as `parse_json`.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice[:40]!r} in an object")
    return value


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite_number)


def is_accepted(record: Mapping[str, Any]) -> bool:
    """Return whether a candidate is accepted, which is the default of ``verdict``."""
    return bool(record.get("verdict", ACCEPTED) == ACCEPTED)


def take_version(record: Record) -> str:
    """Remove the format's version from a valid record; return what is wrong if it is newer than `VERSION`, else empty.

    The version is of the line, not of the record: writers add the current one.
    """
    return format_version.newer_than(VERSION, record.pop(format_version.KEY, None))


def check_record(record: Any, walk: bool = True, check_paths: bool = True) -> str | None:
    r"""Return a record's problem; None if it is valid.

    Args:
        record: parsed value of a line.
        walk: also run `check_json_value`.
        check_paths: require an image path below the dataset's folder; otherwise any string is valid.
    """
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    for key in ("image", "chain"):
        if key not in record:
            return f"the key {key!r} is missing"
        if not isinstance(record[key], str):
            return f"{key!r} must be a string, got {type(record[key]).__name__}"
    verdict = record.get("verdict", ACCEPTED)
    if verdict not in (ACCEPTED, REJECTED):
        return f"'verdict' must be {ACCEPTED!r} or {REJECTED!r}, got {verdict!r:.80}"
    if walk and (problem := check_json_value(record)):
        return problem
    return (
        _check_types(record, _KINDS)
        or _check_types(record.get("usage") or {}, _USAGE)
        or (check_image_path(record["image"]) if check_paths else None)
    )


def _check_types(record: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> str | None:
    for key in kinds.keys() & record.keys():
        value, wanted = record[key], kinds[key]
        if value is None:
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            return f"{key!r} must be {' or '.join(kind.__name__ for kind in wanted)}, got {value!r:.80}"
        if isinstance(value, int | float) and not 0 <= value <= _MOST:
            return f"{key!r} must be a number from 0 to 2**53, got {str(value):.40}"
    return None


def check_image_path(image: str) -> str | None:
    """Return why ``image`` is not a path below a dataset's folder; None if it is."""
    parts = image.split("/")
    if image.startswith("/") or "\\" in image or parts[0].endswith(":"):
        return f"the image path {image!r} must be below the dataset's folder and use '/'"
    if "" in parts or "." in parts or ".." in parts:
        return f"the image path {image!r} must not contain '..', '.' or empty parts"
    return None


def check_json_value(value: Any) -> str | None:
    """Return a problem of a JSON value: NULs, lone surrogates or nesting deeper than `MAX_DEPTH`; None without one."""
    level = [value]
    for _ in range(MAX_DEPTH):
        texts = [item for item in level if isinstance(item, str)]
        texts += [key for item in level if isinstance(item, dict) for key in item]
        if any("\0" in text or any("\ud800" <= char <= "\udfff" for char in text) for text in texts):
            return "it contains a NUL character or a lone surrogate"
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return None
    return f"lists or objects are nested more than {MAX_DEPTH} deep"
