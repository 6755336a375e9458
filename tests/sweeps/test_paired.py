"""Intervals and tests, worked by hand and against scipy."""

import math

import pytest
from scipy import stats

from domainbed_reasoning.sweeps.miniature.paired import compare, estimate, holm


def test_the_interval_for_another_domain_is_that_of_the_domains_means():
    """Domain means .5 and .7 whatever their seeds: mean .6, t(1 df) of the two."""
    found = estimate({(0, 1): 0.4, (0, 2): 0.6, (1, 1): 0.7, (1, 2): 0.7})
    low, high = stats.t.interval(0.95, 1, loc=0.6, scale=stats.sem([0.5, 0.7]))
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx((high - low) / 2)
    assert found.p == pytest.approx(stats.ttest_1samp([0.5, 0.7], 0).pvalue)


def test_the_interval_for_these_domains_is_that_of_the_seeds_within_them():
    """Squares about the domains' means .01 + .01, 2 degrees of freedom: variance .01; the mean's .01 x (1/2+1/2)/4."""
    found = estimate({(0, 1): 0.4, (0, 2): 0.6, (1, 1): 0.7, (1, 2): 0.7})
    assert found.half_here == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(0.01 / 4))


def test_one_seed_or_one_domain_gives_infinite_intervals():
    assert math.isinf(estimate({(0, 1): 0.4, (1, 1): 0.6}).half_here)
    assert math.isinf(estimate({(0, 1): 0.4, (0, 2): 0.6}).half)
    assert estimate({(0, 1): 0.4, (0, 2): 0.6}).p == 1.0
    with pytest.raises(ValueError, match="zero cells"):
        estimate({})


def test_rows_are_compared_on_the_cells_that_both_have():
    first = {(0, 1): 0.9, (0, 2): 0.5, (1, 1): 0.8, (2, 1): 0.1}
    second = {(0, 1): 0.7, (0, 2): 0.6, (1, 1): 0.8, (3, 1): 0.9}
    found = compare(first, second)
    assert (found.wins, found.losses, found.estimate.cells) == (1, 1, 3)
    assert found.estimate.mean == pytest.approx((0.05 + 0.0) / 2)
    assert compare(first, {(9, 9): 0.5}) is None


def test_rows_that_are_alike_in_every_cell_do_not_differ():
    cells = {(domain, seed): 0.5 for domain in range(4) for seed in range(3)}
    assert compare(cells, cells).estimate.p == 1.0
    assert compare({cell: 0.6 for cell in cells}, cells).estimate.p == pytest.approx(0.0)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls():
    """.01, .04, .03: .01 x 3 = .03; .03 x 2 = .06; .04 x 1 = .04, raised to .06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
