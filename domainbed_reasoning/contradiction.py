"""Whether a chain's own words contradict its conclusion, and where they mention classes. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from domainbed_reasoning.chains import Chain, match_class, normalise_name

_THING = r"(?:it|this|that|the (?:object|subject|animal|image|picture|photo|figure|creature|drawing|main object))"
_SURELY = r"(?:clearly |certainly |definitely |undoubtedly |indeed |obviously |most likely |probably |in fact )?"
_ARTICLE = r"(?:a |an |the )?[\"'“]?"


@lru_cache(maxsize=16)
def mention(class_names: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern of a mention of any of the classes, as a word of its own; ``class_names`` is a tuple."""
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
    rule is cautious: what it does not understand it lets pass.

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
