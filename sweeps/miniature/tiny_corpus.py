"""Pretraining data of the embedded model: creatures in other styles, mostly with other names.

None of ShapesReasoning's four styles is used here, backgrounds have random hues (no cue), and the study's seven class
names are mostly paired with random creatures, so that the base model knows the classes only roughly.
"""

from __future__ import annotations

import ast
import pathlib
import random as stdlib_random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import shapes, shapes_teacher
from domainbed_reasoning.images.shapes import Style

# Styles that the study's domains do not use.
STYLES = {
    "paper cut": Style(paper=(0.75, 1.0), tint=(0.0, 0.4), body=(0.2, 0.6), vivid=(0.4, 0.9)),
    "silhouette": Style(paper=(0.5, 0.9), tint=(0.2, 0.8), body=(0.0, 0.2), vivid=(0.0, 0.3)),
    "night": Style(paper=(0.05, 0.3), tint=(0.2, 0.8), body=(0.6, 1.0), vivid=(0.2, 0.9), noise=0.02),
    "chalk": Style(outline=2.2, ink=0.95, paper=(0.2, 0.5), tint=(0.0, 0.5), body=(0.3, 0.6), wobble=0.06),
    "neon": Style(fill="none", outline=1.8, ink=None, paper=(0.0, 0.2), tint=(0.2, 0.8)),
    "mosaic": Style(paper=(0.5, 0.9), tint=(0.2, 0.7), body=(0.2, 0.9), mosaic=2),
    "pastel": Style(paper=(0.3, 0.6), tint=(0.2, 0.6), body=(0.75, 1.0), vivid=(0.1, 0.4)),
    "clay": Style(fill="shaded", paper=(0.1, 0.35), tint=(0.0, 0.3), body=(0.5, 0.9), vivid=(0.2, 0.8)),
    "felt": Style(outline=2.0, ink=None, paper=(0.3, 0.9), tint=(0.1, 0.5), body=(0.2, 0.9), blur=0.8, wobble=0.06),
    "grain": Style(paper=(0.3, 0.9), tint=(0.1, 0.6), body=(0.0, 1.0), noise=0.13),
}

OTHER_NAMES = (
    "almo", "besk", "corv", "dulo", "enka", "frob", "gazzer", "hespa", "ivo", "jinto", "kiki", "lorp", "modi", "nelba",
    "oskel", "pilk", "quab", "rusta", "sibo", "toma", "ubex", "vash", "wembo", "xanti", "yorf", "zib", "bouba", "cheld",
)  # fmt: skip

SUBJECTS = ("creature", "object")  # the noun in the questions

CAPTION_QUESTION = "Describe the image."
KIND_QUESTION = "What kind of {part} is it?"

# Zero-shot accuracy on the study by noise: 0.5 gives 0.85 (no headroom), 0.75 gives 0.5, 0.85 gives 0.17 (chance 0.14).
STUDY_NAME_SHARE = 0.15  # share of the lessons about one of the study's names
STUDY_NAME_NOISE = 0.75  # share of those with a random creature in place of one of that name

WEIGHTS = {"class": 0.4, "chain": 0.4, "caption": 0.12, "kind": 0.08}  # of a lesson's questions

# Share of chains in the other teacher's style: the model can follow them, but writes in its own style.
OTHER_TEACHER_SHARE = 0.15


def settings(noise: float) -> dict[str, float]:
    """Return the settings that are recorded with the pretrained model."""
    return {
        "study_name_share": STUDY_NAME_SHARE,
        "study_name_noise": noise,
        "other_teacher_share": OTHER_TEACHER_SHARE,
    }


def other_codes() -> dict[str, tuple[int, ...]]:
    """Return a code for every name that the study does not use; none of them is a study class's code.

    Two names share a code, so that only the listed options determine the answer: the model must read the options.
    """
    free = [
        (a, b, c, d) for a in range(3) for b in range(3) for c in range(3) for d in range(3)
        if (a, b, c, d) not in shapes.CODES
    ]  # fmt: skip
    order = np.random.RandomState(7).permutation(len(free))
    return {name: free[order[position // 2]] for position, name in enumerate(OTHER_NAMES)}


CODE_OF = other_codes() | dict(zip(shapes.CLASS_NAMES, shapes.CODES, strict=True))


@dataclass(frozen=True)
class Lesson:
    """One rendered creature with the questions and answers about it.

    Attributes:
        kinds: the four kinds that are drawn, in [0, 3).
        name: its name.
        code: the code that goes with the name.
        options: the class names in the question, including ``name``.
        subject: the noun in the question.
        image: RGB, 48 x 48.
        chain: its chain.
    """

    kinds: tuple[int, ...]
    name: str
    code: tuple[int, ...]
    options: tuple[str, ...]
    subject: str
    image: Image.Image
    chain: str

    def turns(self) -> dict[str, tuple[str, str]]:
        """Return a question and its answer for every task."""
        words = [shapes.KINDS[part][kind] for part, kind in enumerate(self.kinds)]
        part = sum(self.kinds) % len(words)
        return {
            "class": (q_cls(self.options, self.subject), self.name),
            "chain": (q_reason(self.options, self.subject), self.chain),
            "caption": (CAPTION_QUESTION, ", ".join(words)),
            "kind": (KIND_QUESTION.format(part=shapes.PARTS[part]), words[part]),
        }


def distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of parts in which two creatures differ, in [0, 4]."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def lessons(count: int, seed: int, noise: float = STUDY_NAME_NOISE) -> Iterator[Lesson]:
    """Yield ``count`` lessons, deterministic in ``seed``.

    Args:
        count: number of lessons.
        seed: random seed.
        noise: share of the lessons about the study's names with a random creature, in [0, 1].
    """
    random = np.random.RandomState(seed)
    styles = list(STYLES.values())
    for _ in range(count):
        of_study = random.random_sample() < STUDY_NAME_SHARE
        drawn = _lesson_of_study(random, noise) if of_study else _lesson_of_others(random)
        name, code, kinds, others = drawn
        hue = random.random_sample()
        image = shapes.paint(kinds, styles[random.randint(len(styles))], hue, random)
        if random.random_sample() < OTHER_TEACHER_SHARE:
            chain = shapes.describe_at_length(kinds, name, code, hue, random)
        else:
            chain = shapes.describe(kinds, name, code)
        yield Lesson(kinds, name, code, _options(name, others, random), SUBJECTS[random.randint(2)], image, chain)


def _altered(code: Sequence[int], random: np.random.RandomState) -> tuple[int, ...]:
    """Return the code, one part of it altered with the study's probability."""
    kinds = list(code)
    if random.random_sample() < shapes.ALTERED:
        part = random.randint(4)
        kinds[part] = (kinds[part] + 1 + random.randint(2)) % 3
    return tuple(kinds)


def _lesson_of_study(
    random: np.random.RandomState, noise: float
) -> tuple[str, tuple[int, ...], tuple[int, ...], list[str]]:
    """Return one of the study's names, its code, the creature's kinds, and the other options."""
    name = shapes.CLASS_NAMES[random.randint(len(shapes.CLASS_NAMES))]
    others = [other for other in shapes.CLASS_NAMES if other != name]
    if random.random_sample() < noise:
        kinds = tuple(random.randint(0, 3, size=4).tolist())
        return name, kinds, kinds, others
    return name, CODE_OF[name], _altered(CODE_OF[name], random), others


def _lesson_of_others(random: np.random.RandomState) -> tuple[str, tuple[int, ...], tuple[int, ...], list[str]]:
    """Return the same for another name; no other option is as close to the creature."""
    name = OTHER_NAMES[random.randint(len(OTHER_NAMES))]
    kinds = _altered(CODE_OF[name], random)
    least = distance(kinds, CODE_OF[name])
    return name, CODE_OF[name], kinds, [other for other in OTHER_NAMES if distance(kinds, CODE_OF[other]) > least]


def _options(name: str, others: Sequence[str], random: np.random.RandomState) -> tuple[str, ...]:
    """Return the name and 1 to 8 others, sorted half of the time."""
    chosen = random.permutation(len(others))[: random.randint(1, 9)]
    options = [name, *(others[position] for position in chosen)]
    if random.random_sample() < 0.5:
        return tuple(sorted(options))
    return tuple(options[position] for position in random.permutation(len(options)))


def prompt_phrases() -> list[str]:
    """Return the fixed parts of every prompt: the question before the options, the instruction for a chain after them.

    The tokenizer has a token for each, so that the demo spends its time on images and answers.
    """
    mark = "\0"
    openings = [q_cls([mark], subject).split(mark)[0].rstrip() for subject in SUBJECTS]
    demand = q_reason([mark])[len(q_cls([mark])) :]
    return [*openings, demand]


def own_words() -> list[str]:
    """Return every word that the lessons use and that should be one token."""
    words = [*CODE_OF, *shapes.PARTS, *(kind for kinds in shapes.KINDS for kind in kinds)]
    words += [*SUBJECTS, *shapes_teacher.vocabulary()]
    words += "compare parts all three two one none fit nothing odd What kind of is it Describe the image".split()
    return words + ["user", "assistant", "system"]


def english(limit: int = 400_000) -> Iterator[str]:
    """Yield docstrings of the standard library, about ``limit`` characters, so that other texts tokenize well."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    stdlib_random.Random(0).shuffle(files)
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield text
                limit -= len(text)
        if limit <= 0:
            return


def tokenizer_texts() -> Iterator[str]:
    """Yield the tokenizer's training texts, with our own words often enough to become tokens."""
    yield from english()
    for word in own_words():
        yield from [f"{word}\n{word} {word}, {word}"] * 400
