"""What reaches a terminal: text, whoever wrote it, never a command to the terminal or a character that it lacks.

Names of folders, classes and images, logs, chains and answers come from strangers. `printable_streams` guards whole
commands (the verbs, the launchers); `printable` guards a single text where the streams are another program's, as in
DomainBed's train script.
"""

from __future__ import annotations

import functools
import json
import locale
import logging
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# Control characters, direction marks, halves of pairs, unassigned and private ones, Unicode's line separators.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji are spelt with them
_BEYOND_ASCII = re.compile(r"[^\n\t\x20-\x7e]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Our own signs, for terminals that lack them.
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "…": "...", "±": "+/-", "×": "x", "→": "->", "←": "<-", "“": '"', "”": '"',
    "’": "'", "²": "^2", "√": "sqrt ", "·": ".", "≥": ">=", "≤": "<=",
}  # fmt: skip


class _CurrentStdout(logging.StreamHandler[Any]):
    """Writes to whatever standard output is at the moment: DomainBed's train script replaces it by its Tee."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stdout


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``name`` of this package, whose messages from INFO on are lines of standard output.

    Jobs thereby log to DomainBed's out.txt as well. A program that configures the logger ``domainbed_reasoning`` itself
    keeps its configuration.
    """
    package = logging.getLogger("domainbed_reasoning")
    if not package.handlers and package.level == logging.NOTSET:
        package.addHandler(_CurrentStdout())
        package.setLevel(logging.INFO)
        package.propagate = False
    return logging.getLogger(name)


def printable(text: str, stream: Any = None) -> str:
    r"""Return ``text`` with what a terminal obeys, hides or lacks spelt out, as in ``\x1b``; line breaks and tabs stay.

    Args:
        text: whatever it holds.
        stream: where it is to be printed, for what its encoding lacks; None spells nothing out for that.
    """
    if text.isascii() and not _BEYOND_ASCII.search(text):
        return text
    encodings = _encodings_of(stream)
    return _BEYOND_ASCII.sub(lambda found: _spelt(found[0], encodings), text)


def one_line(text: str, stream: Any = None) -> str:
    """Return ``text`` as `printable` does, its line breaks and tabs spelt out too: a name that ends no line or cell."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], printable(text, stream))


def json_line(value: Any, stream: Any = None) -> str:
    """Return a value as a line of JSON whose readers find all of it and whose terminal obeys none of it."""
    encodings = _encodings_of(stream)
    text = json.dumps(value, ensure_ascii=False)
    return _BEYOND_ASCII.sub(
        lambda found: found[0] if _spelt(found[0], encodings) == found[0] else json.dumps(found[0])[1:-1], text
    ).replace("\x7f", "\\u007f")


@functools.lru_cache(maxsize=4096)
def _spelt(char: str, encodings: tuple[str, ...]) -> str:
    if unicodedata.category(char) in _UNSEEN and char not in _JOINERS:
        return char.encode("unicode_escape").decode()
    for encoding in encodings:
        try:
            char.encode(encoding)
        except UnicodeEncodeError:
            return _PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode()
    return char


def _encodings_of(stream: Any) -> tuple[str, ...]:
    if stream is None:
        return ()
    encoding = getattr(stream, "encoding", None)
    if isinstance(encoding, str):
        return (encoding,)
    # DomainBed's own, which writes to the terminal and to a file.
    return tuple({getattr(sys.__stdout__, "encoding", None) or "utf-8", locale.getpreferredencoding(False)})


class _Printable:
    """A text stream that writes `printable` text; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``; a carriage return is a progress bar's where it begins what is written."""
        start = "\r" if text.startswith("\r") else ""
        self._stream.write(start + printable(text.removeprefix("\r"), self._stream))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Have standard output and error write printable text alone, of whatever encoding they are."""
    before = sys.stdout, sys.stderr
    if not isinstance(before[0], _Printable):
        sys.stdout, sys.stderr = (cast(TextIO, stream and _Printable(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
