"""Reads the rows of a JSON Lines file or a JSON array one at a time, with their positions in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from domainbed_reasoning.chains.record import parse_json, parse_json_at
from domainbed_reasoning.files.plain import open_plain_text

# A row is one chain and its metadata; a file with longer rows is not a chain file.
MAX_ROW_CHARACTERS = 8 << 20
_PART_CHARACTERS = 1 << 20


class ExchangeError(ValueError):
    """A file that cannot be read or written in this format; the message gives file, row and fix."""


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value): of a line its number, blank ones counted, of an array's item its position.

    Raises:
        ExchangeError: if it is neither; the message gives the line, or the item and character.
    """
    place = str(path)
    try:
        with open_plain_text(path, "utf-8-sig", newline="\n") as file:
            start = file.read(_PART_CHARACTERS)
            bracket = _after_space(start, 0)
            if start.startswith("[", bracket):
                yield from _read_array(start, bracket + 1, file, place)
                return
            file.seek(0)
            number = 0
            # Not splitlines(): a text may hold U+2028, which JSON leaves as it is.
            while line := file.readline(MAX_ROW_CHARACTERS):
                number += 1
                place = f"{path}, line {number}"
                if len(line) == MAX_ROW_CHARACTERS:
                    raise ValueError(f"longer than {MAX_ROW_CHARACTERS:,} characters")
                if line.strip():
                    yield number, parse_json(line)
    except ExchangeError:
        raise
    except ValueError as error:
        raise ExchangeError(
            f"{place}: neither JSON Lines nor a JSON array ({error}). Pass a file in one of the formats of `export`."
        ) from error


def _read_array(text: str, at: int, file: IO[str], place: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered items of a JSON array whose opening bracket has been read.

    Raises:
        ExchangeError: if it is not a valid array.
    """
    number, before = 1, 0  # characters of the file before ``text``

    def broken(problem: str, where: int) -> ExchangeError:
        position = f"{place}, row {number}, character {before + where + 1}"
        return ExchangeError(f"{position}: {problem}. Correct or remove this row.")

    while True:
        problem, where = "unterminated array", len(text)
        at = _after_space(text, at)
        if text.startswith("]", at):
            if text[at + 1 :].strip() or file.read(_PART_CHARACTERS).strip():
                raise broken("unexpected text after the array", at + 1)
            return
        begin = at if number == 1 else _after_space(text, at + 1)
        if at < len(text) and number > 1 and text[at] != ",":
            raise broken(f"expected a comma, got {text[at : at + 20]!r}", at)
        if begin < len(text):
            if text[begin] != "{":
                raise broken(f"expected an array of objects, got {text[begin : begin + 20]!r}", begin)
            try:
                value, at = parse_json_at(text, begin)
            except json.JSONDecodeError as error:  # or the rest has not been read yet
                problem, where = error.msg, error.pos
            except ValueError as error:
                raise broken(str(error), begin) from error
            else:
                yield number, value
                number += 1
                continue
        more = file.read(_PART_CHARACTERS) if len(text) - at <= MAX_ROW_CHARACTERS else ""
        if not more:
            raise broken(problem, where)
        before += at
        text, at = text[at:] + more, 0


def _after_space(text: str, at: int) -> int:
    """Return the position of the first character from ``at`` on that is not JSON whitespace."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
