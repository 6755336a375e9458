"""Operations that a computation cannot do without, from the model's shape: what the limits of the ratios come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from domainbed_reasoning.sweeps.costs import Shape

LORA_RANK = 8


@dataclass(frozen=True)
class Step:
    """Operations of a batch.

    Attributes:
        vision: of the image encoder.
        language: of the decoder's linear layers.
        attention: of the decoder's attention, over the pairs of tokens that see each other.
        head: of the output head.
    """

    vision: float
    language: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.vision + self.language + self.attention + self.head


def pairs_of(rows: Sequence[tuple[int, int]]) -> float:
    """Return how many pairs of tokens see each other.

    Args:
        rows: of every stretch of tokens how many it follows (and sees), and how many it is; causal in itself.
    """
    return sum(length * before + length * (length + 1) / 2 for before, length in rows)


def forward(shape: Shape, n: int, images: float, rows: Sequence[tuple[int, int]], heads: int) -> Step:
    """Return the operations of a forward pass over a batch of n samples.

    Args:
        shape: of the model.
        n: samples.
        images: how often each sample's image is encoded.
        rows: a sample's stretches of tokens, see `pairs_of`.
        heads: positions of a sample at which the output head is asked.
    """
    tokens, language = sum(length for _, length in rows), shape.language
    attention = 4 * language.layers * language.width * pairs_of(rows)
    vision = images * shape.vision.forward(shape.patches)
    return Step(n * vision, n * 2 * language.weights * tokens, n * attention, n * 2 * shape.head * heads)


def training_step(
    shape: Shape, n: int, images: float, rows: Sequence[tuple[int, int]], supervised: int, rank: int = LORA_RANK
) -> Step:
    """Return the operations of forward and backward: frozen weights twice the forward, attention and adapters thrice.

    Args:
        shape: of the model.
        n: samples.
        images: how often each sample's image is encoded.
        rows: a sample's stretches of tokens, see `pairs_of`.
        supervised: positions of a sample at which the output head is asked.
        rank: of the adapters.
    """
    once = forward(shape, n, images, rows, supervised)
    tokens = sum(length for _, length in rows)
    vision = shape.vision
    patches = n * images * shape.patches
    vision_attention = patches * 4 * vision.layers * shape.patches * vision.width
    adapters = 6 * (vision.lora_weights(rank) * patches + shape.language.lora_weights(rank) * n * tokens)
    return Step(2 * once.vision + vision_attention, 2 * once.language + adapters, 3 * once.attention, 2 * once.head)
