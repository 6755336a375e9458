"""Two data loaders: an endless random one, and one that keeps its workers from pass to pass."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils import data


class _Endless(data.Sampler):
    """The batches of another sampler, again and again."""

    def __init__(self, batches: data.BatchSampler) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from self.batches


class InfiniteDataLoader:
    """Random batches with replacement, all of the same size, without end."""

    def __init__(self, dataset: Sized, weights: torch.Tensor | None, batch_size: int, num_workers: int) -> None:
        if weights is None:
            draw: data.Sampler = data.RandomSampler(dataset, replacement=True)
            if len(dataset) < batch_size:
                raise ValueError(
                    f"batch_size {batch_size} is larger than the {len(dataset)} items of a training environment: "
                    "no full batch can be drawn. Pass a smaller one, as --hparams '{\"batch_size\": 8}'."
                )
        else:
            draw = data.WeightedRandomSampler(weights, num_samples=batch_size, replacement=True)
        batches = _Endless(data.BatchSampler(draw, batch_size, drop_last=True))
        self._batches = iter(data.DataLoader(dataset, batch_sampler=batches, num_workers=num_workers))

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield next(self._batches)

    def __len__(self) -> int:
        raise ValueError("An endless loader has no length.")


class FastDataLoader:
    """Every item once a pass, in random order."""

    def __init__(self, dataset: Sized, batch_size: int, num_workers: int) -> None:
        batches = data.BatchSampler(data.RandomSampler(dataset), batch_size, drop_last=False)
        self._length = len(batches)
        self._batches = iter(data.DataLoader(dataset, batch_sampler=_Endless(batches), num_workers=num_workers))

    def __iter__(self) -> Iterator[Any]:
        return (next(self._batches) for _ in range(self._length))

    def __len__(self) -> int:
        return self._length
