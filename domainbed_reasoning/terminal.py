"""Safe terminal output: control characters and characters that the encoding lacks are escaped.

Names of folders, classes and images, logs, chains and answers are untrusted. `printable_streams` wraps the streams of
the verbs and the launchers; `printable` escapes a single text where another program owns the streams, as in DomainBed's
train script.
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

# Control and format characters, surrogates, private and unassigned ones, line separators.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # required by Persian, Indic scripts and emoji
_BEYOND_ASCII = re.compile(r"[^\n\t\x20-\x7e]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# ASCII replacements for characters in our own messages.
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "…": "...", "±": "+/-", "×": "x", "→": "->", "←": "<-", "“": '"', "”": '"',
    "’": "'", "²": "^2", "√": "sqrt ", "·": ".", "≥": ">=", "≤": "<=",
}  # fmt: skip


class _CurrentStdout(logging.StreamHandler[Any]):
    """Writes to whatever standard output is at the moment: DomainBed's train script replaces it by its Tee."""

    to_stderr = False

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr if self.to_stderr else sys.stdout


@contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Send this package's log lines to standard error, as standard output is for JSON."""
    before, _CurrentStdout.to_stderr = _CurrentStdout.to_stderr, True
    try:
        yield
    finally:
        _CurrentStdout.to_stderr = before


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
    r"""Return ``text`` with control and unencodable characters escaped, as in ``\x1b``; line breaks and tabs stay.

    Args:
        text: untrusted text.
        stream: the stream it is printed to, whose encoding decides what is unencodable; None: everything is encodable.
    """
    if text.isascii() and not _BEYOND_ASCII.search(text):
        return text
    encodings = _encodings_of(stream)
    return _BEYOND_ASCII.sub(lambda found: _escaped(found[0], encodings), text)


def one_line(text: str, stream: Any = None) -> str:
    """Return ``text`` as `printable` does, with line breaks and tabs escaped as well."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], printable(text, stream))


def json_line(value: Any, stream: Any = None) -> str:
    """Return ``value`` as one line of JSON without control characters; parsing it gives the value back."""
    encodings = _encodings_of(stream)
    text = json.dumps(value, ensure_ascii=False)
    return _BEYOND_ASCII.sub(
        lambda found: found[0] if _escaped(found[0], encodings) == found[0] else json.dumps(found[0])[1:-1], text
    ).replace("\x7f", "\\u007f")


@functools.lru_cache(maxsize=4096)
def _escaped(char: str, encodings: tuple[str, ...]) -> str:
    if unicodedata.category(char) in HIDDEN and char not in _JOINERS:
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
    # DomainBed's Tee, which writes to the terminal and to a file.
    return tuple({getattr(sys.__stdout__, "encoding", None) or "utf-8", locale.getpreferredencoding(False)})


class _Printable:
    """A text stream that writes `printable` text and otherwise behaves as the wrapped stream."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``; a leading carriage return, as of a progress bar, is kept."""
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
    """Make standard output and error write only `printable` text."""
    before = sys.stdout, sys.stderr
    if not isinstance(before[0], _Printable):
        sys.stdout, sys.stderr = (cast(TextIO, stream and _Printable(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal and nothing else; DomainBed's Tee also writes to a file."""
    is_tty = getattr(stream, "isatty", None)
    return bool(is_tty and is_tty())


def counted(count: int, noun: str) -> str:
    """Return ``"1 image"`` or ``"2 images"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
