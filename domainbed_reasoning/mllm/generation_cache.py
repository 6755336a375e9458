"""A cache of greedy answers, valid as long as the weights do not change.

DomainBed evaluates every split at the end of every stage, and SARR's next round begins with the same weights: the
chains of its labeler are those that the evaluation has just generated. The chains of an evaluation are generated at its
start, in full batches (`write_ahead`). Neither changes a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from domainbed_reasoning.mllm.language_model import LanguageModel

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
        digest.update(weight.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.digest()


def digests_of(images: torch.Tensor) -> list[bytes]:
    """Return a digest of each image's bytes, ``(n, 3, H, W)`` uint8."""
    pixels = images.contiguous().cpu().numpy()
    return [hashlib.blake2b(image, digest_size=16).digest() for image in pixels]


def keys_of(
    mllm: LanguageModel, images: torch.Tensor, question: str, max_new_tokens: int
) -> tuple[torch.Tensor, list[Key]]:
    """Return images, ``(n, 3, H, W)``, as the model sees them, and the keys of their cached answers."""
    pictures = mllm.pictures(images)
    return pictures, [(question, max_new_tokens, digest) for digest in digests_of(pictures)]


@torch.no_grad()
def write_ahead(
    mllm: Any,
    images: Iterable[torch.Tensor],
    question: str,
    max_new_tokens: int,
    batch: int,
    written: Mapping[bytes, str],
    merge: Callable[[Iterator[tuple[bytes, str]]], Iterator[tuple[bytes, str]]] = iter,
) -> Iterator[tuple[bytes, str]]:
    """Generate greedy answers and cache them for later calls of `MLLM.generate`.

    Args:
        mllm: an `MLLM` with frozen weights.
        images: ``(3, H, W)`` each, any number, consumed as needed.
        question: asked about every image.
        max_new_tokens: maximum length of an answer in tokens.
        batch: number of answers generated at a time.
        written: answers of an earlier process, by digest of the image, to be added to the cache.
        merge: adds the answers of other processes to this one's, as `method.ranks` does.

    Yields:
        The digest of an image and its answer, in the order in which answers end; nothing for cached answers.
    """
    known = mllm.answer_cache.of(mllm.frozen_state)
    known.update({(question, max_new_tokens, digest): text for digest, text in written.items()})
    new: list[Key] = []

    def unknown() -> Iterator[torch.Tensor]:
        begun = set()
        for image in images:
            pictures, (key,) = keys_of(mllm, image[None], question, max_new_tokens)
            if key not in known and key not in begun:
                begun.add(key)
                new.append(key)
                yield pictures[0]

    def answers() -> Iterator[tuple[bytes, str]]:
        for row, tokens in mllm.generator.stream(unknown(), question, max_new_tokens, batch):
            (text,) = mllm.generator.texts([tokens])
            yield new[row][2], text

    for digest, text in merge(answers()):
        known[question, max_new_tokens, digest] = text
        yield digest, text
