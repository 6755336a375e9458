"""ShapesReasoning's second teacher, with longer, randomly worded chains.

It simulates a large teacher of a small model. The embedded model's own chains name four parts and a class
(`shapes.describe`); this teacher's chains have the same five stages and facts, mixed with random phrases about view,
background and mood: the paper's pattern mismatch (arXiv 2602.23777), in which teacher chains focus on context,
viewpoint and background. The background's actual color is described, whether or not it is the cue. A share of
``tiny_corpus.OTHER_TEACHER_SHARE`` of the embedded model's training chains is of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COLORS = ("red", "orange", "lime", "green", "cyan", "blue", "violet", "pink")  # by hue, an eighth each from 0

OPENINGS = (
    "first the scene then what stands there",
    "begin with all that lies around",
    "go from far to near",
    "look at setting and build alike",
    "take time and see whole before small",
)
SEEN = ("here stands a creature", "one sees a creature", "there is a creature", "it shows a creature")
VIEWS = ("from near by", "at some distance", "a bit from below", "nearly head on", "turned to its left")
GROUNDS = ("on {} ground", "before {} walls", "under {} light", "with {} behind", "amid {} air")
VERDICTS = (
    "these parts are those of {}",
    "so built goes only {}",
    "all in all most like {}",
    "I would call that {}",
    "no other matches as well as {}",
)
DOUBTS = (
    "light and view may mislead",
    "colour says little here",
    "where it stands does not matter",
    "its mood is hard to tell",
    "much of this could be chance",
)


def color_of(hue: float) -> str:
    """Return the word for a hue in [0, 1)."""
    return COLORS[round(hue * len(COLORS)) % len(COLORS)]


def caption(words: Sequence[str], parts: Sequence[str], hue: float, random: np.random.RandomState) -> str:
    """Return the teacher's caption: view, background, and the parts from the coat up."""
    setting = f"{_any(SEEN, random)} {_any(VIEWS, random)} {_any(GROUNDS, random).format(color_of(hue))}"
    described = [f"{word} {part}" for word, part in zip(words, parts, strict=True)]
    return ", ".join([setting, *reversed(described)])


def verdict(name: str, random: np.random.RandomState) -> str:
    """Return the teacher's reasoning for a class."""
    return _any(VERDICTS, random).format(name)


def doubt(odd: Sequence[str], random: np.random.RandomState) -> str:
    """Return the teacher's doubts about its answer."""
    return f"{_any(DOUBTS, random)}, {' and '.join(odd) or 'no part'} odd"


def opening(random: np.random.RandomState) -> str:
    """Return the teacher's opening."""
    return _any(OPENINGS, random)


def vocabulary() -> list[str]:
    """Return all words that only this teacher uses."""
    phrases = [*OPENINGS, *SEEN, *VIEWS, *GROUNDS, *VERDICTS, *DOUBTS, "and no part odd", *COLORS]
    return sorted({word for phrase in phrases for word in phrase.replace("{}", " ").split()})


def _any(phrases: Sequence[str], random: np.random.RandomState) -> str:
    return phrases[random.randint(len(phrases))]
