"""The rows of a JSON lines file or of one JSON array, one in memory at a time, each with its place in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from domainbed_reasoning.chains.record import parse_json, parse_json_at
from domainbed_reasoning.files.plain import open_plain_text

# A row is one chain and its surroundings; a row this long is another kind of file.
MAX_ROW_CHARACTERS = 8 << 20
_PART_CHARACTERS = 1 << 20


class ExchangeError(ValueError):
    """A file that cannot be read or written in this format; the message names the file, the row and the cure."""


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value): of a line its number, blank ones counted, of an array's item its position.

    Raises:
        ExchangeError: it is neither, naming the line, or the item and the character where it is broken.
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
                    raise ValueError(f"longer than {MAX_ROW_CHARACTERS} characters")
                if line.strip():
                    yield number, parse_json(line)
    except ExchangeError:
        raise
    except ValueError as error:
        raise ExchangeError(
            f"{place}: neither JSON lines nor a JSON array ({error}). Give a file in one of the formats of `export`."
        ) from error


def _read_array(text: str, at: int, file: IO[str], place: str) -> Iterator[tuple[int, Any]]:
    """Yield the numbered items of a JSON array whose opening bracket has been read.

    Raises:
        ExchangeError: it is none.
    """
    number, before = 1, 0  # characters of the file before ``text``

    def broken(fault: str, where: int) -> ExchangeError:
        cure = "Correct this row, or remove it."
        return ExchangeError(f"{place}, row {number}, character {before + where + 1}: {fault}. {cure}")

    while True:
        fault, where = "the array does not end", len(text)
        at = _after_space(text, at)
        if text.startswith("]", at):
            if text[at + 1 :].strip() or file.read(_PART_CHARACTERS).strip():
                raise broken("text stands after the array", at + 1)
            return
        begin = at if number == 1 else _after_space(text, at + 1)
        if at < len(text) and number > 1 and text[at] != ",":
            raise broken(f"a comma is wanted, not {text[at : at + 20]!r}", at)
        if begin < len(text):
            if text[begin] != "{":
                raise broken(f"an array of objects is wanted, not {text[begin : begin + 20]!r}", begin)
            try:
                value, at = parse_json_at(text, begin)
            except json.JSONDecodeError as error:  # perhaps its end has not been read yet
                fault, where = error.msg, error.pos
            except ValueError as error:
                raise broken(str(error), begin) from error
            else:
                yield number, value
                number += 1
                continue
        more = file.read(_PART_CHARACTERS) if len(text) - at <= MAX_ROW_CHARACTERS else ""
        if not more:
            raise broken(fault, where)
        before += at
        text, at = text[at:] + more, 0


def _after_space(text: str, at: int) -> int:
    """Return the place of the first character from ``at`` on that is not JSON's white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
