"""Seeds, splits, weights, accuracy and printing."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


def seed_hash(*args: Any) -> int:
    """Return a seed in [0, 2**31) that depends on all of ``args``."""
    return int(hashlib.md5(str(args).encode("utf-8")).hexdigest(), base=16) % 2**31


class _SplitDataset(Dataset):
    """The items of ``underlying_dataset`` at ``keys``."""

    def __init__(self, underlying_dataset: Any, keys: Sequence[int]) -> None:
        self.underlying_dataset, self.keys = underlying_dataset, list(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> Any:
        return self.underlying_dataset[self.keys[position]]


def split_dataset(dataset: Any, n: int, seed: int = 0) -> tuple[_SplitDataset, _SplitDataset]:
    """Return ``n`` random items, and the others."""
    if n > len(dataset):
        raise AssertionError(f"A dataset of {len(dataset)} items has no split of {n}.")
    order = np.arange(len(dataset)).tolist()
    np.random.RandomState(seed).shuffle(order)
    return _SplitDataset(dataset, order[:n]), _SplitDataset(dataset, order[n:])


def make_weights_for_balanced_classes(dataset: Iterable) -> torch.Tensor:
    """Return a weight an item, with which every class is as likely as any other. Shape: (items,)."""
    labels = [int(label) for _, label in dataset]
    count = Counter(labels)
    return torch.tensor([1 / (count[label] * len(count)) for label in labels])


def accuracy(network: Any, loader: Iterable, weights: torch.Tensor | None, device: Any) -> float:
    """Return the (weighted) share of right predictions, in [0, 1]; one column of scores means two classes."""
    right = whole = 0.0
    start = 0
    network.eval()
    with torch.no_grad():
        for images, labels in loader:
            labels = labels.to(device)
            scores = network.predict(images.to(device))
            guess = scores.argmax(dim=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()
            share = torch.ones(len(labels)) if weights is None else weights[start : start + len(labels)]
            start += len(labels)
            right += ((guess == labels).float() * share.to(device)).sum().item()
            whole += share.sum().item()
    network.train()
    return right / whole


def print_separator() -> None:
    """Print a line of equal signs."""
    print(80 * "=")


def print_row(row: Sequence[Any], colwidth: int = 10, latex: bool = False) -> None:
    """Print cells of ``colwidth`` characters, floats with ten digits."""
    cells = [f"{cell:.10f}" if isinstance(cell, float | np.floating) else str(cell) for cell in row]
    between, end = (" & ", "\\\\") if latex else ("  ", "")
    print(between.join(cell.ljust(colwidth)[:colwidth] for cell in cells), end)


class Tee:
    """A stream that writes to stdout (of the moment it was made) and to a file."""

    def __init__(self, fname: str, mode: str = "a") -> None:
        self.outputs = (sys.stdout, open(fname, mode))  # noqa: SIM115

    def write(self, message: str) -> None:
        """Write to both, at once."""
        for stream in self.outputs:
            stream.write(message)
        self.flush()

    def flush(self) -> None:
        """Flush both."""
        for stream in self.outputs:
            stream.flush()
