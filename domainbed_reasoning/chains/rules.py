"""Rejection sampling: the named rules that a candidate must satisfy.

The paper (arXiv 2602.23777) keeps a candidate if all stages are present and the conclusion is coherent. Here every rule
has a name, and the first violated one is stored with the candidate. The label is checked last, so that the other rules
describe the text itself. Deviations in format violate no rule: they are normalized first (`reader`), unless the exact
rules are requested.

Measured on a frontier model's chains for 9,472 images of PACS (the bundle PACS, one candidate per image, default
bounds): the number rejected of the 9,413 chains that conclude the class, of the 59 others, and of the 9,413 with the
conclusion replaced by another class. Each chain counts for the first rule that it violates.

==================  ============  ===========  ================
rule                true          wrong        other conclusion
==================  ============  ===========  ================
contradiction       0             0            676 (7.2%)
label               0             58 (98.3%)   8,737 (92.8%)
every other rule    0             0            0
==================  ============  ===========  ================

The format rules reject none of these chains; they are for teachers that violate the format. The only wrong chain that
no rule rejects is for an image of the word ERROR and guesses its class. `domainbed-reasoning stats` prints this table
for any chains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domainbed_reasoning.chains.chain import Chain, ChainError
from domainbed_reasoning.chains.class_answer import classes_in
from domainbed_reasoning.chains.contradiction import contradiction
from domainbed_reasoning.chains.reader import NormalizedText, Reading, conclude, normalize, read_chain
from domainbed_reasoning.chains.record import ACCEPTED, REJECTED, check_json_value

# In the order in which they are checked.
RULES = {
    "unprintable": "the text contains a NUL or a lone surrogate (stored as U+FFFD)",
    "cut": "the answer was truncated at the token limit",
    "refusal": "the teacher or its content filter refused to answer",
    "placeholder": "the text contains a model's image token, which would break prompts",
    "stage_missing": "a stage or its closing tag is missing",
    "stage_order": "the stages are not in order",
    "stage_repeated": "a stage occurs more than once",
    "stage_nested": "a stage is inside another",
    "stage_empty": "a stage is empty",
    "stage_outside": "there is text between the stages, or text after them that names another class",
    "too_short": "the chain has fewer words than --min-words",
    "too_long": "the chain has more words than --max-words",
    "conclusion_none": "the conclusion is not the name of a class",
    "conclusion_several": "the conclusion names several classes",
    "contradiction": "reasoning or reflection states another class than the conclusion, or rules the conclusion out",
    "label": "the conclusion is not the true class (not checked with --unverified)",
    "second": "the image already has an accepted chain (import and --rejudge)",
}

# Suggestions for when most candidates violate a rule.
_FORM = "See the example: if the teacher does not write the five stages, use --prompt teacher or another teacher"
ADVICE = {
    "cut": "Allow longer answers with --max-tokens; reasoning models need thousands of tokens",
    "refusal": "Use another teacher",
    "stage_outside": _FORM,
    "stage_missing": _FORM,
    "stage_order": _FORM,
    "stage_repeated": _FORM,
    "stage_nested": _FORM,
    "stage_empty": _FORM,
    "too_short": "Lower --min-words, or use another teacher",
    "too_long": "Raise --max-words, or use another teacher",
    "conclusion_none": "Compare the example with the class names; [class_names] in a dataset's TOML file sets them",
    "conclusion_several": "Use another teacher",
    "contradiction": "Use another teacher",
    "label": "Use a stronger teacher; --unverified keeps chains with wrong conclusions",
}

# The real chains of this project's test data have 90 to 165 words; these bounds reject stubs and endless repetition.
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
    """The verdict on a candidate.

    Attributes:
        accepted: whether it is kept.
        rule: the violated rule, empty if it is accepted.
        reason: details of the violation, likewise.
        chain: in canonical form; None if the text has it already, or is rejected.
        normalized: the deviations that were removed, keys of `reader.BLEMISHES`.
    """

    accepted: bool
    rule: str = ""
    reason: str = ""
    chain: str | None = None
    normalized: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """The settings by which candidates are judged.

    Attributes:
        class_names: as in the prompt, in label order.
        min_words: minimum number of words of a chain, without tags.
        max_words: maximum number of words.
        verified: whether the conclusion must be the true class.
        exact: whether candidates are read without normalization.
    """

    class_names: tuple[str, ...]
    min_words: int = MIN_WORDS
    max_words: int = MAX_WORDS
    verified: bool = True
    exact: bool = False

    def judge(self, text: str, label: int | None = None, *, finish: str = "stop", refused: bool = False) -> Verdict:
        """Return the verdict on a candidate.

        Args:
            text: the teacher's answer.
            label: index of the true class; None skips the rule ``label``.
            finish: the teacher's finish reason, ``length`` if it reached the token limit.
            refused: whether the response is marked as a refusal.
        """
        if check_json_value(text):
            return _rejected("unprintable", "it contains a NUL or a lone surrogate")
        if refused:
            return _rejected("refusal", text[:120] or "marked as a refusal by the teacher")
        try:
            chain, normal = read_chain(text, self.exact)
        except ChainError as error:
            return self._why_unparsable(text, error, finish)
        if finish == "length" and "heading" in normal.blemishes and not normal.after:
            return _rejected(
                "cut", "the token limit was reached: headings have no closing tags, so the conclusion may be truncated"
            )
        if _REFUSAL.search(normal.before[:300]):
            return _rejected("refusal", normal.before[:120])
        found = next((token for token in PLACEHOLDERS if token in normal.text), None)
        if found:
            return _rejected("placeholder", f"it contains {found}")
        words = sum(len(stage.split()) for stage in vars(chain).values())
        if words < self.min_words:
            return _rejected("too_short", f"{words} words, fewer than {self.min_words}")
        if words > self.max_words:
            return _rejected("too_long", f"{words} words, more than {self.max_words}")
        return self._judge_conclusion(chain, conclude(normal, self.class_names, self.exact), normal.after, label)

    def _why_unparsable(self, text: str, error: ChainError, finish: str) -> Verdict:
        if finish == "length":
            return _rejected("cut", f"the token limit was reached: {error}")
        normal = NormalizedText(text) if self.exact else normalize(text)  # without thoughts, which are not refusals
        before_stages = normal.before or normal.text.partition("<SUMMARY>")[0]
        if _REFUSAL.search(before_stages[:300]):
            return _rejected("refusal", before_stages.strip()[:120])
        return _rejected(f"stage_{error.rule}", str(error))

    def _judge_conclusion(self, chain: Chain, reading: Reading, after: str, label: int | None) -> Verdict:
        named, quoted = reading.answer, chain.conclusion[:80]
        if named is None:
            if _REFUSAL.search(chain.conclusion):
                return _rejected("refusal", chain.conclusion[:120])
            inside = classes_in(chain.conclusion, self.class_names)
            if len(inside) > 1:
                return _rejected("conclusion_several", f"{quoted!r} names {len(inside)} classes")
            if others := sorted(classes_in(after, self.class_names) - inside):
                return _rejected(
                    "stage_outside", f"text after {quoted!r} names {self.class_names[others[0]]!r}: {after[:80]!r}"
                )
            return _rejected("conclusion_none", f"{quoted!r} is not a class name")
        against = contradiction(chain, named, self.class_names)
        if against:
            return _rejected("contradiction", against)
        if self.verified and label is not None and named != label:
            return _rejected(
                "label", f"the conclusion is {self.class_names[named]!r}, the label {self.class_names[label]!r}"
            )
        return Verdict(True, chain=reading.text if reading.blemishes else None, normalized=reading.blemishes)


def with_verdict(record: Mapping[str, Any], text: str, verdict: Verdict) -> dict[str, Any]:
    """Return a candidate's record with a new verdict.

    An accepted chain is stored in canonical form, and if that differs, with the original text (``raw``) and a list of
    changes (``normalized``). A rejected candidate is stored unchanged.

    Args:
        record: of the candidate.
        text: the original text.
        verdict: on it.
    """
    judged = {key: value for key, value in record.items() if key not in ("raw", "normalized", "rule", "reason")}
    judged["chain"] = text if verdict.chain is None else verdict.chain
    if verdict.normalized:
        judged |= {"raw": text, "normalized": list(verdict.normalized)}
    judged["verdict"] = ACCEPTED if verdict.accepted else REJECTED
    if not verdict.accepted:
        judged |= {"rule": verdict.rule, "reason": make_printable(verdict.reason)}
    return judged


def _rejected(rule: str, reason: str) -> Verdict:
    return Verdict(False, rule, reason)


def make_printable(text: str) -> str:
    """Return ``text`` with U+FFFD for every NUL and lone surrogate."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)
