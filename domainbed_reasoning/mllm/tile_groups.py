"""Likelihoods, class scores and generation for images of different numbers of tiles.

Images with equal numbers of tiles have prompts of equal length. A batch is therefore computed in groups, one for each
number of tiles, and every group by the same fast path as square images: shared rows, tries and slots. No row is padded
for another's tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.mllm.dynamic_tiles import DynamicTiles, groups_of
from domainbed_reasoning.mllm.generation import TextGenerator
from domainbed_reasoning.mllm.language_model import LanguageModel
from domainbed_reasoning.mllm.likelihood import LogLikelihoods
from domainbed_reasoning.mllm.transfer import take

_WAITING = 256  # images that are grouped at a time: 2 GB at 12 tiles of 448 pixels


@dataclass(frozen=True)
class Group:
    """Encoded images with equal numbers of tiles.

    Attributes:
        rows: their places in the batch.
        mllm: the model, for images with that number of tiles.
        encoded: the images, as its `encode` returns them.
    """

    rows: list[int]
    mllm: Any
    encoded: dict[str, Any]


class TileGroups:
    """Computes a batch in groups; the methods are those of `likelihood`.

    Args:
        tiles: cuts the images.
        make: returns the model for images with a given number of tiles.
    """

    def __init__(self, tiles: DynamicTiles, make: Callable[[int], Any]):
        self.tiles, self.make = tiles, make
        self._models: dict[int, Any] = {}

    def model(self, count: int) -> Any:
        """Return the model for images with ``count`` tiles; models share their weights."""
        if count not in self._models:
            self._models[count] = self.make(count)
        return self._models[count]

    def groups(self, columns: torch.Tensor) -> Iterator[tuple[list[int], Any, torch.Tensor]]:
        """Yield for each number of tiles the rows that have it, the model, and their images."""
        for count, rows in groups_of(self.tiles.counts(columns)).items():
            yield rows, self.model(count), columns if len(rows) == len(columns) else take(columns, rows)

    def encode(self, columns: torch.Tensor) -> dict[str, Any]:
        """Return encoded images, by number of tiles."""
        return {"groups": [Group(rows, mllm, mllm.encode(part)) for rows, mllm, part in self.groups(columns)]}

    def log_likelihoods(
        self, mllm: LanguageModel, encoded: dict[str, Any], question: str, answers: Sequence[str]
    ) -> LogLikelihoods:
        """Return log p of every token of each image's answer; see `MLLM.log_likelihoods`."""
        found = [
            (group.rows, group.mllm.log_likelihoods(group.encoded, question, [answers[row] for row in group.rows]))
            for group in encoded["groups"]
        ]
        values, mask = _joined(found)
        return values, mask

    def token_statistics(
        self, mllm: LanguageModel, encoded: dict[str, Any], question: str, answers: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-likelihoods, entropies and the mask of target tokens; see `MLLM.token_statistics`."""
        found = [
            (group.rows, group.mllm.token_statistics(group.encoded, question, [answers[row] for row in group.rows]))
            for group in encoded["groups"]
        ]
        values, entropies, mask = _joined(found)
        return values, entropies, mask

    def tree_log_likelihoods(
        self,
        mllm: LanguageModel,
        encoded: dict[str, Any],
        questions: tuple[str, str],
        answers: tuple[Sequence[str], Sequence[str]],
    ) -> tuple[LogLikelihoods, LogLikelihoods]:
        """Return what `log_likelihoods` does for two questions about each image, both of them in one row."""
        found = []
        for group in encoded["groups"]:
            a, b = ([texts[row] for row in group.rows] for texts in answers)
            pair = group.mllm.reading.tree_log_likelihoods(group.mllm, group.encoded, questions, (a, b))
            found.append((group.rows, pair))
        a, b = (_joined([(rows, pair[branch]) for rows, pair in found]) for branch in (0, 1))
        return (a[0], a[1]), (b[0], b[1])

    def class_scores(
        self, mllm: LanguageModel, images: torch.Tensor, question: str, names: Sequence[str]
    ) -> torch.Tensor:
        """Return log p(name, end | image, question) of every name, ``(n, C)``."""
        columns = mllm.pictures(images)
        found = [(rows, (own.class_scores(part, question, names),)) for rows, own, part in self.groups(columns)]
        return _joined(found)[0]


def _joined(found: Sequence[tuple[list[int], Sequence[torch.Tensor]]]) -> list[torch.Tensor]:
    """Return the groups' tensors, ``(rows, T)`` each, in the order of the batch, padded with 0 to the longest."""
    order = torch.tensor([row for rows, _ in found for row in rows]).argsort()
    joined = []
    for parts in zip(*(values for _, values in found), strict=True):
        width = max(part.shape[1] for part in parts)
        padded = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
        joined.append(padded if len(parts) == 1 else padded[order.to(padded.device)])
    return joined


class GroupedGenerator(TextGenerator):
    """Writes answers about images of different numbers of tiles, in groups.

    Args:
        mllm: the model.
        groups: of its images.
    """

    def __init__(self, mllm: LanguageModel, groups: TileGroups):
        super().__init__(mllm)
        self.tile_groups = groups

    def write(self, images: torch.Tensor, question: str, max_new_tokens: int, **sampling: Any) -> list[list[int]]:
        """Return the tokens of a new answer to the question about each image; see `TextGenerator.write`."""
        written: dict[int, list[int]] = {}
        for rows, mllm, part in self.tile_groups.groups(self.mllm.pictures(images)):
            written |= zip(rows, mllm.generator.write(part, question, max_new_tokens, **sampling), strict=True)
        return [written[row] for row in range(len(images))]

    def stream(
        self, images: Iterable[torch.Tensor], question: str, max_new_tokens: int, batch: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the number of each image and the tokens of its greedy answer; see `TextGenerator.stream`.

        Images are grouped among 256, or ``batch`` if that is more: fewer slots are refilled than with square images.
        """
        left, begun = iter(images), 0
        while waiting := list(itertools.islice(left, max(batch, _WAITING))):
            columns = self.mllm.pictures(torch.stack(waiting))
            for rows, mllm, part in self.tile_groups.groups(columns):
                for row, tokens in mllm.generator.stream(part, question, max_new_tokens, min(batch, len(rows))):
                    yield begun + rows[row], tokens
            begun += len(waiting)

    def generate_after(
        self, images: torch.Tensor, question: str, beginnings: Sequence[str], max_new_tokens: int, **sampling: Any
    ) -> list[str]:
        """Return what the model writes after what each answer begins with; see `TextGenerator.generate_after`."""
        written: dict[int, str] = {}
        for rows, mllm, part in self.tile_groups.groups(self.mllm.pictures(images)):
            begun = [beginnings[row] for row in rows]
            texts = mllm.generator.generate_after(part, question, begun, max_new_tokens, **sampling)
            written |= zip(rows, texts, strict=True)
        return [written[row] for row in range(len(images))]
