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
        rule: the broken rule, one word: ``missing``, ``order``, ``repeated``, ``nested``, ``empty`` or ``outside``.
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
        """Return the chain as text, a stage a line."""
        return "\n".join(f"<{stage}>{getattr(self, stage.lower())}</{stage}>" for stage in STAGES)


def parse_chain(text: str) -> Chain:
    """Return the stages of ``text``.

    All five stages must be there, once, in order, each closed before the next opens and not empty, with nothing but
    whitespace around them.

    Raises:
        ChainError: naming the broken rule and the stage.
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
            raise ChainError("outside", f"text stands before <{stage}> and outside of every stage: {between[:40]!r}")
        position = found.end()
    left = next(expected, None)
    if left is not None:
        raise ChainError("missing", f"{left} is missing")
    if text[position:].strip():
        raise ChainError("outside", f"text stands after {END_OF_CHAIN}: {text[position:].strip()[:40]!r}")
    return Chain(**stages)


def _raise_for_tag(text: str, tag: str, want: str | None) -> None:
    """Name why ``tag`` may not stand where ``want`` is expected."""
    if want is None or text.count(tag) > 1:
        raise ChainError("repeated", f"{tag} stands more than once")
    if want not in text:
        raise ChainError("missing", f"{want} is missing")
    if want.startswith("</"):
        raise ChainError("nested", f"{tag} stands inside of <{want[2:]}")
    raise ChainError("order", f"{tag} stands before {want}")


def conclusion_of(text: str) -> str | None:
    """Return the text of the one CONCLUSION in ``text``; None if there is none, or more than one."""
    if text.count("<CONCLUSION>") != 1 or text.count(END_OF_CHAIN) != 1:
        return None
    _, _, rest = text.partition("<CONCLUSION>")
    inside, closed, _ = rest.partition(END_OF_CHAIN)
    return inside.strip() if closed else None


def without_tags(text: str) -> str:
    """Return the words of a chain, its tags left out, runs of whitespace as one space."""
    return " ".join(_TAG.sub(" ", text).split())


def count_words(text: str) -> int:
    """Return the number of words of a chain, its tags not counted."""
    return len(without_tags(text).split())


def normalize_name(name: str) -> str:
    """Return ``name`` in lower case and composed Unicode form, underscores as spaces, runs of whitespace as one."""
    return " ".join(unicodedata.normalize("NFC", name.replace("_", " ").casefold()).split())


def check_class_names(class_names: Sequence[str]) -> str | None:
    """Return why an answer could not tell these classes apart, None if it can.

    Two names that `match_class` takes for one, a name of no letter, or one that would break the chain it stands in.
    """
    seen: dict[str, str] = {}
    for name in class_names:
        normal = normalize_name(name)
        if not normal:
            return f"the class name {name!r} has no letter"
        if _TAG.search(name):
            return f"the class name {name[:80]!r} holds a stage's tag"
        if any(char in name for char in "\n\r\0"):
            return f"the class name {name[:80]!r} has more than one line"
        if normal in seen:
            return f"two classes are called {name[:80]!r} up to case, spaces and underscores"
        seen[normal] = name
    return None


def match_class(answer: str | None, class_names: Sequence[str]) -> int | None:
    """Return the index of the class that ``answer`` names exactly, or None.

    Exact up to case, spaces and underscores, never by containment: ``cat`` is in ``bobcat``.
    """
    if answer is None:
        return None
    wanted = normalize_name(answer)
    for index, name in enumerate(class_names):
        if normalize_name(name) == wanted:
            return index
    return None
