import math

import pytest
import torch

from domainbed_reasoning.method.objective import chain_nll, check_shares, label_nll, micro_batches, read
from domainbed_reasoning.mllm.likelihood import token_log_likelihoods


def test_label_term_sums_and_chain_term_averages_over_a_rows_own_tokens():
    """Two rows, three and one target tokens of probability 1/2: sums 3 ln 2 and ln 2, means ln 2 each."""
    log_likelihoods = torch.full((2, 3), math.log(0.5))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(label_nll(log_likelihoods, mask), torch.tensor([3.0, 1.0]) * math.log(2))
    torch.testing.assert_close(chain_nll(log_likelihoods, mask), torch.tensor([1.0, 1.0]) * math.log(2))


def test_long_and_short_chains_have_equal_weight():
    """A repeated chain has an equal term."""
    once = torch.tensor([[-1.0, -3.0]])
    twice = once.repeat(1, 2)
    assert chain_nll(once, torch.ones(1, 2)) == chain_nll(twice, torch.ones(1, 4)) == 2.0


def test_token_log_likelihoods_are_log_softmax_at_the_target():
    """Logits (0, ln 3): probabilities 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    found = token_log_likelihoods(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([math.log(0.25), math.log(0.75)]))


def test_micro_batches_differ_by_one_row_at_most():
    """129 rows in groups of at most 64 are three of 43, not 64, 64 and 1; 10 in groups of 4 are 3, 3 and 4."""
    assert [len(rows) for rows in micro_batches(list(range(129)), [None] * 129, 64)] == [43] * 3
    assert [len(rows) for rows in micro_batches(list(range(10)), ["a"] * 10, 4)] == [3, 3, 4]
    assert micro_batches([], [], 4) == []


def test_ranks_share_micro_batches_of_equal_size():
    """Five of at most 4 become six; with fewer rows than ranks, some have none."""
    rows = list(range(17))
    assert [len(part) for part in micro_batches(rows, ["a"] * 17, 4, world=2)] == [2, 3, 3, 3, 3, 3]
    assert micro_batches([7, 9], ["a"] * 10, 4, world=3) == [[7], [9]]
    mixed = micro_batches(rows, ["a"] * 3 + [None] * 14, 4, world=2)
    assert [len(part) for part in mixed] == [1, 2, 3, 4, 3, 4]


def test_more_ranks_than_micro_batches_are_refused():
    check_shares(6, 2, 3)
    with pytest.raises(ValueError, match="^4 ranks, but an update on 6 images in micro-batches of up to 2 has only 3"):
        check_shares(6, 2, 4)


def test_micro_batch_scalars_are_read_in_order():
    values = {"loss": [torch.tensor(1.0), torch.tensor(0.5)], "none": [], "scale": [torch.tensor(2.0)]}
    assert read(values) == {"loss": 1.5, "none": 0.0, "scale": 2.0}
