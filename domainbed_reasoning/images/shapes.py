"""Images, labels and chains of ShapesReasoning: creatures made of parts, in four styles. PIL and numpy only.

A creature has four parts (body, head, feet and coat) of three kinds each. A class is a code of four kinds; any two of
the seven codes differ in at least three parts (they are words of the ternary tetracode, which corrects one error), so
an image with one altered part is still closest to a single class. The background's hue is a spurious cue: in source
domains it is the class's hue with probability ``rho``; where it misleads, it is another class's hue.

An image depends only on (domain, index). Random numbers are from ``numpy.random.RandomState``, whose stream is stable
across versions of numpy.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.images import shapes_teacher

IMAGE_SIZE = 48
DOMAINS = ("photo", "cartoon", "sketch", "negative")
CLASS_NAMES = ("blicket", "dax", "fep", "gorp", "tove", "wug", "zorb")
PARTS = ("body", "head", "feet", "coat")
KINDS = (
    ("round", "square", "pointed"),
    ("horned", "eared", "crested"),
    ("legged", "wheeled", "sledded"),
    ("plain", "banded", "dotted"),
)
TEACHERS = ("own", "other")
TETRACODE = tuple((a, b, (a + b) % 3, (a + 2 * b) % 3) for a in range(3) for b in range(3))
CODES = TETRACODE[1:8]  # one code per class, in the order of CLASS_NAMES

PER_CLASS = 20
SIZE_OF_DOMAIN = len(CLASS_NAMES) * PER_CLASS
ALTERED = 0.15  # share of the images with one part altered
RHO = 0.8  # probability that the background's hue is the cue rather than random
MISLEADING_SHIFT = 3  # class c gets the hue of class c + 3 (modulo 7) where the cue misleads

_SEED = 2602
_OVERSAMPLE = 3


@dataclass(frozen=True)
class Style:
    """The rendering style of a creature.

    Attributes:
        fill: ``flat``, ``shaded`` (lighter at the upper left) or ``none`` (outlines on the background).
        outline: width of the outlines in pixels, 0 for none.
        ink: lightness of the outlines in [0, 1]; None takes the creature's own hue, bright.
        paper: lowest and highest lightness of the background, in [0, 1].
        tint: lowest and highest saturation of the background, in [0, 1].
        body: lowest and highest lightness of the creature, in [0, 1].
        vivid: lowest and highest saturation of the creature, in [0, 1].
        gradient: how much the background's lightness changes from top to bottom.
        noise: standard deviation of the pixel noise, in [0, 1].
        blur: radius of the blur in pixels.
        wobble: standard deviation of the corners' displacement, in body radii.
        inverted: whether the picture is shown as its negative. The background keeps its hue.
        mosaic: side of the picture's tiles in pixels, 1 for none.
        jitter: variation of size, position and rotation; at 1 by 12%, 3 pixels and 11 degrees.
        scale: size of the creature, relative to a body radius of 22% of the image.
        blades: minimum and maximum number of blades of grass in front of the creature.
        contrast: of the image, around its mean; 1 leaves it unchanged.
    """

    fill: str = "flat"
    outline: float = 0.0
    ink: float | None = 0.0
    paper: tuple[float, float] = (0.6, 0.9)
    tint: tuple[float, float] = (0.4, 0.7)
    body: tuple[float, float] = (0.4, 0.8)
    vivid: tuple[float, float] = (0.5, 0.9)
    gradient: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    wobble: float = 0.0
    inverted: bool = False
    mosaic: int = 1
    jitter: float = 1.0
    scale: float = 1.0
    blades: tuple[int, int] = (0, 0)
    contrast: float = 1.0


STYLES = {
    "photo": Style(
        fill="shaded", paper=(0.55, 0.8), tint=(0.35, 0.6), body=(0.1, 0.3), vivid=(0.1, 0.5), gradient=0.3,
        noise=0.06, blur=0.6, jitter=0.4,
    ),
    "cartoon": Style(
        outline=1.4, ink=0.0, paper=(0.8, 0.95), tint=(0.45, 0.75), body=(0.35, 0.5), vivid=(0.6, 1.0), jitter=0.4,
    ),
    "sketch": Style(
        outline=1.2, ink=0.1, paper=(0.85, 0.97), tint=(0.2, 0.35), body=(0.5, 0.6), vivid=(0.0, 0.0), noise=0.05,
        wobble=0.04, jitter=0.4,
    ),
    "negative": Style(
        fill="shaded", outline=0.8, ink=0.1, paper=(0.5, 0.75), tint=(0.4, 0.7), body=(0.1, 0.3), vivid=(0.3, 0.8),
        gradient=0.25, noise=0.04, blur=0.4, inverted=True, jitter=0.4,
    ),
}  # fmt: skip


def label(domain: int, index: int) -> int:
    """Return the class of an image, in [0, 7).

    Raises:
        IndexError: when there is no such domain or the index is negative.
    """
    _check(domain, index)
    return index % len(CLASS_NAMES)


def code(domain: int, index: int) -> tuple[int, ...]:
    """Return the kinds of the four drawn parts, alterations included: four numbers in [0, 3)."""
    kinds = list(CODES[label(domain, index)])
    random = _random(domain, index, 0)
    if random.random_sample() < ALTERED:
        part = random.randint(len(PARTS))
        kinds[part] = (kinds[part] + 1 + random.randint(2)) % 3
    return tuple(kinds)


def chain(domain: int, index: int, teacher: str = "own", rho: float = RHO) -> str:
    """Return the teacher's chain for a source-domain image: a description and the true class as the conclusion.

    Args:
        domain: position in ``DOMAINS``.
        index: of the image.
        teacher: ``own`` for the embedded model's style, ``other`` for longer, varied chains (`shapes_teacher`).
        rho: of the images; determines the background that the other teacher describes.
    """
    name, kinds = label(domain, index), code(domain, index)
    if teacher == "own":
        return describe(kinds, CLASS_NAMES[name], CODES[name])
    hue, _ = background(domain, index, misleading=False, rho=rho)
    return describe_at_length(kinds, CLASS_NAMES[name], CODES[name], hue, _random(domain, index, 2))


def describe(kinds: Sequence[int], name: str, its_code: Sequence[int]) -> str:
    """Return the chain for a creature with these kinds and the conclusion ``name``, a class with code ``its_code``.

    Short on purpose: the chain term is a mean over tokens, in which boilerplate would dominate.
    """
    odd = odd_parts(kinds, its_code)
    words = [KINDS[part][kind] for part, kind in enumerate(kinds)]
    return Chain(
        summary="compare parts",
        caption=", ".join(words),
        reasoning=f"{('all', 'three', 'two', 'one', 'none')[len(odd)]} fit {name}",
        reflection=f"{' '.join(odd) or 'nothing'} odd",
        conclusion=name,
    ).render()


def describe_at_length(
    kinds: Sequence[int], name: str, its_code: Sequence[int], hue: float, random: np.random.RandomState
) -> str:
    """Return the chain of `describe` in the other teacher's style, which mentions the background's hue, in [0, 1)."""
    words = [KINDS[part][kind] for part, kind in enumerate(kinds)]
    return Chain(
        summary=shapes_teacher.opening(random),
        caption=shapes_teacher.caption(words, PARTS, hue, random),
        reasoning=shapes_teacher.verdict(name, random),
        reflection=shapes_teacher.doubt(odd_parts(kinds, its_code), random),
        conclusion=name,
    ).render()


def odd_parts(kinds: Sequence[int], its_code: Sequence[int]) -> list[str]:
    """Return the parts whose kind differs from a class's code."""
    return [part for part, kind, expected in zip(PARTS, kinds, its_code, strict=True) if kind != expected]


def class_in_caption(caption: str) -> int | None:
    """Return the class whose parts a caption names, allowing one mismatch; None if there is no such class.

    A part counts as a mismatch if the caption names none or several of its kinds. No two classes are that close.
    """
    words = set(caption.casefold().replace(",", " ").split())
    mentioned = [[kind for kind, word in enumerate(of_part) if word in words] for of_part in KINDS]
    for name, its_code in enumerate(CODES):
        if sum(kinds != [expected] for kinds, expected in zip(mentioned, its_code, strict=True)) <= 1:
            return name
    return None


def with_parts_of(name: int, caption: str) -> str:
    """Return a caption with its parts replaced by those of a class."""
    for of_part, kind in zip(KINDS, CODES[name], strict=True):
        caption = re.sub(rf"\b(?:{'|'.join(of_part)})\b", of_part[kind], caption)
    return caption


def cue_hue(name: int) -> float:
    """Return the background hue of a class, in [0, 1)."""
    return name / len(CLASS_NAMES)


def render(domain: int, index: int, *, misleading: bool, rho: float = RHO) -> Image.Image:
    """Return an image (RGB, 48 x 48) of a domain.

    Args:
        domain: position in ``DOMAINS``.
        index: of the image, 0 or above; the dataset uses the first ``SIZE_OF_DOMAIN`` by default.
        misleading: whether the background's hue is another class's, as in target domains.
        rho: probability in [0, 1] that the hue is the cue; otherwise it is random.

    Raises:
        IndexError: when there is no such domain or the index is negative.
    """
    hue, random = background(domain, index, misleading=misleading, rho=rho)
    return paint(code(domain, index), STYLES[DOMAINS[domain]], hue, random)


def background(domain: int, index: int, *, misleading: bool, rho: float = RHO) -> tuple[float, np.random.RandomState]:
    """Return the background hue of `render`'s image, in [0, 1), and the random state for the rest."""
    random = _random(domain, index, 1)
    shift = MISLEADING_SHIFT if misleading else 0
    cue = cue_hue((label(domain, index) + shift) % len(CLASS_NAMES))
    by_cue, any_hue = random.random_sample() < rho, random.random_sample()
    jitter = random.uniform(-0.03, 0.03)
    return (cue + jitter if by_cue else any_hue) % 1.0, random


def paint(kinds: Sequence[int], style: Style, hue: float, random: np.random.RandomState) -> Image.Image:
    """Return an image (RGB, 48 x 48) of a creature with these four kinds on a background with this hue in [0, 1)."""
    side = IMAGE_SIZE * _OVERSAMPLE
    light = random.uniform(*style.paper)
    paper = _color(hue + 0.5 if style.inverted else hue, random.uniform(*style.tint), light)
    body, coat = _creature_colors(style, light, random)
    image = _background(side, paper, style.gradient * random.uniform(-1, 1))
    _draw_parts(image, kinds, style, body, coat, paper, random)
    if style.blades[1]:
        _draw_blades(image, style, paper, random)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(style.blur))
    pixels = np.asarray(image, dtype=np.float64)
    if style.contrast != 1.0:
        pixels = pixels.mean() + style.contrast * (pixels - pixels.mean())
    if style.noise:
        pixels = pixels + 255 * style.noise * random.standard_normal(pixels.shape)
    pixels = np.clip(np.rint(pixels), 0, 255)
    if style.inverted:
        pixels = 255 - pixels
    image = Image.fromarray(pixels.astype(np.uint8))
    if style.mosaic > 1:
        small = IMAGE_SIZE // style.mosaic
        image = image.resize((small, small), Image.Resampling.BOX)
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)
    return image


def _check(domain: int, index: int) -> None:
    if not 0 <= domain < len(DOMAINS):
        raise IndexError(f"ShapesReasoning has domains 0 to {len(DOMAINS) - 1} ({', '.join(DOMAINS)}), got {domain}.")
    if index < 0:
        raise IndexError(f"ShapesReasoning image indices start at 0, got {index}.")


def _random(domain: int, index: int, stream: int) -> np.random.RandomState:
    _check(domain, index)
    return np.random.RandomState([_SEED, domain, index, stream])


def _color(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


def _creature_colors(
    style: Style, light: float, random: np.random.RandomState
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the colors of the creature and its coat, distinct from each other and from the background."""
    hue, vivid = random.random_sample(), random.uniform(*style.vivid)
    value = random.uniform(*style.body)
    if abs(value - light) < 0.25:  # too close to the background to be visible
        value = light - 0.3 if light > 0.5 else light + 0.3
    coat = value - 0.6 if value > 0.5 else value + 0.6
    return _color(hue, vivid, value), _color(hue + random.uniform(-0.2, 0.2), vivid / 2, coat)


def _background(side: int, paper: tuple[int, int, int], slope: float) -> Image.Image:
    ramp = 1.0 + slope * np.linspace(-0.5, 0.5, side)[:, None, None]
    pixels = np.broadcast_to(np.asarray(paper, dtype=np.float64) * ramp, (side, side, 3))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _circle(x: float, y: float, radius: float, corners: int = 20) -> list[tuple[float, float]]:
    turns = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# Outlines in body radii, with the body's center at (0, 0) and y pointing down.
_BODIES = (_circle(0, 0, 1.0), _box(-0.92, -0.92, 0.92, 0.92), [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)])
_HEADS = (
    [[(-0.75, -0.3), (-0.95, -1.8), (-0.15, -0.7)], [(0.75, -0.3), (0.95, -1.8), (0.15, -0.7)]],
    [_circle(-0.65, -1.1, 0.48), _circle(0.65, -1.1, 0.48)],
    [_box(-0.28, -1.8, 0.28, -0.5)],
)
_FEET = (
    [_box(-0.68, 0.3, -0.34, 1.8), _box(0.34, 0.3, 0.68, 1.8)],
    [_circle(-0.62, 1.2, 0.48), _circle(0.62, 1.2, 0.48)],
    [_box(-1.25, 1.15, 1.25, 1.6), _box(-0.15, 0.8, 0.15, 1.3)],
)
_COATS: tuple[list[list[tuple[float, float]]], ...] = ([], [_box(-1.4, -0.26, 1.4, 0.26)], [_circle(0, 0, 0.46)])


def _draw_parts(
    image: Image.Image,
    kinds: Sequence[int],
    style: Style,
    body: tuple[int, int, int],
    coat: tuple[int, int, int],
    paper: tuple[int, int, int],
    random: np.random.RandomState,
) -> None:
    """Draw head, feet, body and coat onto ``image``, slightly moved, rotated and scaled."""
    side = image.width
    radius = side * style.scale * (0.22 + style.jitter * random.uniform(-0.03, 0.025))
    x = side * (0.5 + style.jitter * random.uniform(-0.07, 0.07))
    y = side * (0.5 + style.jitter * random.uniform(-0.04, 0.04))
    turn = style.jitter * random.uniform(-0.2, 0.2)
    cosine, sine = math.cos(turn), math.sin(turn)
    bare = style.fill == "none"
    ink = _color(0, 0, style.ink) if style.ink is not None else _color(random.random_sample(), 0.8, 0.95)
    width = round(style.outline * _OVERSAMPLE)

    def place(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        moved = np.asarray(corners) + style.wobble * random.standard_normal((len(corners), 2))
        return [(x + radius * (cosine * u - sine * v), y + radius * (sine * u + cosine * v)) for u, v in moved.tolist()]

    def shape(target: Image.Image, corners: list[tuple[float, float]], color: tuple[int, int, int]) -> None:
        draw = ImageDraw.Draw(target)
        draw.polygon(corners, fill=paper if bare else color)
        if width:
            draw.line([*corners, corners[0], corners[1]], fill=ink, width=width, joint="curve")

    for outline in [*_HEADS[kinds[1]], *_FEET[kinds[2]]]:
        shape(image, place(outline), body)
    torso = place(_BODIES[kinds[0]])
    shape(image, torso, body)
    for outline in _COATS[kinds[3]]:
        mark = image.copy()
        ImageDraw.Draw(mark).polygon(place(outline), fill=ink if bare else coat)
        mask = Image.new("L", image.size, 0)
        ImageDraw.Draw(mask).polygon(torso, fill=255)
        image.paste(mark, mask=mask)
    if style.fill == "shaded":
        _shade(image, x, y, radius)


def _draw_blades(image: Image.Image, style: Style, paper: tuple[int, int, int], random: np.random.RandomState) -> None:
    """Draw blades of grass on the lower edge, slightly lighter or darker than the background."""
    side = image.width
    draw = ImageDraw.Draw(image)
    for _ in range(random.randint(style.blades[0], style.blades[1] + 1)):
        foot, tip = side * random.uniform(0.1, 0.9), side * random.uniform(-0.12, 0.12)
        top, width = side * random.uniform(0.05, 0.4), side * random.uniform(0.03, 0.05)
        shade = random.uniform(0.7, 1.2)
        red, green, blue = (min(255, round(shade * value)) for value in paper)
        draw.polygon([(foot, side), (foot + width, side), (foot + tip, top)], fill=(red, green, blue))


def _shade(image: Image.Image, x: float, y: float, radius: float) -> None:
    """Shade the image with light from the creature's upper left."""
    rows, columns = np.mgrid[0 : image.height, 0 : image.width]
    distance = np.hypot(columns - (x - radius), rows - (y - radius)) / (2.5 * radius)
    light = np.clip(1.25 - 0.35 * distance, 0.75, 1.25)[:, :, None]
    image.paste(Image.fromarray(np.clip(np.rint(np.asarray(image) * light), 0, 255).astype(np.uint8)))
