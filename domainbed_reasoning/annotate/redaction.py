"""Removes the API key, in whole, in part or encoded, from messages, logs and records."""

from __future__ import annotations

import base64
import functools
import logging
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# A run of a key's characters of this length counts as the key.
RUN = 8
# Placeholder keys from servers' documentation are not secrets, and some are words that chains contain.
_PLACEHOLDERS = {"empty", "none", "dummy", "ollama", "lm-studio", "no-key", "not-needed", "sk-no-key-required"}

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# One character of a text, literal or as escaped in URLs, JSON, Python or HTML.
_CHARACTER = re.compile(
    r"%([0-9a-f]{2})|\\u([0-9a-f]{4})|\\x([0-9a-f]{2})|&#x([0-9a-f]{2,4});|&#([0-9]{2,4});|\\(.)|(.)",
    re.DOTALL | re.IGNORECASE,
)


def redact(message: Any, secret: str) -> str:
    """Return a text with ``[key]`` in place of every run of `RUN` or more characters of the key.

    Runs are found in any case, URL-encoded, escaped as in JSON, Python or HTML, and as base64 or hexadecimal digits.
    Redact before truncating: a truncated key may leave less than a run at the end.

    Args:
        message: for example, a server's response.
        secret: the key; nothing is hidden if it has less than four characters or is a placeholder such as ``EMPTY``.
    """
    text = str(message)
    if len(secret) < 4 or secret.lower() in _PLACEHOLDERS:
        return text
    if len(secret) < RUN:
        return text.replace(secret, "[key]")
    needles = _needles(secret)
    text = _without(text, text.translate(_LOWER), range(len(text) + 1), needles)
    if re.search(r"[%\\]|&#", text):
        characters, places = _decoded(text)
        text = _without(text, characters.translate(_LOWER), places, needles)
    return text


@functools.lru_cache(maxsize=4)
def _needles(secret: str) -> tuple[str, ...]:
    """Return every run of the key, as it is and encoded, in lower case."""
    return tuple(dict.fromkeys(needle.translate(_LOWER) for needle in _written(secret)))


def _written(secret: str) -> Iterator[str]:
    for start in range(len(secret) - RUN + 1):
        run = secret[start : start + RUN]
        yield run
        yield run.encode().hex()
        # Of base64, only the part that does not depend on the text before or after the run.
        for shift in range(3):
            coded = base64.b64encode(bytes(shift) + run.encode()).decode()
            sure = coded[-(-8 * shift // 6) : 8 * (shift + RUN) // 6]
            yield sure
            yield sure.translate(str.maketrans("+/", "-_"))


def _decoded(text: str) -> tuple[str, list[int]]:
    """Return a text with its escapes decoded, and where in ``text`` each character begins (and the last one ends)."""
    characters, places = [], []
    for found in _CHARACTER.finditer(text):
        percent, four, two, html, decimal, escaped, plain = found.groups()
        code = percent or four or two or html
        characters.append(chr(int(code, 16)) if code else chr(int(decimal)) if decimal else escaped or plain)
        places.append(found.start())
    return "".join(characters), [*places, len(text)]


def _without(text: str, searched: str, places: Sequence[int], needles: Iterable[str]) -> str:
    """Return ``text`` without what ``needles`` match in ``searched``, whose characters begin at ``places``."""
    covered: list[tuple[int, int]] = []
    for needle in needles:
        at = searched.find(needle)
        while at >= 0:
            covered.append((places[at], places[at + len(needle)]))
            at = searched.find(needle, at + 1)
    parts: list[str] = []
    end = 0
    for first, last in sorted(covered):
        if first > end or not parts:
            parts += [text[end:first], "[key]"]
        end = max(end, last)
    return "".join([*parts, text[end:]])


class LogRedaction(logging.Filter):
    """Redacts the key from libraries' logs of a server's headers and status lines, while installed.

    Args:
        secret: the key.
    """

    def __init__(self, secret: str):
        super().__init__()
        self._secret = secret
        self._handlers = [*logging.getLogger().handlers, *filter(None, [logging.lastResort])]
        for handler in self._handlers:
            handler.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record."""
        record.msg, record.args = redact(record.getMessage(), self._secret), ()
        return True

    def remove(self) -> None:
        """Restore the logging configuration."""
        for handler in self._handlers:
            handler.removeFilter(self)
