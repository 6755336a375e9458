"""Rejection sampling: the named rules by which a candidate is kept or not.

The paper (arXiv 2602.23777) keeps a candidate if all stages are there and the conclusion is coherent. Here every rule
has a name, which is stored with the candidate; the first one that is broken counts. The label is looked at last, so
that the other names say what is wrong with the text itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from domainbed_reasoning.chains import Chain, ChainError, match_class, normalise_name, parse_chain
from domainbed_reasoning.contradiction import contradiction, mention

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
            inside = {normalise_name(name) for name in mention(self.class_names).findall(chain.conclusion)}
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
