"""Build rows of prompts and targets: model inputs and supervised positions, independent of the model family."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from domainbed_reasoning.mllm.transfer import moved


@dataclass(frozen=True)
class Rows:
    """Right-padded rows of one prompt followed by each sample's target.

    Attributes:
        input_ids: ``(n, L)``.
        attention_mask: 1 on tokens, 0 on padding, ``(n, L)``.
        prompt_length: P, the same for every row.
        targets: the target tokens, padded with 0, ``(n, T)``.
        target_mask: True on target tokens, ``(n, T)``; token t is predicted at position P - 1 + t of its row.
        supervised: row and position of the hidden state that predicts each target token, in the order of
            ``target_mask``.
        wanted: those target tokens.
        tokens: the number of each among its row's target tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_length: int
    targets: torch.Tensor
    target_mask: torch.Tensor
    supervised: tuple[torch.Tensor, torch.Tensor]
    wanted: torch.Tensor
    tokens: torch.Tensor


def build_rows(prompt: Sequence[int], targets: Sequence[Sequence[int]], pad: int, device: torch.device) -> Rows:
    """Return the rows ``prompt + targets[i]``.

    The last target token is not an input: nothing is predicted after it.

    Args:
        prompt: token ids with the image's placeholders, P > 0.
        targets: token ids of each sample's answer with its end token, none of them empty.
        pad: padding token id; masked out, so any id does.
        device: where the rows go; they are built on the host, so that target positions need no synchronization.
    """
    longest = max(map(len, targets))
    fed = [list(prompt) + list(target[:-1]) for target in targets]
    width = len(prompt) + longest - 1
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in fed])
    lengths = torch.tensor([len(row) for row in fed])
    attention_mask = (torch.arange(width) < lengths[:, None]).long()
    padded = torch.tensor([list(target) + [0] * (longest - len(target)) for target in targets])
    counts = torch.tensor([len(target) for target in targets])
    target_mask = torch.arange(longest) < counts[:, None]
    row, token = target_mask.nonzero(as_tuple=True)
    supervised = (row, len(prompt) - 1 + token)
    rows = Rows(input_ids, attention_mask, len(prompt), padded, target_mask, supervised, padded[target_mask], token)
    return moved(rows, device)


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
        targets: padded with 0, ``(n, T)``.
        target_mask: True on target tokens, ``(n, T)``.
        supervised: row and position of the hidden state that predicts each target token, in the order of
            ``target_mask``.
        wanted: those target tokens.
        tokens: the number of each among its row's target tokens.
    """

    targets: torch.Tensor
    target_mask: torch.Tensor
    supervised: tuple[torch.Tensor, torch.Tensor]
    wanted: torch.Tensor
    tokens: torch.Tensor


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
        pad: padding token id.
        device: where the rows go; they are built on the host.
    """
    shared = _common_length(*prompts)
    n = len(targets[0])
    parts = [
        build_rows(prompt[shared:], answers, pad, torch.device("cpu"))
        for prompt, answers in zip(prompts, targets, strict=True)
    ]
    widths = [rows.input_ids.shape[1] for rows in parts]
    order = (0, 1) if widths[0] >= widths[1] else (1, 0)  # the trunk first
    starts = {order[0]: shared, order[1]: shared + widths[order[0]]}
    branches = []
    for index, rows in enumerate(parts):
        row, position = rows.supervised
        supervised = (row, starts[index] + position)
        branches.append(TreeBranch(rows.targets, rows.target_mask, supervised, rows.wanted, rows.tokens))
    prefix = torch.tensor(list(prompts[0][:shared]), dtype=torch.long).expand(n, -1)
    counted = [torch.arange(shared), *(shared + torch.arange(widths[index]) for index in order)]
    real = [torch.ones_like(prefix, dtype=torch.bool), *(parts[index].attention_mask.bool() for index in order)]
    rows_of_both = TreeRows(
        input_ids=torch.cat([prefix, *(parts[index].input_ids for index in order)], dim=1),
        position_ids=torch.cat(counted).expand(n, -1),
        lengths=(shared, widths[order[0]], widths[order[1]]),
        real=torch.cat(real, dim=1),
        branches=(branches[0], branches[1]),
    )
    return moved(rows_of_both, device)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix, leaving at least one token to each."""
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
