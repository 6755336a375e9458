"""Reads the files of a job's folder, line by line or whole; problems are collected, not raised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from domainbed_reasoning.files.plain import open_plain_text, read_plain_text

RESULTS = "results.jsonl"
PREDICTIONS = "predictions.jsonl"
_MAX_BYTES, _MAX_LINE = 1 << 28, 1 << 20  # a record has some thousand characters
_OF_ANY_SIZE = (PREDICTIONS,)  # a line per image of the dataset


def is_own_file(path: Path) -> bool:
    """Return whether it is a regular file, and not a link to one outside of the job's folder."""
    return path.is_file() and (not path.is_symlink() or path.resolve().is_relative_to(path.parent.resolve()))


def _is_there(path: Path, damage: list[str]) -> bool:
    """Return whether there is a file to read; if it is not a regular file or too large, add that to ``damage``."""
    if not os.path.lexists(path):
        return False
    if not is_own_file(path):
        damage.append(f"{path.name} is not a regular file in this folder")
    elif path.name not in _OF_ANY_SIZE and path.stat().st_size > _MAX_BYTES:
        damage.append(f"{path.name} is larger than {_MAX_BYTES:,} bytes")
    else:
        return True
    return False


def numbered_lines(path: Path, damage: list[str]) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file, none if it does not exist; read errors are added to ``damage``."""
    try:
        if not _is_there(path, damage):
            return
        with open_plain_text(path, errors="replace") as file:
            number = 0
            while line := file.readline(_MAX_LINE):
                number += 1
                if len(line) == _MAX_LINE:
                    damage.append(f"{path.name}, line {number}: longer than {_MAX_LINE:,} characters")
                    return
                yield number, line
    except OSError as error:
        damage.append(f"{path.name} cannot be read ({error.strerror})")


def read_object(
    path: Path, problem_of: Callable[[Mapping[str, Any]], str], damage: list[str]
) -> Mapping[str, Any] | None:
    """Return the JSON object in a file, None if there is none; problems are added to ``damage``."""
    try:
        if not _is_there(path, damage):
            return None
        value = json.loads(read_plain_text(path))
    except OSError as error:
        damage.append(f"{path.name} cannot be read ({error.strerror})")
        return None
    except (ValueError, RecursionError) as error:
        damage.append(f"{path.name} is not valid JSON ({str(error):.60})")
        return None
    problem = problem_of(value) if isinstance(value, dict) else "not a JSON object"
    if problem:
        damage.append(f"{path.name}: {problem}")
    return None if problem else value
