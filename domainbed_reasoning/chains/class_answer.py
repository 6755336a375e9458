r"""Which class a short answer names: "dog", "A dog.", "**dog**", "The answer is dog", ``\boxed{dog}``.

An answer names a class if, without markup and punctuation, it is the class's name, alone or with an article, or one of
a few sentences that state it. It is never searched for a name: "bobcat" is not a cat, "not a dog", "it could be a dog",
"dogs" and "a dog's nose" do not name dog, "dog or horse" names neither. Standard library only.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from domainbed_reasoning.chains.chain import match_class
from domainbed_reasoning.chains.contradiction import mention

_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_APOSTROPHES = re.compile("[\u2018\u2019\u02bc\u2032`\u00b4]")
_LATEX = re.compile(r"\\(?:boxed|fbox|text(?:bf|it|rm|tt)?|mathrm|mathbf|mbox)\s?\{([^{}]{0,200})\}")
_MATH = re.compile(r"\\[()\[\]]|\$")
# Not <s> and <del>, nor Markdown's ~~: struck-out text is not the answer.
_ELEMENT = re.compile(r"</?(?!(?:s|del|strike)\b)[a-z]\w{0,15}(?:\s[^<>]{0,80})?/?>", re.IGNORECASE)
_MARKS = re.compile(r"[*_`#>|\"“”„‟«»‹›「」『』]+|(?<!\w)'|'(?!\w)")
_BEFORE, _AFTER = " .,;:·•…([{–—-", " .,;:!。、…)]}–—-"

_PICTURE = (
    r"(?:image|photo|photograph|picture|drawing|painting|sketch|illustration|scene|rendering|cartoon|artwork|figure)"
)
_PLACE = (
    r"(?:(?: (?:is )?(?:shown|depicted|pictured|seen|visible|represented|portrayed|displayed|present))?"
    rf" (?:in|of|on) (?:the|this|that) (?:given |provided )?{_PICTURE}| here)??"
)
_NOUN = (
    r"(?:(?:final|correct|best|right|chosen|selected|main|predicted|matching|depicted) )??"
    r"(?:answer|class|classification|category|label|conclusion|option|choice|match|prediction|object|subject|item|thing"
    rf"|animal|creature|vehicle|(?:type|kind|class|name) of (?:the |this )??(?:object|thing|animal|item)|{_PICTURE})"
)
_LEAD = (
    r"(?:(?:so|therefore|thus|hence|overall|finally|conclusion|in (?:conclusion|summary)|to (?:conclude|summarize)"
    r"|based on (?:this|the (?:above|analysis|evidence|reasoning|visible (?:parts|features))))[,:]? )??"
)
_IS = (
    r" is:?| ?:| ?=>?| ?->| ?→| must be| is of| shows| depicts| contains| represents| belongs to"
    r"| (?:is|can be) (?:best )?(?:identified|classified|categorized|labeled|described|recognized) as"
)
_SAYS = (
    rf"(?:(?:(?:(?:the|this|my) )??{_NOUN}{_PLACE}(?:{_IS})|(?:it|this|that)(?: is| must be|'s)|there is"
    r"|(?:i|we) (?:would )?(?:conclude|choose|pick|answer|select|see)(?: that)?(?: (?:it|this)(?: is|'s))?:?) "
    r"(?:(?:clearly|definitely|certainly|indeed|therefore|thus|obviously|undoubtedly) )??)??"
)
_OF = rf"(?:(?:an? |the )?{_PICTURE} of |(?:the )?(?:class|category|option|label):? )??"
_TAIL = (
    rf"(?: (?:class|category|option))??{_PLACE}"
    r"(?: (?:from|among|of|in) the (?:given |provided |listed |available )?(?:options|list))??"
)


def read_class(answer: str, class_names: Sequence[str]) -> int | None:
    """Return the index of the one class that ``answer`` names, or None.

    Args:
        answer: a name, or a short sentence that states it.
        class_names: of the task.
    """
    exact = match_class(answer, class_names)
    if exact is not None or len(answer) > 400:
        return exact
    names, frame = _frame(tuple(class_names))
    found = frame.fullmatch(_plain(answer))
    return names[found["name"]] if found else None


def classes_in(text: str, class_names: Sequence[str]) -> set[int]:
    """Return the classes that ``text`` mentions as separate words; of nested names, the longer one."""
    mentioned = (match_class(name, class_names) for name in mention(tuple(class_names)).findall(text)) if text else ()
    return {index for index in mentioned if index is not None}


@lru_cache(maxsize=16)
def _frame(class_names: tuple[str, ...]) -> tuple[dict[str, int], re.Pattern[str]]:
    """Return the plain names, without those that two classes share, and the pattern of an answer.

    Optional parts are lazy and longer names come first, so that words that may be part of a name ("The Thing") are.
    """
    plain = [_plain(name) for name in class_names]
    names = {name: index for index, name in enumerate(plain) if name and plain.count(name) == 1}
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"
    return names, re.compile(rf"{_LEAD}{_SAYS}{_OF}(?:(?:an?|the|one) )??(?P<name>{either}){_TAIL}")


def _plain(answer: str) -> str:
    """Return an answer without markup, quotes and outer punctuation, in lower case, hyphens as spaces."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", html.unescape(answer)))
    text = _LATEX.sub(r"\1", _LATEX.sub(r"\1", _MATH.sub("", text)))
    text = _MARKS.sub(" ", _APOSTROPHES.sub("'", _ELEMENT.sub(" ", text)))
    return " ".join(re.sub(r"(?<=\w)[-‐‑](?=\w)", " ", text).casefold().split()).lstrip(_BEFORE).rstrip(_AFTER)
