"""Prompts and targets to rows: what a language model is fed and where it is supervised. Knows no model family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Right-padded rows of one prompt followed by each sample's target.

    Attributes:
        input_ids: ``(n, L)``.
        attention_mask: 1 on tokens, 0 on padding, ``(n, L)``.
        prompt_length: P, the same for every row.
        targets: the target tokens, padded with 0, ``(n, T)``.
        target_mask: True on target tokens, ``(n, T)``; token t is predicted at position P - 1 + t of its row.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_length: int
    targets: torch.Tensor
    target_mask: torch.Tensor

    @property
    def supervised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of the hidden state that predicts each target token, in the order of ``target_mask``."""
        row, token = self.target_mask.nonzero(as_tuple=True)
        return row, self.prompt_length - 1 + token


def build_rows(prompt: Sequence[int], targets: Sequence[Sequence[int]], pad: int, device: torch.device) -> Rows:
    """Return the rows ``prompt + targets[i]``.

    The last target token is not fed: nothing is predicted after it.

    Args:
        prompt: token ids with the image's placeholders, P > 0.
        targets: token ids of each sample's answer with its end token, none of them empty.
        pad: token id that fills short rows; masked out, so any id does.
        device: where the rows are built.
    """
    longest = max(map(len, targets))
    fed = [list(prompt) + list(target[:-1]) for target in targets]
    width = len(prompt) + longest - 1
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in fed], device=device)
    lengths = torch.tensor([len(row) for row in fed], device=device)
    attention_mask = (torch.arange(width, device=device) < lengths[:, None]).long()
    padded = torch.tensor([list(target) + [0] * (longest - len(target)) for target in targets], device=device)
    counts = torch.tensor([len(target) for target in targets], device=device)
    target_mask = torch.arange(longest, device=device) < counts[:, None]
    return Rows(input_ids, attention_mask, len(prompt), padded, target_mask)


@dataclass(frozen=True)
class Trie:
    """The targets of all classes as one tree, so that shared beginnings are computed once.

    Attributes:
        tokens: token of each inner node, ``(N,)``: tokens that are followed by another; parents stand before children.
        depths: number of tokens before it, ``(N,)``.
        visible: ``visible[i, j]`` is True where node j is i or an ancestor of i, ``(N, N)``.
        steps: for each class, its path: pairs of (node whose output predicts, token predicted); node -1 is the prompt.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    visible: torch.Tensor
    steps: tuple[tuple[tuple[int, int], ...], ...]


def build_trie(targets: Sequence[Sequence[int]]) -> Trie:
    """Return the trie of the targets (token ids with the end token, so that no target is another's beginning)."""
    nodes: dict[tuple[int, ...], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    steps = []
    for target in targets:
        path, at = [], -1
        for position, token in enumerate(target):
            path.append((at, token))
            if position == len(target) - 1:
                break  # the end token is predicted, never fed
            prefix = tuple(target[: position + 1])
            if prefix not in nodes:
                nodes[prefix] = len(tokens)
                tokens.append(token)
                parents.append(at)
            at = nodes[prefix]
        steps.append(tuple(path))
    visible = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    depths = torch.zeros(len(tokens), dtype=torch.long)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] = visible[parent]
            depths[node] = depths[parent] + 1
        visible[node, node] = True
    return Trie(torch.tensor(tokens, dtype=torch.long), depths, visible, tuple(steps))
