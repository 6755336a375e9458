"""What a hyper-parameter may be: a test of its value, and the words that an error has for it. Standard library only.

Types are strict: true is no number, 8.0 no integer, "false" no boolean. A value that merely looks like the right one
would be read in different ways by different readers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class Allowed:
    """The values that a hyper-parameter may have.

    Attributes:
        words: after "must be", in an error.
        holds: whether a value, of any type, is one of them.
    """

    words: str
    holds: Callable[[Any], bool]


def integer(least: int) -> Allowed:
    """Return the integers from ``least`` to 2**31 - 1."""
    return Allowed(f"an integer from {least} to {_MOST}", lambda value: type(value) is int and least <= value <= _MOST)


def number(words: str, holds: Callable[[float], bool]) -> Allowed:
    """Return the finite numbers, integers among them, for which ``holds``; ``words`` follow "a number"."""

    def is_one(value: Any) -> bool:
        known = isinstance(value, int | float) and not isinstance(value, bool)
        return known and abs(value) <= sys.float_info.max and holds(value)

    return Allowed(f"a number {words}", is_one)


def one_of(*choices: str) -> Allowed:
    """Return the strings ``choices``."""
    words = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
    return Allowed(words, lambda value: isinstance(value, str) and value in choices)


def is_revision(text: str) -> bool:
    """Return whether a text can be the name of a git revision: no absolute path, none that climbs out of a folder."""
    return len(text) <= 250 and ".." not in text and re.fullmatch(r"[\w][\w./+-]*", text, re.ASCII) is not None


FLAG = Allowed("true or false", lambda value: isinstance(value, bool))
TEXT = Allowed("a non-empty string", lambda value: isinstance(value, str) and bool(value.strip()))
REVISION = Allowed(
    "a branch, tag or commit of a hub repository, or null",
    lambda value: value is None or (isinstance(value, str) and is_revision(value)),
)
TEXT_OR_NONE = Allowed("a non-empty string or null", lambda value: value is None or TEXT.holds(value))
NAMES_OR_NONE = Allowed(
    "a list of different names or null",
    lambda value: (
        value is None
        or (isinstance(value, list) and bool(value) and all(map(TEXT.holds, value)) and len(set(value)) == len(value))
    ),
)
ABOVE_0 = number("above 0", lambda value: value > 0)
FROM_0 = number("of 0 or more", lambda value: value >= 0)
FROM_0_TO_1 = number("in [0, 1]", lambda value: 0 <= value <= 1)
FROM_0_BELOW_1 = number("in [0, 1)", lambda value: 0 <= value < 1)
ABOVE_0_TO_1 = number("in (0, 1]", lambda value: 0 < value <= 1)


def check_value(name: str, value: Any, allowed: Allowed) -> None:
    """Refuse a value that a hyper-parameter may not have.

    Raises:
        ValueError: naming the hyper-parameter, what it may be, and the value.
    """
    if not allowed.holds(value):
        raise ValueError(f"hparam {name} must be {allowed.words}; got {value!r:.80}.")


def check_values(hparams: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """Refuse values that their rows do not allow; names without a row are left alone.

    Args:
        hparams: values by name.
        rows: `registry.Hparam` by name.

    Raises:
        ValueError: naming the first such hyper-parameter, what it may be, and the value.
    """
    for name, value in hparams.items():
        if name in rows:
            check_value(name, value, rows[name].allowed)


def check_votes(hparams: Mapping[str, Any]) -> None:
    """Refuse several chains that would all be the same one.

    Raises:
        ValueError: naming the hyper-parameter and the temperature that it needs.
    """
    for name, temperature in (("votes", "vote_temperature"), ("sarr_votes", "temperature")):
        if hparams.get(name, 1) > 1 and not hparams[temperature] > 0:
            raise ValueError(f"hparam {name}: {hparams[name]} greedy chains are identical; set {temperature} above 0.")
