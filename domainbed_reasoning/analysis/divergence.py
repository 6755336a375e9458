"""Domain divergence of images and of chains: the paper's comparison (arXiv 2602.23777), with a permutation test.

For unit vectors x_1…x_m of one domain and y_1…y_n of another and a kernel k, the unbiased estimate (Gretton et al.,
JMLR 2012, eq. 3) is

    MMD²_u = 1/(m(m-1)) Σ_{i≠j} k(x_i, x_j) + 1/(n(n-1)) Σ_{i≠j} k(y_i, y_j) - 2/(mn) Σ_{i,j} k(x_i, y_j)

The paper uses the squared distance of the domains' mean vectors, ‖x̄ - ȳ‖²: the biased estimate with the linear kernel
k(x, y) = x·y, the default here. ``rbf`` is exp(-‖x - y‖² / (2σ²)), where σ is the median distance within the pooled
domains. p is the share of random permutations of the pooled vectors with an MMD²_u at least as large, including the
observed one.

The spread of vectors depends on the encoder and the modality; ``relative`` is MMD²_u divided by the variance within the
two domains, 1/2 (tr Cov x + tr Cov y), and does not depend on it.

Chains are encoded without their stage tags: these are the same in every text, carry no information about the domain and
would affect every distance. The paper does not state whether it removes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PERMUTATIONS = 1000
KERNELS = ("linear", "rbf")

PAPER = "paper, CLIP, squared distance of means, mean over pairs: images 0.239, chains 0.099, 58.6% lower"


@dataclass(frozen=True)
class Divergence:
    """The divergence between two domains' vectors.

    Attributes:
        biased: the biased MMD²; with the linear kernel, the squared distance of the means.
        unbiased: MMD²_u; may be negative if the domains do not differ.
        relative: MMD²_u with the linear kernel, divided by the variance within the domains.
        p: p value of the permutation test, in (0, 1].
    """

    biased: float
    unbiased: float
    relative: float
    p: float


def mmd(x: torch.Tensor, y: torch.Tensor, kernel: str = "linear", permutations: int = PERMUTATIONS) -> Divergence:
    """Return the divergence between two samples.

    Args:
        x: ``(m, d)`` with m > 1.
        y: ``(n, d)`` with n > 1.
        kernel: ``linear`` or ``rbf``.
        permutations: number of permutations in the test.

    Raises:
        ValueError: for fewer than two vectors or an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}.")
    if min(len(x), len(y)) < 2:
        raise ValueError("MMD² requires at least two images per domain.")
    pooled = torch.cat([x, y]).double()
    gram = _gram(pooled, kernel)
    belongs = torch.zeros(1, len(pooled), dtype=torch.bool)
    belongs[0, : len(x)] = True
    biased, unbiased = (float(value) for value in _estimates(gram, belongs))
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([belongs[0, torch.randperm(len(pooled), generator=generator)] for _ in range(permutations)])
    by_chance = _estimates(gram, shuffled)[1]
    p = (1 + int((by_chance >= unbiased - 1e-12).sum())) / (1 + permutations)
    linear = gram if kernel == "linear" else _gram(pooled, "linear")
    within = float(x.double().var(0).sum() + y.double().var(0).sum()) / 2
    relative = float(_estimates(linear, belongs)[1]) / within if within > 0 else 0.0
    return Divergence(biased, unbiased, relative, p)


def _gram(vectors: torch.Tensor, kernel: str) -> torch.Tensor:
    if kernel == "linear":
        return vectors @ vectors.T
    squared = torch.cdist(vectors, vectors) ** 2
    off = ~torch.eye(len(vectors), dtype=torch.bool)
    return torch.exp(-squared / (2 * squared[off].median().clamp_min(1e-12)))


def _estimates(gram: torch.Tensor, belongs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the biased and the unbiased MMD² of permutations of the pooled vectors.

    Args:
        gram: the kernel's values for all pairs, ``(N, N)``.
        belongs: True for vectors in the first sample, ``(P, N)``.

    Returns:
        ``(P,)`` each.
    """
    a = belongs.to(gram)
    b = 1 - a
    m, n = a.sum(1), b.sum(1)
    inside_a, inside_b, across = ((u @ gram * v).sum(1) for u, v in ((a, a), (b, b), (a, b)))
    diagonal_a, diagonal_b = a @ gram.diagonal(), b @ gram.diagonal()
    biased = inside_a / m**2 + inside_b / n**2 - 2 * across / (m * n)
    unbiased = (inside_a - diagonal_a) / (m * (m - 1)) + (inside_b - diagonal_b) / (n * (n - 1))
    return biased, unbiased - 2 * across / (m * n)


def between_domains(
    images: Sequence[torch.Tensor], texts: Sequence[torch.Tensor], names: Sequence[str], kernel: str = "linear"
) -> list[dict[str, Any]]:
    """Return one row per pair of domains and modality, and one row of means per modality.

    Args:
        images: image vectors of each domain.
        texts: chain vectors of each domain.
        names: names of the domains.
        kernel: ``linear`` or ``rbf``.

    Returns:
        Rows with ``modality``, the two domains, ``biased``, ``unbiased``, ``relative`` and ``p`` (None for means).
    """
    rows: list[dict[str, Any]] = []
    for modality, vectors in (("images", images), ("chains", texts)):
        found = []
        for a, b in itertools.combinations(range(len(names)), 2):
            found.append(mmd(vectors[a], vectors[b], kernel))
            rows.append({"modality": modality, "domain": names[a], "other": names[b], **vars(found[-1])})
        means = {
            key: sum(getattr(one, key) for one in found) / len(found) for key in ("biased", "unbiased", "relative")
        }
        rows.append({"modality": modality, "domain": "mean", "other": "mean", **means, "p": None})
    return rows
