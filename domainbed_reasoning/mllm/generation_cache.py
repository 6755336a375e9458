"""A cache of greedy answers, valid as long as the weights do not change.

DomainBed evaluates every split at the end of every stage, and SARR's next round begins with the same weights: the
chains of its labeller are those that the evaluation has just written, and no number changes when they are not written
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_STATES = 2  # a round's labeler, and the model that is evaluated meanwhile

Key = tuple[str, int, bytes]  # question, maximum tokens, digest of the image


class AnswerCache:
    """Greedy answers by state of the weights; the two most recently used states are kept."""

    def __init__(self) -> None:
        self._answers: dict[bytes, dict[Key, str]] = {}

    def of(self, state: bytes) -> dict[Key, str]:
        """Return the answers of a state, to look up and to extend."""
        self._answers[state] = self._answers.pop(state, {})  # most recently used last
        while len(self._answers) > _STATES:
            del self._answers[next(iter(self._answers))]
        return self._answers[state]


def state_of(weights: Iterable[torch.Tensor]) -> bytes:
    """Return a digest of all bytes of the tensors; at 8B with rank 8 they are 80 MB."""
    digest = hashlib.blake2b(digest_size=16)
    for weight in weights:
        digest.update(weight.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.digest()


def digests_of(images: torch.Tensor) -> list[bytes]:
    """Return a digest of each image's bytes, ``(n, 3, H, W)`` uint8."""
    pixels = images.contiguous().cpu().numpy()
    return [hashlib.blake2b(image, digest_size=16).digest() for image in pixels]
