"""What the model is asked about a picture while it is aligned, and the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from examples.real_small.pictures import Picture

CAPTION_QUESTIONS = (
    "What is in this picture?",
    "Describe the image in one sentence.",
    "What does the picture show?",
    "Write a caption for this image.",
)
CHAIN_QUESTION, CAPTION_QUESTION, CLASS_QUESTION = "chain", "caption", "class"


def with_article(name: str) -> str:
    """Return ``a dog``, ``an axe``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def options_for(name: str, picture: Picture, names: Sequence[str], count: int, rng: random.Random) -> tuple[str, ...]:
    """Return ``count`` options in random order: ``name`` and others that are not the picture's name or kind."""
    others = rng.sample(names, min(count + 2, len(names)))
    wrong = [other for other in others if other not in (name, picture.name, picture.kind)][: count - 1]
    options = [name, *wrong]
    rng.shuffle(options)
    return tuple(options)


def write_chain(picture: Picture, name: str, options: Sequence[str], rng: random.Random) -> str:
    """Return a five-stage chain from what is known of the picture: its style, its tags, the other options."""
    tags = [tag for tag in picture.tags if tag not in name.split()][:4]
    wrong = [option for option in options if option != name][:2]
    seen = rng.choice(("The shape is that of", "The outline fits", "The main object looks like"))
    reasoning = f"{seen} {with_article(name)}"
    if tags:
        reasoning += f", which goes with {', '.join(tags)}"
    reasoning += f". It is not {' or '.join(map(with_article, wrong))}." if wrong else "."
    return Chain(
        summary=rng.choice(
            (
                "I will look at the main object and compare it with the options.",
                "I will identify what the picture shows and choose the matching option.",
            )
        ),
        caption=rng.choice(
            (
                f"The image is a {picture.style} of {with_article(name)}.",
                f"A {picture.style} that shows {with_article(name)}.",
            )
        ),
        reasoning=reasoning,
        reflection=rng.choice(
            (
                f"A {picture.style} can differ from the real thing, but the shape is clear.",
                "Nothing else in the image contradicts this.",
            )
        ),
        conclusion=name,
    ).render()


def ask(picture: Picture, kinds: dict[str, float], names: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Return a question about a picture and its answer.

    Args:
        picture: what the question is about; a picture with a general name is called by it half of the time.
        kinds: weights of ``caption``, ``class`` and ``chain``.
        names: what other options are drawn from.
        rng: what randomness comes from.
    """
    name = picture.kind if picture.kind and rng.random() < 0.5 else picture.name
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == CAPTION_QUESTION:
        answer = rng.choice((f"A {picture.style} of {with_article(name)}.", f"The picture shows {with_article(name)}."))
        return rng.choice(CAPTION_QUESTIONS), answer
    options = options_for(name, picture, names, rng.randint(2, 7), rng)
    if kind == CLASS_QUESTION:
        return q_cls(options), name
    return q_reason(options), write_chain(picture, name, options, rng)
