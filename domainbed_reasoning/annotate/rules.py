"""Rejection sampling: the named rules by which a candidate is kept or not.

The paper (arXiv 2602.23777) keeps a candidate if all stages are there and the conclusion is coherent. Here every rule
has a name, which is stored with the candidate; the first one that is broken counts. The label is looked at last, so
that the other names say what is wrong with the text itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from domainbed_reasoning.chains import Chain, ChainError, match_class, normalise_name, parse_chain

# In the order in which they are tried.
RULES = {
    "unprintable": "the text holds a NUL or half of a surrogate pair (stored with U+FFFD in its place)",
    "cut": "the teacher ran into its token limit",
    "refusal": "the teacher, or its content filter, refuses to answer",
    "placeholder": "the text holds a model's image token, which would break a prompt built with it",
    "stage_missing": "a stage or its closing tag is missing",
    "stage_order": "the stages are not in order",
    "stage_repeated": "a stage stands more than once",
    "stage_nested": "a stage stands inside of another",
    "stage_empty": "a stage is empty",
    "stage_outside": "text stands outside of the stages",
    "too_short": "the chain has fewer words than --min-words",
    "too_long": "the chain has more words than --max-words",
    "conclusion_none": "the conclusion is not the name of a class",
    "conclusion_several": "the conclusion names several classes",
    "contradiction": "reasoning or reflection states another class than the conclusion, or rules the conclusion out",
    "label": "the conclusion is not the true class (not asked with --unverified)",
    "second": "the image has an accepted chain already (import only)",
}

# The real chains of this project's test data have 90 to 165 words; these bounds catch stubs and endless repetition.
MIN_WORDS = 30
MAX_WORDS = 400

PLACEHOLDERS = ("<image>", "<IMG_CONTEXT>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<start_of_image>")

_REFUSAL = re.compile(
    r"\b(?:i(?:'|’)?m sorry|i am sorry|sorry, (?:but )?i|i (?:can(?:'|’)?t|cannot|can not|won(?:'|’)?t|am unable to|"
    r"(?:'|’)m unable to|am not able to) (?:help|assist|identify|provide|comply|answer|determine|analy[sz]e|view|see)|"
    r"as an ai\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """What became of a candidate: ``rule`` and ``reason`` are empty if it is accepted."""

    accepted: bool
    rule: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Rules:
    """What a candidate is judged by.

    Attributes:
        class_names: as the prompt named them, in label order.
        min_words: fewest words a chain may have, its tags not counted.
        max_words: most words.
        verified: whether the conclusion must be the true class.
    """

    class_names: tuple[str, ...]
    min_words: int = MIN_WORDS
    max_words: int = MAX_WORDS
    verified: bool = True

    def judge(self, text: str, label: int | None = None, *, finish: str = "stop", refused: bool = False) -> Verdict:
        """Return the verdict on a candidate.

        Args:
            text: what the teacher wrote.
            label: index of the true class; None skips the rule ``label``.
            finish: the teacher's reason to stop, ``length`` if it ran into its limit.
            refused: whether the teacher's answer says itself that it is a refusal.
        """
        if not is_printable(text):
            return _no("unprintable", "it holds a NUL or half of a surrogate pair")
        if refused:
            return _no("refusal", text[:120] or "marked as a refusal by the teacher")
        try:
            chain = parse_chain(text)
        except ChainError as error:
            return self._why_unparsable(text, error, finish)
        found = next((token for token in PLACEHOLDERS if token in text), None)
        if found:
            return _no("placeholder", f"it holds {found}")
        words = sum(len(stage.split()) for stage in vars(chain).values())
        if words < self.min_words:
            return _no("too_short", f"{words} words, fewer than {self.min_words}")
        if words > self.max_words:
            return _no("too_long", f"{words} words, more than {self.max_words}")
        return self._judge_conclusion(chain, label)

    def _why_unparsable(self, text: str, error: ChainError, finish: str) -> Verdict:
        if finish == "length":
            return _no("cut", f"the token limit was reached: {error}")
        before_stages = text.partition("<SUMMARY>")[0]
        if _REFUSAL.search(before_stages[:300]):
            return _no("refusal", before_stages.strip()[:120])
        return _no(f"stage_{error.rule}", str(error))

    def _judge_conclusion(self, chain: Chain, label: int | None) -> Verdict:
        named = match_class(chain.conclusion, self.class_names)
        if named is None:
            if _REFUSAL.search(chain.conclusion):
                return _no("refusal", chain.conclusion[:120])
            inside = {normalise_name(name) for name in _mention(self.class_names).findall(chain.conclusion)}
            if len(inside) > 1:
                return _no("conclusion_several", f"{chain.conclusion[:80]!r} names {len(inside)} classes")
            return _no("conclusion_none", f"{chain.conclusion[:80]!r} is not the name of a class")
        against = contradiction(chain, named, self.class_names)
        if against:
            return _no("contradiction", against)
        if self.verified and label is not None and named != label:
            return _no("label", f"concludes {self.class_names[named]!r}, the label is {self.class_names[label]!r}")
        return Verdict(True)


def _no(rule: str, reason: str) -> Verdict:
    return Verdict(False, rule, reason)


def is_printable(text: str) -> bool:
    """Return whether a text can be stored: no NUL, no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def make_printable(text: str) -> str:
    """Return ``text`` with U+FFFD for every NUL and lone surrogate."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


_THING = r"(?:it|this|that|the (?:object|subject|animal|image|picture|photo|figure|creature|drawing|main object))"
_SURELY = r"(?:clearly |certainly |definitely |undoubtedly |indeed |obviously |most likely |probably |in fact )?"
_ARTICLE = r"(?:a |an |the )?[\"'“]?"


@lru_cache(maxsize=16)
def _mention(class_names: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"\b({_alternatives(class_names)})\b", re.IGNORECASE)


def _alternatives(class_names: Sequence[str]) -> str:
    longest_first = sorted((normalise_name(name) for name in class_names), key=len, reverse=True)
    return "|".join(re.escape(name).replace(r"\ ", r"[\s_]+") for name in longest_first)


@lru_cache(maxsize=16)
def _claims(class_names: Sequence[str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the patterns of a phrase that states a class (in one of its groups), and of one that rules a class out."""
    names = _alternatives(class_names)
    # "dog-like", "dog's nose" and "horse shape" speak of parts, not of what it is.
    end = rf"({names})(?=[\"'”]?(?:[.,;:!?)]|$|\s+(?:and|because|since|as|in|on|with|rather|not)\b))"
    before = "|".join(
        [
            r"\b(?:the|my|final|correct|best|right) (?:\w+ )?"
            r"(?:answer|option|choice|conclusion|match|label|class|category)"
            rf" (?:is|must be|has to be|should be|would be|as) {_SURELY}{_ARTICLE}",
            rf"\b{_THING} (?:is|must be|has to be|can only be) {_SURELY}{_ARTICLE}",
            r"\b(?:i|we|to) (?:therefore |thus )?(?:conclude|choose|pick|answer)"
            rf"(?: that)?(?: {_THING} is)? {_ARTICLE}",
            rf"\b(?:therefore|thus|hence),? (?:{_THING} (?:is|must be) )?{_SURELY}{_ARTICLE}",
            rf"\b(?:points?|belongs?|exclusive) to {_ARTICLE}",
            rf"\b(?:suits?|describes?|marks?|forms?|secures?|say|says) {_ARTICLE}",
        ]
    )
    after = (
        rf"\b(?:{names})(?= (?:is|remains|stays|stands|fits|holds)(?: still| therefore| clearly| thus| also)*"
        r" (?:(?:the|my|a|an) )?(?:\w+ and )?"
        r"(?:only|best|better|far better|stronger|closest|right|correct|clear|matching|convincing|"
        r"comfortable|sensible|preferred|retained|chosen|certain|secure|safe|firm|consistent)\b"
        r"| (?:the|my) (?:only|best|better|stronger|closest|right|correct|clear|convincing|sensible|safe|natural)\b)"
    )
    denied = "|".join(
        [
            rf"\b{_THING} (?:is|are) {_SURELY}not {_ARTICLE}",
            rf"\b{_THING} (?:cannot|can(?:'|’)t|can not|could not) (?:possibly )?be {_ARTICLE}",
            rf"\b(?:rules?|ruled|ruling) out {_ARTICLE}",
        ]
    )
    # "fits a horse better than …", not "would fit a horse better".
    compared = (
        r"(?<!would )(?<!could )(?<!might )(?<!not )(?<!than )\b(?:fits?|match(?:es)?|agrees? with) "
        rf"{_ARTICLE}({names})(?=[\"'”]? (?:best|better|far better|more than|most|perfectly|exactly)\b)"
    )
    stated = rf"(?:{before}){end}|({after})|{compared}"
    return re.compile(stated, re.IGNORECASE), re.compile(rf"(?:{denied}){end}", re.IGNORECASE)


def contradiction(chain: Chain, conclusion: int, class_names: Sequence[str]) -> str | None:
    """Return how reasoning and reflection contradict the conclusion, or None.

    They do if the last class they state outright ("the answer is X", "it must be a X") is another one, or if they
    rule the conclusion's class out and never state it. Comparisons ("a horse would have …") are no statements. The
    rule is
    cautious: what it does not understand it lets pass.

    Args:
        chain: the candidate.
        conclusion: index of the class that it concludes.
        class_names: as the prompt named them.
    """
    stated, denied = _claims(tuple(class_names))
    text = " ".join(f"{chain.reasoning}\n{chain.reflection}".split())
    claims = [match_class(next(filter(None, found.groups())), class_names) for found in stated.finditer(text)]
    if claims and claims[-1] != conclusion and claims[-1] is not None:
        return f"it states {class_names[claims[-1]]!r} and concludes {class_names[conclusion]!r}"
    if conclusion not in claims:
        for found in denied.finditer(text):
            if match_class(found.group(1), class_names) == conclusion:
                return f"it rules {class_names[conclusion]!r} out ({found.group()!r}) and concludes it"
    return None
