"""The tolerant reader of five-stage chains, used for teachers, self-labels, evaluation and the analyses.

Models think before they answer, add code fences, write tags in lower case or bold, use headings in place of tags, and
add a sentence before or after. None of this affects the meaning of a chain. `normalize` removes it, lists what it
removed, and returns a text with canonical tags, to which the exact rules then apply. A text that the exact rules accept
is not changed. Whatever could change the meaning is not normalized: stages that are missing, repeated or out of order,
words between stages, a chain that is only in the model's thoughts, a conclusion that names no class or several
(`class_answer`), and words after the conclusion that name another class.

The paper (arXiv 2602.23777) compares the text inside <CONCLUSION> with the label and does not specify the format: here
it is normalized before the comparison; ``exact=True`` compares the original text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_reasoning.chains.chain import (
    END_OF_CHAIN,
    STAGES,
    Chain,
    ChainError,
    conclusion_of,
    match_class,
    parse_chain,
)
from domainbed_reasoning.chains.class_answer import classes_in, read_class

BLEMISHES = {
    "think": "thoughts before the answer, <think>…</think> or its closing tag alone",
    "fence": "a code fence",
    "case": "tags in lower or mixed case",
    "tag": "tags with spaces, attributes, brackets or HTML entities",
    "bold": "tags set in bold or as code",
    "heading": "headings in place of tags, or before them",
    "signs": "list numbers, rules or other signs around the stages",
    "preamble": "words before the first stage",
    "postscript": "words after the last stage",
    "conclusion": "a conclusion with article, punctuation, quotes, markup or a sentence around the class name",
}

_NAME = "|".join(STAGES)
_LEFT, _RIGHT = r"(?:\\?[<＜]|&lt;)", r"(?:\\?[>＞]|&gt;)"


def _tag_pattern(left: str, right: str) -> re.Pattern[str]:
    # Every repetition is bounded: a hostile text must not take more than linear time.
    return re.compile(
        rf"(?P<mark>\*{{1,3}}|_{{2,3}}|`{{1,2}})?(?P<tag>{left}\s{{0,3}}(?P<end>[/\\]?)\s{{0,3}}[*_]{{0,3}}"
        rf"(?P<stage>{_NAME})[*_:]{{0,3}}(?:\s[^<>\[\]&]{{0,200}})?{right})(?(mark)(?P=mark)?)",
        re.IGNORECASE,
    )


_TAG, _BRACKETED = _tag_pattern(_LEFT, _RIGHT), _tag_pattern(r"\[", r"\]")
_ANY_TAG = re.compile(rf"</?(?:{_NAME})>")
_THOUGHT = re.compile(
    r"(?:[<＜\[◁]|&lt;)\s{0,3}(?P<end>/?)\s{0,3}(?:think|thinking|thoughts?)(?:\s[^<>\[\]]{0,50})?(?:[>＞\]▷]|&gt;)"
    r"|<\|(?:(?P<end_of>end)|begin)_of_thought\|>"
    r"|<\|channel\|>(?:analysis|(?P<final>final))<\|message\|>",
    re.IGNORECASE,
)
_FENCE = re.compile(
    r"(?:`{3,}|~{3,})(?:(?:xml|html|xhtml|markdown|md|text|txt|plaintext|plain)(?=\s|<|$))?", re.IGNORECASE
)
_NUMBER = r"(?:(?:step|stage)[ \t]{0,3}\d{1,2}[ \t]{0,3}[:.)–—-]?[ \t]{0,3}|\d{1,2}[ \t]{0,3}[.):][ \t]{0,3})?"
_LINE_END = r"[ \t]{0,9}(?=\r?\n|$)"
_STAGE = rf"(?P<{{}}>{_NAME})[ \t]{{{{0,3}}}}"
_HEADING = re.compile(
    r"^[ \t]{0,8}(?:>[ \t]?)?(?:"
    rf"\#{{1,6}}[ \t]{{0,3}}[*_]{{0,3}}{_NUMBER}[^\w\n<]{{0,6}}{_STAGE.format('hashed')}(?:[:：.]?[*_]{{0,3}}[:：]?"
    rf"\#{{0,6}}{_LINE_END}|[*_]{{0,3}}[:：][*_]{{0,3}})"
    rf"|(?:[-*+•][ \t]{{1,3}})?{_NUMBER}[*_]{{1,3}}{_NUMBER}{_STAGE.format('bold')}(?:[:：.]?[*_]{{1,3}}{_LINE_END}"
    rf"|[:：][*_]{{1,3}}|[*_]{{1,3}}[ \t]{{0,3}}[:：–—-])"
    rf"|(?:[-*+•][ \t]{{1,3}})?{_NUMBER}{_STAGE.format('plain')}[:：]"
    rf"|(?-i:{_STAGE.format('alone')}){_LINE_END})",
    re.IGNORECASE | re.MULTILINE,
)
_HEADING_OF_TAG = re.compile(
    rf"(?:{_HEADING.pattern})(?=\s{{0,10}}<(?:(?P=hashed)|(?P=bold)|(?P=plain)|(?P=alone))>)",
    re.IGNORECASE | re.MULTILINE,
)
# Between two stages: list numbers, signs and HTML, no words.
_SIGNS = re.compile(r"(?:</?(?:br|hr|p|div|answer|response|output|chain)\s?/?>|[\W_]|\d{1,3}[.)])*", re.IGNORECASE)


@dataclass(frozen=True)
class NormalizedText:
    """A text after normalization.

    Attributes:
        text: from the first stage's tag to the last one's; the original text if nothing was normalized.
        blemishes: what was normalized, keys of `BLEMISHES` in their order.
        before: the words before the first stage.
        after: the words after the last stage.
    """

    text: str
    blemishes: tuple[str, ...] = ()
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Reading:
    """The conclusion of a text.

    Attributes:
        answer: index of the class; None if the text names none, or more than one.
        text: the chain in canonical form, with the conclusion spelled like the class name; the original text if
            nothing was normalized or it names no class.
        blemishes: what was normalized.
    """

    answer: int | None
    text: str
    blemishes: tuple[str, ...] = ()


def normalize(text: str) -> NormalizedText:
    """Return ``text`` with canonical tags and without text around its stages."""
    if _is_exact(text):
        return NormalizedText(text)
    found: set[str] = set()
    shown = without_thoughts(text)
    if shown != text:
        found.add("think")
    unfenced = _FENCE.sub("", shown)
    tagged = _canonical_tags(unfenced, _TAG, found)
    if not _ANY_TAG.search(tagged):
        tagged = _canonical_tags(unfenced, _BRACKETED, found)
    if not _ANY_TAG.search(tagged):
        tagged = _tags_from_headings(unfenced)
        found |= {"heading"} if tagged != unfenced else set()
    elif (bare := _HEADING_OF_TAG.sub("", tagged)) != tagged:
        tagged = bare
        found.add("heading")
    tags = list(_ANY_TAG.finditer(tagged))
    if not tags:  # chains in the thoughts do not count
        return NormalizedText(shown, tuple(found))
    if unfenced != shown:
        found.add("fence")
    before, after = tagged[: tags[0].start()], tagged[tags[-1].end() :]
    found |= {name for name, words in (("preamble", before), ("postscript", after)) if not _SIGNS.fullmatch(words)}
    parts = [tags[0].group()]
    for last, tag in zip(tags, tags[1:], strict=False):
        between = tagged[last.end() : tag.start()]
        is_gap = last.group().startswith("</") and not tag.group().startswith("</")
        parts += ["\n" if is_gap and _SIGNS.fullmatch(between) else between, tag.group()]
    normal = "".join(parts)
    if not found and normal.split() == text.split():
        return NormalizedText(text)
    if not found:
        found.add("signs")
    return NormalizedText(normal, tuple(name for name in BLEMISHES if name in found), before.strip(), after.strip())


def read_chain(text: str, exact: bool = False) -> tuple[Chain, NormalizedText]:
    """Return the five stages of ``text``, and the normalized text they were parsed from.

    Args:
        text: a model's output.
        exact: parse without normalization.

    Raises:
        ChainError: if the text violates a rule; the message names the rule and the stage.
    """
    normal = NormalizedText(text) if exact else normalize(text)
    return parse_chain(normal.text), normal


def read_conclusion(text: str, class_names: Sequence[str], exact: bool = False) -> Reading:
    """Return the class that ``text`` concludes with; other stages may be missing.

    Args:
        text: a model's output.
        class_names: of the task.
        exact: compare the text inside <CONCLUSION> without normalization, up to case, spaces and underscores.
    """
    reading = conclude(NormalizedText(text) if exact else normalize(text), class_names, exact)
    return reading if reading.blemishes else Reading(reading.answer, text)


def conclude(normal: NormalizedText, class_names: Sequence[str], exact: bool = False) -> Reading:
    """Return the conclusion of a normalized text; see `read_conclusion`."""
    conclusion = conclusion_of(normal.text)
    answer = match_class(conclusion, class_names)
    if exact or conclusion is None:
        return Reading(answer, normal.text)
    text, blemishes = normal.text, normal.blemishes
    if answer is None and (answer := read_class(conclusion, class_names)) is not None:
        opening, _, rest = text.partition("<CONCLUSION>")
        text = f"{opening}<CONCLUSION>{class_names[answer]}{END_OF_CHAIN}{rest.partition(END_OF_CHAIN)[2]}"
        blemishes = (*blemishes, "conclusion")
    if answer is None or classes_in(normal.after, class_names) - {answer}:
        return Reading(None, normal.text)
    if blemishes and _is_exact(text):
        text = parse_chain(text).render()
    return Reading(answer, text, blemishes)


def is_well_formed(text: str, exact: bool = False) -> bool:
    """Return whether ``text`` is a chain of five stages, in order, each closed and non-empty.

    Args:
        text: a model's output.
        exact: parse without normalization.
    """
    return _is_exact(text if exact else normalize(text).text)


def is_thinking(text: str) -> bool:
    """Return whether ``text`` ends in an unclosed thought."""
    depth = 0
    for found in _THOUGHT.finditer(text):
        depth = max(0, depth - 1) if _closes(found) else depth + 1
    return depth > 0


def _closes(thought: re.Match[str]) -> bool:
    return bool(thought["end"] or thought["end_of"] or thought["final"])


def _is_exact(text: str) -> bool:
    try:
        parse_chain(text)
    except ChainError:
        return False
    return True


def without_thoughts(text: str) -> str:
    """Return ``text`` without thoughts: up to the last closing tag if tags nest, up to the end if none closes."""
    parts, place, depth, closed = [], 0, 0, 0
    for found in _THOUGHT.finditer(text):
        if not _closes(found):
            if not depth:
                parts.append(text[place : found.start()])
                closed = 0
            depth += 1
            continue
        if not depth:  # servers that open the thought themselves only return its closing tag
            parts.clear()
        depth = max(0, depth - 1)
        closed = place = found.end()
    if depth:
        place = closed or len(text)
    return "".join([*parts, text[place:]])


def _canonical_tags(text: str, pattern: re.Pattern[str], found: set[str]) -> str:
    def canonical(tag: re.Match[str]) -> str:
        plain = f"<{'/' if tag['end'] else ''}{tag['stage'].upper()}>"
        found.update({"bold"} if tag["mark"] else ())
        if tag["tag"] != plain:
            found.add("case" if tag["tag"].upper() == plain else "tag")
        return plain

    return pattern.sub(canonical, text)


def _tags_from_headings(text: str) -> str:
    """Return a text with tags in place of headings; the conclusion is the first paragraph after the last heading."""
    headings = list(_HEADING.finditer(text))
    parts = [text[: headings[0].start()]] if headings else [text]
    for heading, following in zip(headings, [*headings[1:], None], strict=False):
        stage = str(heading[str(heading.lastgroup)]).upper()
        content = text[heading.end() : following.start() if following else len(text)].strip()
        rest = ""
        if stage == STAGES[-1]:
            content, *others = re.split(r"\n[ \t]{0,20}\r?\n", content, maxsplit=1)
            rest = "".join(others)
        parts.append(f"<{stage}>{content.strip()}</{stage}>\n{rest}")
    return "".join(parts)
