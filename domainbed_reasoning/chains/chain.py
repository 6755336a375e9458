"""The five-stage reasoning chain: parse, render, validate, read the conclusion.

RD-MLDG (ICLR 2026, arXiv 2602.23777) pairs every image with a chain of LLaVA-CoT's stages plus REFLECTION:
``<SUMMARY>…</SUMMARY> <CAPTION>…</CAPTION> <REASONING>…</REASONING> <REFLECTION>…</REFLECTION>
<CONCLUSION>class name</CONCLUSION>``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

STAGES = ("SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION")
STAGE_TAGS = tuple(tag for stage in STAGES for tag in (f"<{stage}>", f"</{stage}>"))
END_OF_CHAIN = "</CONCLUSION>"

_TAG = re.compile("|".join(map(re.escape, STAGE_TAGS)))


class ChainError(ValueError):
    """A text that is not a five-stage chain.

    Attributes:
        rule: the violated rule: ``missing``, ``order``, ``repeated``, ``nested``, ``empty`` or ``outside``.
    """

    def __init__(self, rule: str, message: str):
        super().__init__(message)
        self.rule = rule


@dataclass(frozen=True)
class Chain:
    """The texts of the five stages, without their tags and outer whitespace."""

    summary: str
    caption: str
    reasoning: str
    reflection: str
    conclusion: str

    def render(self) -> str:
        """Return the chain as text, one stage per line."""
        return "\n".join(f"<{stage}>{getattr(self, stage.lower())}</{stage}>" for stage in STAGES)


def parse_chain(text: str) -> Chain:
    """Return the stages of ``text``.

    All five stages must occur once, in order, each non-empty and closed before the next opens, with only whitespace
    around them.

    Raises:
        ChainError: ``text`` violates a rule.
    """
    expected = iter(STAGE_TAGS)
    stages: dict[str, str] = {}
    position = 0
    for found in _TAG.finditer(text):
        tag = found.group()
        want = next(expected, None)
        if tag != want:
            _raise_for_tag(text, tag, want)
        between = text[position : found.start()].strip()
        stage = tag.strip("</>")
        if tag.startswith("</"):
            if not between:
                raise ChainError("empty", f"the stage {stage} is empty")
            stages[stage.lower()] = between
        elif between:
            raise ChainError("outside", f"unexpected text before <{stage}>: {between[:40]!r}")
        position = found.end()
    left = next(expected, None)
    if left is not None:
        raise ChainError("missing", f"{left} is missing")
    if text[position:].strip():
        raise ChainError("outside", f"unexpected text after {END_OF_CHAIN}: {text[position:].strip()[:40]!r}")
    return Chain(**stages)


def _raise_for_tag(text: str, tag: str, want: str | None) -> None:
    """Raise the error for ``tag`` in place of ``want``."""
    if want is None or text.count(tag) > 1:
        raise ChainError("repeated", f"{tag} occurs more than once")
    if want not in text:
        raise ChainError("missing", f"{want} is missing")
    if want.startswith("</"):
        raise ChainError("nested", f"{tag} is inside <{want[2:]}")
    raise ChainError("order", f"{tag} comes before {want}")


def conclusion_of(text: str) -> str | None:
    """Return the text of the only CONCLUSION in ``text``; None without one, or with several."""
    if text.count("<CONCLUSION>") != 1 or text.count(END_OF_CHAIN) != 1:
        return None
    _, _, rest = text.partition("<CONCLUSION>")
    inside, closed, _ = rest.partition(END_OF_CHAIN)
    return inside.strip() if closed else None


def without_tags(text: str) -> str:
    """Return a chain without its tags, each run of whitespace as one space."""
    return " ".join(_TAG.sub(" ", text).split())


def count_words(text: str) -> int:
    """Return the number of words of a chain without its tags."""
    return len(without_tags(text).split())


def normalize_name(name: str) -> str:
    """Return ``name`` in lower case and composed Unicode form, underscores as spaces, runs of whitespace as one."""
    return " ".join(unicodedata.normalize("NFC", name.replace("_", " ").casefold()).split())


def check_class_names(class_names: Sequence[str]) -> str | None:
    """Return why answers could not distinguish these classes, None if they can.

    Two names that are equal for `match_class`, an empty name, or one that would break a chain that contains it.
    """
    seen: dict[str, str] = {}
    for name in class_names:
        normal = normalize_name(name)
        if not normal:
            return f"the class name {name!r} is blank"
        if _TAG.search(name):
            return f"the class name {name[:80]!r} contains a stage tag"
        if any(char in name for char in "\n\r\0"):
            return f"the class name {name[:80]!r} has more than one line"
        if normal in seen:
            return f"two classes have the name {name[:80]!r}, ignoring case, spaces and underscores"
        seen[normal] = name
    return None


def match_class(answer: str | None, class_names: Sequence[str]) -> int | None:
    """Return the index of the class that ``answer`` names exactly, or None.

    Exact up to case, spaces and underscores, never by containment: ``cat`` is in ``bobcat``.
    """
    if answer is None:
        return None
    normal = normalize_name(answer)
    for index, name in enumerate(class_names):
        if normalize_name(name) == normal:
            return index
    return None
