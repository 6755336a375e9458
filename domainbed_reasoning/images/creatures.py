"""Images, labels and chains of the embedded benchmark's two regimes: creatures whose names the model knows.

As in `shapes`, a creature has four parts of three kinds each. There are twelve classes with two-word names; their codes
(a, b, c, a + b + c mod 3) differ in at least two parts, and no image has an altered part. The background's hue is
random. The regimes differ only in rendering: ``clear`` creatures are recognized well, like OfficeHome's images by
InternVL3; ``camouflaged`` ones are smaller, behind grass and low in contrast, like TerraIncognita's animals.

An image depends only on (regime, domain, index). Random numbers are from ``numpy.random.RandomState``, whose stream is
stable across versions of numpy. PIL and numpy only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from PIL import Image

from domainbed_reasoning.images import shapes
from domainbed_reasoning.images.shapes import DOMAINS as DOMAINS
from domainbed_reasoning.images.shapes import Style

FIRST_WORDS, SECOND_WORDS = ("kas", "dak", "fen", "mip"), ("lun", "gor", "tov")
CLASS_NAMES = tuple(f"{first} {second}" for first, second in itertools.product(FIRST_WORDS, SECOND_WORDS))
WORDS = tuple((a, b, c, (a + b + c) % 3) for a, b, c in itertools.product(range(3), repeat=3))
CODES = tuple(WORDS[word] for word in np.random.RandomState(2602).permutation(len(WORDS))[: len(CLASS_NAMES)])

PER_CLASS = 20
SIZE_OF_DOMAIN = len(CLASS_NAMES) * PER_CLASS
TEACHERS = ("own", "other")

_CLEAR = {
    "photo": replace(shapes.STYLES["photo"], jitter=1.0),
    "cartoon": replace(shapes.STYLES["cartoon"], jitter=0.8, outline=2.0, wobble=0.07),
    "sketch": replace(shapes.STYLES["sketch"], jitter=0.8, wobble=0.06),
    "negative": replace(shapes.STYLES["negative"], jitter=0.4, noise=0.03),
}
_CAMOUFLAGED = {
    "photo": replace(_CLEAR["photo"], scale=0.78, blades=(2, 4), contrast=0.65, noise=0.08),
    "cartoon": replace(_CLEAR["cartoon"], scale=0.77, blades=(2, 4), contrast=0.65, noise=0.06),
    "sketch": replace(_CLEAR["sketch"], scale=0.82, blades=(2, 4), contrast=0.75, noise=0.06),
    "negative": replace(_CLEAR["negative"], scale=0.91, blades=(2, 4), contrast=0.75, noise=0.05),
}
REGIMES: Mapping[str, Mapping[str, Style]] = {"clear": _CLEAR, "camouflaged": _CAMOUFLAGED}
REGIME_OF = {"ClearCreaturesReasoning": "clear", "CamouflagedCreaturesReasoning": "camouflaged"}  # by dataset

_SEED = 23777


def label(index: int) -> int:
    """Return the class of an image, in [0, 12)."""
    return index % len(CLASS_NAMES)


def render(regime: str, domain: int, index: int) -> Image.Image:
    """Return an image (RGB, 48 x 48) of a domain.

    Args:
        regime: one of `REGIMES`.
        domain: position in ``DOMAINS``.
        index: of the image, 0 or above.
    """
    hue, random = background(regime, domain, index)
    return shapes.paint(CODES[label(index)], REGIMES[regime][DOMAINS[domain]], hue, random)


def background(regime: str, domain: int, index: int) -> tuple[float, np.random.RandomState]:
    """Return the background hue of `render`'s image, in [0, 1), and the random state for the rest."""
    random = _random(regime, domain, index, 0)
    return random.random_sample(), random


def conclusion(regime: str, domain: int, index: int, error: float) -> int:
    """Return the conclusion of a teacher about an image, a class in [0, 12).

    Args:
        regime: one of `REGIMES`.
        domain: position in ``DOMAINS``.
        index: of the image.
        error: share of the images, in [0, 1], that the teacher confuses with one of the most similar classes.
    """
    random = _random(regime, domain, index, 1)
    return _similar(label(index), random) if random.random_sample() < error else label(index)


def chain(regime: str, domain: int, index: int, teacher: str = "other", error: float = 0.0) -> str:
    """Return the teacher's chain of an image: the parts and the name of the class that it concludes.

    Args:
        regime: one of `REGIMES`.
        domain: position in ``DOMAINS``.
        index: of the image.
        teacher: ``own`` for the embedded model's style, ``other`` for longer, varied chains (`shapes_teacher`).
        error: as for `conclusion`.
    """
    taken_for = conclusion(regime, domain, index, error)
    name, code = CLASS_NAMES[taken_for], CODES[taken_for]
    if teacher == "own":
        return shapes.describe(code, name, code)
    hue, _ = background(regime, domain, index)
    return shapes.describe_at_length(code, name, code, hue, _random(regime, domain, index, 2))


def _random(regime: str, domain: int, index: int, stream: int) -> np.random.RandomState:
    return np.random.RandomState([_SEED, list(REGIMES).index(regime), domain, index, stream])


def _similar(name: int, random: np.random.RandomState) -> int:
    """Return one of the classes whose codes differ from a class's in the fewest parts."""
    apart = [sum(a != b for a, b in zip(CODES[name], code, strict=True)) for code in CODES]
    nearest = [other for other, parts in enumerate(apart) if other != name and parts == min(filter(None, apart))]
    return nearest[random.randint(len(nearest))]
