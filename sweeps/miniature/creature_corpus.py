"""Pretraining data of the model of the two regimes: creatures in other styles, with their names.

The study's names are those of its classes here, so the model knows them, as InternVL3 knows the names of OfficeHome.
None of the study's four styles occurs, and chains are in the model's own style. Of the teacher's style the model learns
one or two stages, as answers to a request for a long description, but no chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import creatures, shapes, shapes_teacher
from domainbed_reasoning.sweeps.miniature import tiny_corpus
from domainbed_reasoning.sweeps.miniature.tiny_corpus import CAPTION_QUESTION, KIND_QUESTION, STYLES, SUBJECTS

DESCRIPTION_QUESTION = "Describe the image at length."
WEIGHTS = {"class": 0.35, "chain": 0.35, "description": 0.16, "caption": 0.08, "kind": 0.06}  # of a lesson's questions

NAMED_SHARE = 0.8  # of the lessons; the others show any creature, and ask neither for a name nor for a chain
ALL_NAMES_SHARE = 0.6  # of the questions that offer all names, as the study's do


def settings() -> dict[str, float]:
    """Return the settings that are recorded with the pretrained model."""
    return {"named_share": NAMED_SHARE, "all_names_share": ALL_NAMES_SHARE}


@dataclass(frozen=True)
class Lesson:
    """One image of a creature, with the questions about it.

    Attributes:
        kinds: the four kinds that are drawn, in [0, 3).
        name: of its class; empty without one.
        options: the class names that the question offers, ``name`` among them.
        subject: the noun of the question.
        image: RGB, 48 x 48.
        description: one or two stages of the teacher's chain, without its conclusion.
    """

    kinds: tuple[int, ...]
    name: str
    options: tuple[str, ...]
    subject: str
    image: Image.Image
    description: str

    def turns(self) -> dict[str, tuple[str, str]]:
        """Return a question and its answer for every task."""
        words = [shapes.KINDS[part][kind] for part, kind in enumerate(self.kinds)]
        part = sum(self.kinds) % len(words)
        turns = {
            "description": (DESCRIPTION_QUESTION, self.description),
            "caption": (CAPTION_QUESTION, ", ".join(words)),
            "kind": (KIND_QUESTION.format(part=shapes.PARTS[part]), words[part]),
        }
        if self.name:
            chain = shapes.describe(self.kinds, self.name, self.kinds)
            turns["class"] = (q_cls(self.options, self.subject), self.name)
            turns["chain"] = (q_reason(self.options, self.subject), chain)
        return turns


def lessons(count: int, seed: int) -> Iterator[Lesson]:
    """Yield ``count`` lessons, the same for the same seed."""
    random = np.random.RandomState(seed)
    styles = list(STYLES.values())
    for _ in range(count):
        name, kinds = "", tuple(random.randint(0, 3, size=len(shapes.PARTS)).tolist())
        if random.random_sample() < NAMED_SHARE:
            label = random.randint(len(creatures.CLASS_NAMES))
            name, kinds = creatures.CLASS_NAMES[label], creatures.CODES[label]
        hue = random.random_sample()
        image = shapes.paint(kinds, styles[random.randint(len(styles))], hue, random)
        chain = shapes.describe_at_length(kinds, name or "that", kinds, hue, random)
        first = random.randint(4)
        description = "\n".join(chain.splitlines()[first : first + 1 + random.randint(2)][: 4 - first])
        yield Lesson(kinds, name, _options(name, random), SUBJECTS[random.randint(2)], image, description)


def _options(name: str, random: np.random.RandomState) -> tuple[str, ...]:
    """Return all names in their order, or the name and 1 to 8 others in any."""
    if not name or random.random_sample() < ALL_NAMES_SHARE:
        return creatures.CLASS_NAMES
    others = [other for other in creatures.CLASS_NAMES if other != name]
    chosen = random.permutation(len(others))[: random.randint(1, 9)]
    options = [name, *(others[position] for position in chosen)]
    return tuple(options[position] for position in random.permutation(len(options)))


def tokenizer_texts() -> Iterator[str]:
    """Yield texts for byte-pair merges, with our own words often enough to become tokens."""
    yield from tiny_corpus.english()
    words = [*creatures.FIRST_WORDS, *creatures.SECOND_WORDS, *shapes.PARTS]
    words += [kind for kinds in shapes.KINDS for kind in kinds]
    words += [*SUBJECTS, *shapes_teacher.vocabulary()]
    words += "compare parts all none fit nothing odd What kind of is it Describe the image at length".split()
    for word in [*words, "user", "assistant", "system"]:
        yield from [f"{word}\n{word} {word}, {word}"] * 400
