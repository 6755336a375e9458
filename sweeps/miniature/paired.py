"""Intervals and paired tests over the cells of a study: accuracies of a row by (target domain, seed).

There are two intervals. *For another domain*: the sample is the domains' means over seeds, t with domains - 1 degrees
of freedom. This interval is clustered by domain; with four domains it is wide. *For these domains*: the domains are
fixed and the seeds are the sample, t with cells - domains degrees of freedom. Neither treats the test images as a
sample; a cell's 504 images have a standard error of 1.3 to 2.2 points.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Cell = tuple[int, int]  # target domain, seed


@dataclass(frozen=True)
class Estimate:
    """A mean over domains with its confidence intervals.

    Attributes:
        mean: of the domains' means.
        half: half width of the 95% interval for another domain; infinite with one domain.
        half_here: half width of the 95% interval for these domains; infinite with one seed.
        p: two-sided p value of mean 0, for another domain.
        p_here: two-sided p value of mean 0, for these domains.
        cells: number of cells.
        domains: number of domains.
    """

    mean: float
    half: float
    half_here: float
    p: float
    p_here: float
    cells: int
    domains: int


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two rows on their common cells: the first's accuracies minus the second's.

    Attributes:
        estimate: of the differences.
        wins: number of cells in which the first is better.
        losses: number of cells in which the second is better.
    """

    estimate: Estimate
    wins: int
    losses: int


def estimate(cells: Mapping[Cell, float]) -> Estimate:
    """Return the mean of the cells' values with its intervals and p values.

    Raises:
        ValueError: if there are no cells.
    """
    if not cells:
        raise ValueError("cannot estimate from zero cells.")
    domains = sorted({domain for domain, _ in cells})
    groups = [[value for (its, _), value in cells.items() if its == domain] for domain in domains]
    means = [statistics.fmean(group) for group in groups]
    mean = statistics.fmean(means)
    between = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf
    freedom = len(cells) - len(domains)
    here = math.inf
    if freedom > 0:
        squares = sum((value - own) ** 2 for group, own in zip(groups, means, strict=True) for value in group)
        variance = squares / freedom
        here = math.sqrt(variance * sum(1 / len(group) for group in groups)) / len(domains)
    half, p = _interval(mean, between, len(domains) - 1)
    half_here, p_here = _interval(mean, here, freedom)
    return Estimate(mean, half, half_here, p, p_here, len(cells), len(domains))


def compare(first: Mapping[Cell, float], second: Mapping[Cell, float]) -> Comparison | None:
    """Return the paired comparison on the common cells; None if there are none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    differences = {cell: first[cell] - second[cell] for cell in both}
    wins = sum(value > 0 for value in differences.values())
    losses = sum(value < 0 for value in differences.values())
    return Comparison(estimate(differences), wins, losses)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values, adjusted by Holm's step-down method (1979), in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _interval(mean: float, error: float, freedom: int) -> tuple[float, float]:
    """Return half the width of the 95% interval and the two-sided p value of mean 0."""
    if freedom < 1 or math.isinf(error):
        return math.inf, 1.0
    if error == 0.0:
        return 0.0, 1.0 if mean == 0.0 else 0.0
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom)) * error, float(2 * stats.t.sf(abs(mean) / error, freedom))
