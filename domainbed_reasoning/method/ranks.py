"""The ranks that share one job: micro-batches of an update, rows of a batch, images of an evaluation.

Every rank holds the whole model and draws the same batches. It computes its share, and the results are exchanged such
that all ranks go on with the same values: one all-reduce an update, one gather per batch of answers. With one process,
the default, nothing is exchanged and `torch.distributed` is not imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_EXCHANGE_SECONDS = 10.0  # between exchanges of `merge`: what a killed job loses of other ranks' items


class RankLost(RuntimeError):
    """Another rank has ended or cannot be reached."""


class Ranks:
    """This process among those that share a job.

    Args:
        rank: of this process, in [0, ``world``).
        world: number of processes; with more than one, the default group of `torch.distributed` is initialized.

    Attributes:
        stream: to be added to the purpose of random numbers that ranks draw for different rows; empty for rank 0.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.stream = (f"rank {rank}",) if rank else ()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's items: every ``world``-th."""
        return items[self.rank :: self.world]

    def map(self, rows: int, work: Callable[[slice], T]) -> list[T]:
        """Return the results of ``work`` for consecutive slices of the rows, in order; one for a single process.

        Args:
            rows: number of rows, at least 1. With fewer rows than ranks, the first ranks have none.
            work: computes a slice; its result must be picklable, with tensors on the CPU.

        Raises:
            RankLost: another rank has ended.
        """
        if self.world == 1:
            return [work(slice(0, rows))]
        mine = slice(rows * self.rank // self.world, rows * (self.rank + 1) // self.world)
        parts = self.gather([work(mine)] if mine.stop > mine.start else [])
        return [result for part in parts for result in part]

    def merge(self, own: Iterator[T]) -> Iterator[T]:
        """Yield the items of all ranks: this rank's as they come, the others' every `_EXCHANGE_SECONDS`.

        Args:
            own: this rank's items, picklable.

        Raises:
            RankLost: another rank has ended.
        """
        if self.world == 1:
            yield from own
            return
        all_ended = False
        while not all_ended:
            part, ended, started = [], True, time.monotonic()
            for item in own:
                yield item
                part.append(item)
                if time.monotonic() - started > _EXCHANGE_SECONDS:
                    ended = False
                    break
            parts = self.gather((part, ended))
            all_ended = all(ended for _, ended in parts)
            for rank, (items, _) in enumerate(parts):
                if rank != self.rank:
                    yield from items

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, which must be picklable.

        Raises:
            RankLost: another rank has ended.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        with _exchange():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Return rank 0's value, which must be picklable; other ranks' are ignored.

        Raises:
            RankLost: another rank has ended.
        """
        if self.world == 1:
            return value
        import torch.distributed as dist

        values: list[Any] = [value]
        with _exchange():
            dist.broadcast_object_list(values, src=0)
        received: T = values[0]
        return received

    def agreed(self, digest: str) -> str:
        """Return the digest of the trained tensors, which must be the same on all ranks.

        Raises:
            RankLost: another rank has ended.
            RuntimeError: they differ.
        """
        if len(set(self.gather(digest))) > 1:
            raise RuntimeError(
                "The ranks' adapters differ although all took the same updates: their GPUs or libraries compute "
                "different numbers. Use GPUs of one kind, or run the job on one GPU."
            )
        return digest

    def add_up(
        self,
        parameters: Sequence[torch.Tensor],
        others: Sequence[torch.Tensor],
        sums: Mapping[str, Sequence[torch.Tensor]],
        counts: Mapping[str, int],
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Add up what ranks have computed for an update, in one all-reduce and with one device-to-host transfer.

        Args:
            parameters: the trained tensors. Their ``.grad`` becomes the sum; it stays None if no rank has one.
            others: further tensors, replaced by their sum in place.
            sums: by name, this rank's scalars.
            counts: by name, this rank's counts.

        Returns:
            The totals of ``sums`` and of ``counts``.

        Raises:
            RankLost: another rank has ended.
        """
        import torch.distributed as dist

        device = parameters[0].device
        here = torch.tensor([float(weight.grad is not None) for weight in parameters] + [*map(float, counts.values())])
        scalars = [torch.stack([*each]).sum() if each else torch.zeros((), device=device) for each in sums.values()]
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters]
        flat = torch.cat([part.reshape(-1).float() for part in [*gradients, *others, here.to(device), *scalars]])
        with _exchange():
            dist.all_reduce(flat)
        sizes = [part.numel() for part in [*gradients, *others]]
        *parts, tail = flat.split([*sizes, len(flat) - sum(sizes)])
        read = iter(tail.tolist())
        for weight, total in zip(parameters, parts, strict=False):
            weight.grad = total.view_as(weight).to(weight.dtype) if next(read) else None
        for other, total in zip(others, parts[len(parameters) :], strict=True):
            other.copy_(total.view_as(other))
        counted = {name: round(next(read)) for name in counts}
        return {name: next(read) for name in sums}, counted


@contextmanager
def _exchange() -> Iterator[None]:
    """Turn errors of the communication, of many types and texts, into one."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            "Another rank of this job has ended or cannot be reached. Rerun the same command to resume."
        ) from error
