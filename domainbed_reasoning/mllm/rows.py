"""Prompts and targets to rows: what a language model is fed and where it is supervised. Knows no model family."""

from __future__ import annotations

import functools
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
class TreeRows:
    """Rows of a shared prefix and two branches: both paths of a sample in one row, ``[prefix | trunk | twig]``.

    The twig does not see the trunk and counts its positions from the end of the prefix, so that each branch is computed
    as if it alone followed the prefix. The longer branch is the trunk: prefix and trunk are a plain causal sequence,
    and only the twig's few tokens need a mask.

    Attributes:
        input_ids: ``(n, L)``.
        position_ids: ``(n, L)``.
        lengths: tokens of prefix, trunk and twig, padding included; their sum is L.
        real: True on tokens, False on padding, which ends a branch, ``(n, L)``.
        branches: where A and B, in the order they were given, are supervised.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, int, int]
    real: torch.Tensor
    branches: tuple[TreeBranch, TreeBranch]

    @property
    def twig_mask(self) -> torch.Tensor:
        """True where a token of the twig sees one of the prefix and the twig, ``(1, 1, twig, prefix + twig)``.

        Padding needs no mask: it ends its branch, and nothing that counts comes after it.
        """
        prefix, _, twig = self.lengths
        seen = torch.ones(twig, prefix + twig, dtype=torch.bool, device=self.input_ids.device)
        return seen.tril(diagonal=prefix)[None, None]

    @property
    def mask(self) -> torch.Tensor:
        """True where a token (row index) sees another (column index), ``(n, 1, L, L)``; padding sees itself alone."""
        prefix, trunk, twig = self.lengths
        width, device = sum(self.lengths), self.input_ids.device
        allowed = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        allowed[prefix + trunk :, prefix : prefix + trunk] = False
        mask = allowed & self.real[:, None, :]
        return (mask | torch.eye(width, dtype=torch.bool, device=device))[:, None]


@dataclass(frozen=True)
class TreeBranch:
    """Where one branch of the rows is supervised.

    Attributes:
        positions: for every target token the index in the row whose output predicts it, ``(T,)``.
        targets: padded with 0, ``(n, T)``.
        target_mask: True on target tokens, ``(n, T)``.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    target_mask: torch.Tensor

    @property
    def supervised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of the hidden state that predicts each target token, in the order of ``target_mask``."""
        row, token = self.target_mask.nonzero(as_tuple=True)
        return row, self.positions[token]


def build_tree_rows(
    prompts: tuple[Sequence[int], Sequence[int]],
    targets: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    pad: int,
    device: torch.device,
) -> TreeRows:
    """Return rows in which the two prompts share what they begin with.

    Args:
        prompts: of branch A and of branch B, each at least one token longer than their common beginning.
        targets: token ids of each sample's answer to A and to B with the end token.
        pad: token id that fills short branches.
        device: where the rows are built.
    """
    shared = _common_length(*prompts)
    n = len(targets[0])
    parts = [
        build_rows(prompt[shared:], answers, pad, device) for prompt, answers in zip(prompts, targets, strict=True)
    ]
    widths = [rows.input_ids.shape[1] for rows in parts]
    order = (0, 1) if widths[0] >= widths[1] else (1, 0)  # the trunk first
    starts = {order[0]: shared, order[1]: shared + widths[order[0]]}
    branches = []
    for index, rows in enumerate(parts):
        first = starts[index] + rows.prompt_length - 1
        positions = first + torch.arange(rows.targets.shape[1], device=device)
        branches.append(TreeBranch(positions, rows.targets, rows.target_mask))
    prefix = torch.tensor(list(prompts[0][:shared]), device=device).expand(n, -1)
    counted = [torch.arange(shared, device=device)]
    counted += [shared + torch.arange(widths[index], device=device) for index in order]
    real = [torch.ones_like(prefix, dtype=torch.bool), *(parts[index].attention_mask.bool() for index in order)]
    return TreeRows(
        input_ids=torch.cat([prefix, *(parts[index].input_ids for index in order)], dim=1),
        position_ids=torch.cat(counted).expand(n, -1),
        lengths=(shared, widths[order[0]], widths[order[1]]),
        real=torch.cat(real, dim=1),
        branches=(branches[0], branches[1]),
    )


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with, leaving each at least one of its own."""
    longest = min(len(one), len(other)) - 1
    return next((i for i in range(longest) if one[i] != other[i]), longest)


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

    @functools.cached_property
    def edges(self) -> tuple[list[tuple[int, int]], torch.Tensor]:
        """The E pairs of all paths, each once and sorted (those from the prompt first), and whose they are.

        The second is 1 where a class takes a pair, else 0, ``(E, C)``.
        """
        edges = sorted({edge for path in self.steps for edge in path})
        place = {edge: index for index, edge in enumerate(edges)}
        taken = torch.zeros(len(edges), len(self.steps))
        for name, path in enumerate(self.steps):
            taken[[place[edge] for edge in path], name] = 1
        return edges, taken


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
