"""Sampling parameters of a server: servers accept different ones, and many reject unknown parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from domainbed_reasoning.annotate.teacher import Request, TeacherError

OMITTABLE = ("seed", "top_p", "temperature", "max_tokens")

# Models that require max_completion_tokens and accept no sampling settings, by the last part of their name.
_REASONING_MODEL = re.compile(r"(?:o[134]|gpt-5)(?![0-9A-Za-z])")
_LIMITS = ("max_tokens", "max_completion_tokens")
_NAMES = {
    "seed": r"(?:random_?)?seed",
    "top_p": r"top_?p",
    "temperature": r"temperature",
    **dict.fromkeys(_LIMITS, r"max_?(?:completion_?|output_?|new_?)?tokens"),
}
# About a limit: its value is invalid, not the parameter.
_VALUE_ERROR = re.compile(
    r"too (?:large|big|high|many|small|low)|maximum|minimum|at (?:most|least)|exceed"
    r"|(?:less|greater|larger|smaller) than|context (?:length|window)|out of range|must be positive",
    re.IGNORECASE,
)


class Parameters:
    """The parameters that one server accepts.

    Args:
        model: the server's name of the model, possibly with a prefix (``openai/gpt-5-mini``).
        omitted: names among `OMITTABLE` that are not sent.
        needs_limit: the number of new tokens must be limited, as otherwise the cost of an answer has no bound.
    """

    def __init__(self, model: str, omitted: tuple[str, ...] = (), needs_limit: bool = False):
        reasons = bool(_REASONING_MODEL.match(model.rpartition("/")[2]))
        self._limits = list(reversed(_LIMITS) if reasons else _LIMITS)  # the first is sent
        self._sampling = [name for name in ("seed", "top_p", "temperature") if name == "seed" or not reasons]
        self._sampling = [name for name in self._sampling if name not in omitted]
        if "max_tokens" in omitted:
            self._limits = []
        self._needs_limit = needs_limit

    def of(self, request: Request) -> dict[str, Any]:
        """Return the request's settings to be sent, by the server's names."""
        sent = {name: getattr(request, name) for name in self._sampling}
        return sent | dict.fromkeys(self._limits[:1], request.max_tokens)

    @staticmethod
    def omitted(sent: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the settings, by their names in `Request`, that are not among those sent."""
        settings = {"max_tokens" if name in _LIMITS else name for name in sent}
        return tuple(name for name in OMITTABLE if name not in settings)

    def adapt(self, sent: Mapping[str, Any], refusal: str) -> str | None:
        """Omit or rename the first parameter that a server's error names.

        Args:
            sent: the rejected settings, from `of`.
            refusal: the body of its response.

        Returns:
            A description of the change; empty if the error of another request already caused it; None if the error
            names no parameter.

        Raises:
            TeacherError: the server accepts no token limit, and one is required.
        """
        names = [name for name in sent if re.search(_word(_NAMES[name]), _blamed(refusal), re.IGNORECASE)]
        names = [name for name in names if name not in _LIMITS or not _VALUE_ERROR.search(refusal)]
        if not names:
            return None
        if any(name not in (*self._sampling, *self._limits[:1]) for name in names):
            return ""
        name = names[0]
        if name in self._sampling:
            self._sampling.remove(name)
            return f"{name} is omitted from now on"
        self._limits.pop(0)
        if self._limits:
            return f"{self._limits[0]} is sent instead of {name} from now on"
        if self._needs_limit:
            raise TeacherError(
                "The server accepts neither max_tokens nor max_completion_tokens, so --max-cost cannot bound the cost "
                "of an answer. Run without --max-cost, or use another server."
            )
        return f"{name} is omitted from now on, so the server's own limit applies"


def _word(pattern: str) -> str:
    return rf"(?<![A-Za-z0-9_])(?:{pattern})(?![A-Za-z0-9_])"


def _blamed(refusal: str) -> str:
    """Return what an error blames: the parameter it points to, if any, else its text."""
    try:
        body = json.loads(refusal)
        pointed = " ".join(text for text in _walk(body, pointers=True) if text not in ("", "body"))
        return pointed or " ".join(_walk(body, pointers=False))
    except (ValueError, RecursionError):
        return refusal


def _walk(value: Any, pointers: bool) -> Iterator[str]:
    """Yield the strings in a JSON value except the echoed request, or only those that point to a field."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("param", "loc"):
                yield from map(str, item if isinstance(item, list) else [item] if pointers and item else [])
            elif key not in ("input", "ctx"):
                yield from _walk(item, pointers)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, pointers)
    elif isinstance(value, str) and not pointers:
        yield value
