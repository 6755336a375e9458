"""One line of a chain file: what it may hold, whoever wrote it.

Files come from strangers. What is accepted here can be counted, shown, exported and trained on without a further look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

ACCEPTED = "accepted"
REJECTED = "rejected"

# A chain has some hundred tokens; a line this long is another kind of file.
MAX_LINE_BYTES = 1 << 20

# Lists and objects within each other: our own records have 3 levels; Python's JSON gives up near 1000.
MAX_DEPTH = 64

Record = dict[str, Any]

# What the readers of a record count on: the kind of a key's value, where it is there and not null.
_KINDS: dict[str, tuple[type, ...]] = {
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
_MOST = 1 << 53  # JSON's readers agree on integers up to here


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none, or one that readers disagree on: a key that stands twice in an object, a number that is
            none or too large, or nesting without end.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("lists or objects nested without end") from None


def parse_json_at(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that begins at ``text[at]``, and the place after it.

    Raises:
        json.JSONDecodeError: there is none, or not all of it.
        ValueError: as `parse_json`.
    """
    try:
        return _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("lists or objects nested without end") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return value


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite_number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite_number)


def check_record(record: Any, walk: bool = True, check_paths: bool = True) -> str | None:
    r"""Return what is wrong with a line's value, None if nothing is.

    Args:
        record: what the line says.
        walk: look into everything that it holds, for NULs and lone surrogates, which only a ``\u`` escape can bring
            into JSON, and for lists and objects nested deeper than `MAX_DEPTH`.
        check_paths: the image's path must be one below a dataset's folder; else it may be any text.
    """
    if not isinstance(record, dict):
        return f"a JSON object is wanted, not {type(record).__name__}"
    for key in ("image", "chain"):
        if key not in record:
            return f"the key {key!r} is missing"
        if not isinstance(record[key], str):
            return f"{key!r} must be a string, not {type(record[key]).__name__}"
    verdict = record.get("verdict", ACCEPTED)
    if verdict not in (ACCEPTED, REJECTED):
        return f"'verdict' must be {ACCEPTED!r} or {REJECTED!r}, not {verdict!r:.80}"
    if walk and (fault := check_json_value(record)):
        return fault
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
            return f"{key!r} must be {' or '.join(kind.__name__ for kind in wanted)}, not {value!r:.80}"
        if isinstance(value, int | float) and not 0 <= value <= _MOST:
            return f"{key!r} must be a number from 0 to 2**53, not {str(value):.40}"
    return None


def check_image_path(image: str) -> str | None:
    """Return why ``image`` is no path below a dataset's folder, None if it is one."""
    parts = image.split("/")
    if image.startswith("/") or "\\" in image or parts[0].endswith(":"):
        return f"the image path {image!r} must be below the dataset's folder and use '/'"
    if "" in parts or "." in parts or ".." in parts:
        return f"the image path {image!r} must not climb or have empty steps"
    return None


def check_json_value(value: Any) -> str | None:
    """Return what in a JSON value no file should hold: NULs, lone surrogates, nesting deeper than `MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        texts = [item for item in level if isinstance(item, str)]
        texts += [key for item in level if isinstance(item, dict) for key in item]
        if any("\0" in text or any("\ud800" <= char <= "\udfff" for char in text) for text in texts):
            return "it holds a NUL or half of a surrogate pair, which is no text"
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return None
    return f"lists or objects are nested more than {MAX_DEPTH} deep"
