"""Detects chains whose text contradicts their conclusion, and mentions of classes. Standard library only.

A chain mentions many classes: it excludes, compares, quotes, and corrects itself. The rule reads it sentence by
sentence and counts a class as *asserted* only if a sentence states outright what the image shows ("this is a dog", "all
of it points to a dog", "so dog prevails") and does not retract it: no negation, no "would", no "at first", no "but"
after it, no quotation marks around it. Text that it does not understand passes.

Measured on a frontier model's 9,472 chains for PACS: it rejects 0 of the 9,413 that conclude the label, 0 of the 59
others (their text agrees with their own conclusion), and 7.2% of the correct ones when their conclusion is replaced by
another class. It is a cheap check of coherence, not of what is in the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from domainbed_reasoning.chains.chain import Chain, match_class, normalize_name

_THING = (
    r"(?:it|this|that|the (?:(?:main|whole|depicted|drawn|shown) )?"
    r"(?:object|subject|animal|image|picture|photo|figure|creature|drawing))"
)
_SURELY = (
    r"(?:clearly |certainly |definitely |undoubtedly |indeed |obviously |most likely |probably |in fact |really |"
    r"simply |still |therefore |thus )?"
)
_ARTICLE = r"(?:an? |the )?[\"'“‘*]*"
_ANSWER = r"(?:answer|choice|option|conclusion|verdict|label|class|category|match)"
_PRAISE = r"(?:(?:final|correct|best|right|only|most likely|most plausible|safest|clear|obvious|natural|sensible) )?"
_ASSERTED = "|".join(
    [
        rf"\b(?:the|my|our) {_PRAISE}{_ANSWER} (?:is|must be|has to be|should be|would be|remains|stays|as) "
        rf"{_SURELY}{_ARTICLE}",
        rf"\b{_THING} (?:is|must be|has to be|can only be) {_SURELY}{_ARTICLE}",
        rf"\b(?:i|we|to) (?:therefore |thus )?(?:conclude|choose|pick|answer|settle on|decide on|go with)(?: that)?"
        rf"(?: {_THING} (?:is|must be))? {_ARTICLE}",
        rf"\b(?:therefore|thus|hence|consequently),? (?:{_THING} (?:is|must be) )?{_SURELY}{_ARTICLE}",
        rf"\b(?:marks?|identif(?:y|ies)|reveals?|classif(?:y|ies)|defines?) {_THING} (?:\w+ )?(?:as|to be) {_ARTICLE}",
        rf"\b(?:all|everything) (?:of (?:it|this|that) )?points to {_ARTICLE}",
    ]
)
# What parts of the image indicate. One part may indicate another class than the rest, so this is weaker evidence.
_INDICATED = (
    r"\b(?:point(?:s|ing)? (?:\w+ )?to|marks?|describes?|defines?|identif(?:y|ies)|indicates?|suggests?|fits?|suits?|"
    rf"match(?:es)?|makes?|agrees? with) {_ARTICLE}"
)
_GOOD = (
    r"(?:best|right|only|correct|final|clear|sensible|natural|safest|safe|stronger|better|closest|convincing|comfortable|"
    r"consistent|most \w+)"
)
_NAMED_FIRST = (
    rf"(?:is|remains|stays|stands|fits)(?: still| therefore| clearly| thus| also)* "
    rf"(?:(?:the|my|a) (?:{_GOOD} (?:and |offered |listed )?){{1,3}}(?:{_ANSWER}|guess|name|fit|reading|one)|"
    r"the (?:answer|choice|conclusion)|right|correct|certain|secure|preferred|retained|chosen|best|far better)\b|"
    r"(?:it is|prevails|wins|holds|stands)\s*$"
)
_DENIED = "|".join(
    [
        rf"\b{_THING} (?:is|are) {_SURELY}(?:not|no) {_ARTICLE}",
        rf"\b{_THING} (?:cannot|can(?:'|’)t|can not|could not) (?:possibly )?be {_ARTICLE}",
        rf"\b(?:rules?|ruled|ruling) out {_ARTICLE}",
    ]
)
# Words that retract an assertion if they come before it in its sentence, or after it.
_TAKEN_BACK_BEFORE = re.compile(
    r"\b(?:not|no(?!,)|none|nor|neither|never|nothing|nobody|without|hardly|barely|scarcely|cannot|lack(?:s|ing)?|missing|absent|"
    r"few|too|would|could|might|may|can|if|were|unless|whether|suppos(?:e|ing)|imagine|assuming|"
    r"although|though|while|whereas|despite|even|first|initial(?:ly)?|original(?:ly)?|before|earlier|once|strictly|"
    r"seem(?:s|ed)?|appear(?:s|ed)?|look(?:s|ed)?|resembles?|like|tempt(?:s|ed|ing)?|mistak(?:e|es|en)|mistook|"
    r"confus(?:e|es|ed|ing)|mislead(?:s|ing)?|misled|guess(?:ed)?|impression|glance|"
    r"claim(?:s|ed)?|sa(?:y|ys|id)|reads?|captions?|titles?|text|words?|written|writing|lettering|inscription|sign|"
    r"wrong|false|incorrect|unlikely|impossible|doubtful|against|reject(?:s|ed)?|rul(?:es?|ed|ing) out|"
    r"exclud(?:es?|ed|ing)|instead of|rather than|unlike|than|alternative|rival|other|another|"
    r"background|backdrop|behind|beside|distant|scenery)\b|n[’']t\b",
    re.IGNORECASE,
)
_TAKEN_BACK_BEHIND = re.compile(
    r"\b(?:but|yet|however|though|although|except|unless|if|nevertheless|nonetheless|instead|would|could|might|"
    r"at first|is (?:wrong|unlikely|excluded|impossible|out)|(?:is|are|was|can be) (?:ruled out|excluded|rejected)|"
    r"do(?:es)? not|did not|cannot|only in|by (?:name|title)|overrul(?:es?|ed)|outweighs?|fails?|"
    r"background|backdrop|behind|beside|scenery)\b|n[’']t\b",
    re.IGNORECASE,
)
_NEAREST = re.compile(r"\b(?:strictly|nearest|closest|sense|really)\b", re.IGNORECASE)
# Text before the last of these was considered and dismissed.
_TURN = re.compile(r"\b(?:but|so|hence|yet)\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?;]+")
_QUOTED = re.compile(r"[\"“][^\"”]*[\"”]|(?<!\w)['‘][^'’]*['’](?!\w)")


@lru_cache(maxsize=16)
def mention(class_names: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern of a mention of any of the classes as a separate word; ``class_names`` is a tuple."""
    return re.compile(rf"\b({_alternatives(class_names)})\b", re.IGNORECASE)


def _alternatives(class_names: Sequence[str]) -> str:
    longest_first = sorted((normalize_name(name) for name in class_names), key=len, reverse=True)
    return "|".join(re.escape(name).replace(r"\ ", r"[\s_]+") for name in longest_first)


@lru_cache(maxsize=16)
def _phrases(class_names: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """Return the patterns of a phrase that asserts, indicates or denies a class, which is in one of its groups."""
    names = _alternatives(class_names)
    # "dog-like", "dog's nose" and "horse shape" describe parts, not the class.
    name = rf"({names})(?=[\"'”’*]*"
    end = rf"{name}(?:[,:)]|\s*$|\s+(?:and|because|since|as|in|on|with|rather|not|by|from|here|after)\b))"
    best = rf"\b(?:fits?|match(?:es)?|agrees? with) {_ARTICLE}{name} (?:best|better than (?:any|all|every))\b)"
    phrases = {
        "asserted": rf"(?:{_ASSERTED}){end}|\b{name} (?:{_NAMED_FIRST}))|{best}",
        "indicated": rf"(?:{_INDICATED}){end}",
        "denied": rf"(?:{_DENIED}){end}",
    }
    patterns = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in phrases.items()}
    return patterns | {"mentioned": mention(class_names)}


def _stated(kind: str, text: str, class_names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield the class and the words of every phrase of this kind that its sentence does not retract."""
    pattern = _phrases(tuple(class_names))[kind]
    for sentence in _SENTENCE.findall(text):
        for found in pattern.finditer(sentence):
            named = match_class(next(filter(None, found.groups())), class_names)
            if named is not None and not _is_taken_back(sentence, found):
                yield named, found.group()


def _is_taken_back(sentence: str, found: re.Match[str]) -> bool:
    turn = max((word.end() for word in _TURN.finditer(sentence, 0, found.start())), default=0)
    return bool(
        _TAKEN_BACK_BEFORE.search(sentence, turn, found.start())
        or _TAKEN_BACK_BEHIND.search(sentence, found.end())
        or any(quote.start() < found.start() and found.end() <= quote.end() for quote in _QUOTED.finditer(sentence))
    )


def contradiction(chain: Chain, conclusion: int, class_names: Sequence[str]) -> str | None:
    """Return how reasoning and reflection contradict the conclusion, or None.

    They do if the last class that they assert is another one; if they assert none, indicate other classes and never
    support the concluded one; or if they deny the concluded class and never assert it. A chain that settles for the
    nearest option ("strictly speaking this is not a guitar") does not.

    Args:
        chain: the candidate.
        conclusion: index of the class that it concludes.
        class_names: as in the prompt.
    """
    text = " ".join(f"{chain.reasoning}\n{chain.reflection}".split())
    concluded = class_names[conclusion]
    asserted = [named for named, _ in _stated("asserted", text, class_names)]
    if asserted and asserted[-1] != conclusion:
        return f"it states {class_names[asserted[-1]]!r} but concludes {concluded!r}"
    if asserted or _NEAREST.search(text):
        return None
    supported = {named for named, _ in _stated("mentioned", text, class_names)}
    indicated = [named for named, _ in _stated("indicated", text, class_names)]
    if indicated and conclusion not in supported:
        return f"it indicates {class_names[indicated[-1]]!r} but concludes {concluded!r}"
    for named, words in _stated("denied", text, class_names):
        if named == conclusion:
            return f"it rules out {concluded!r} ({words!r}) but concludes it"
    return None
