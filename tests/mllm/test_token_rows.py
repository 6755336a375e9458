import torch
from hypothesis import given
from hypothesis import strategies as st

from domainbed_reasoning.mllm.likelihood import scores_from_trie
from domainbed_reasoning.mllm.rows import build_rows, build_tree_rows, build_trie


def test_rows_feed_all_but_the_last_target_token_and_supervise_every_one():
    """Prompt 1 2; targets 5 9 and 6 7 9: token t of a target is predicted at position 1 + t."""
    rows = build_rows([1, 2], [[5, 9], [6, 7, 9]], pad=0, device=torch.device("cpu"))
    assert rows.input_ids.tolist() == [[1, 2, 5, 0], [1, 2, 6, 7]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    row, position = rows.supervised
    assert list(zip(row.tolist(), position.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    assert rows.targets[rows.target_mask].tolist() == [5, 9, 6, 7, 9]


def test_tree_rows_share_the_beginning_and_keep_the_branches_apart():
    """Prompts 1 2 3 and 1 2 4 5 share 1 2; targets 6 9 and 7 8 9.

    B is longer, so the row is 1 2 | 4 5 7 8 | 3 6 with positions 0 1 | 2 3 4 5 | 2 3; the 3 of A sees 1 2 3 alone.
    """
    rows = build_tree_rows(([1, 2, 3], [1, 2, 4, 5]), ([[6, 9]], [[7, 8, 9]]), pad=0, device=torch.device("cpu"))
    assert rows.input_ids.tolist() == [[1, 2, 4, 5, 7, 8, 3, 6]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3]]
    assert rows.lengths == (2, 4, 2)
    assert rows.mask[0, 0, 5].tolist() == [True, True, True, True, True, True, False, False]
    assert rows.mask[0, 0, 6].tolist() == [True, True, False, False, False, False, True, False]
    assert rows.twig_mask.tolist() == [[[[True, True, True, False], [True, True, True, True]]]]
    a, b = rows.branches
    assert [index.tolist() for index in a.supervised] == [[0, 0], [6, 7]]
    assert [index.tolist() for index in b.supervised] == [[0, 0, 0], [3, 4, 5]]


def test_padding_of_a_branch_is_seen_by_itself_alone():
    """A second row whose answer to A is one token: the slot of 6 is padding there. Of equal branches A is the trunk."""
    rows = build_tree_rows(([1, 3], [1, 4]), ([[6, 9], [9]], [[7, 9], [7, 9]]), pad=0, device=torch.device("cpu"))
    assert rows.input_ids[1].tolist() == [1, 3, 0, 4, 7]
    assert rows.mask[1, 0, :, 2].tolist() == [False, False, True, False, False]


def test_trie_shares_beginnings_and_each_node_sees_its_ancestors_alone():
    """'5 6 9', '5 7 9' and '5 9' (end token 9): nodes 5, 6 and 7; 6 and 7 see 5 and themselves."""
    trie = build_trie([[5, 6, 9], [5, 7, 9], [5, 9]])
    assert trie.tokens.tolist() == [5, 6, 7]
    assert trie.depths.tolist() == [0, 1, 1]
    assert trie.visible.tolist() == [[True, False, False], [True, True, False], [True, False, True]]
    assert trie.steps == (((-1, 5), (0, 6), (1, 9)), ((-1, 5), (0, 7), (2, 9)), ((-1, 5), (0, 9)))
    edges, taken = trie.edges
    assert edges == [(-1, 5), (0, 6), (0, 7), (0, 9), (1, 9), (2, 9)]
    assert taken.T.tolist() == [[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0]]


@given(
    st.lists(st.lists(st.integers(0, 8), max_size=4).map(lambda ids: (*ids, 9)), min_size=1, max_size=8, unique=True)
)
def test_trie_scores_equal_a_lookup_by_whole_prefix(targets):
    """A model whose next-token distribution is a fixed random function of the prefix."""

    def next_log_probs(prefix):
        generator = torch.Generator().manual_seed(hash(tuple(prefix)) % 2**31)
        return torch.randn(10, generator=generator).log_softmax(0)

    trie = build_trie(targets)
    prefixes = []
    for node in range(len(trie.tokens)):
        ancestors = [i for i in range(len(trie.tokens)) if trie.visible[node, i]]
        ancestors.sort(key=lambda i: int(trie.depths[i]))
        prefixes.append([int(trie.tokens[i]) for i in ancestors])
    nodes = torch.stack([next_log_probs(p) for p in prefixes])[None] if prefixes else torch.zeros(1, 0, 10)
    scores = scores_from_trie(trie, next_log_probs([])[None], nodes)[0]
    for score, target in zip(scores, targets, strict=True):
        expected = sum(next_log_probs(target[:i])[token] for i, token in enumerate(target))
        torch.testing.assert_close(score, expected)
