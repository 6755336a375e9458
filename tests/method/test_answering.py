import torch

from domainbed_reasoning.method.answering import answers_from_chains, majority_chain, scores_from_answers


def test_answers_are_read_from_conclusions_after_normalization_or_exactly():
    chains = ["<CONCLUSION>Dog</CONCLUSION>", "<conclusion>**A dog.**</conclusion>", "dog"]
    assert answers_from_chains(chains, ["cat", "dog"]) == [1, 1, None]
    assert answers_from_chains(chains, ["cat", "dog"], exact=True) == [1, None, None]


def test_a_vote_counts_conclusions_as_they_are_read():
    cat, dog = "<CONCLUSION>cat</CONCLUSION>", "<CONCLUSION>A dog.</CONCLUSION>"
    assert majority_chain([cat, dog, dog], ["cat", "dog"]) == dog
    assert majority_chain([cat, dog, dog], ["cat", "dog"], exact=True) == cat


def test_a_chain_without_an_answer_falls_back_to_the_classification_path():
    """Rows: class 1; nothing, with label log-likelihoods 0 and ln 3: probabilities 1/4 and 3/4."""
    label_scores = torch.tensor([[0.0, torch.tensor(3.0).log()]])
    scores = scores_from_answers([1, None], label_scores)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0], [0.25, 0.75]]))


def test_the_class_with_most_votes_is_elected_and_the_first_named_of_equals():
    cat, dog, none = "a <CONCLUSION>cat</CONCLUSION>", "b <CONCLUSION>Dog</CONCLUSION>", "c"
    assert majority_chain([none, cat, dog, dog + " "], ["cat", "dog"]) == dog
    assert majority_chain([none, none, dog, cat], ["cat", "dog"]) == dog
    assert majority_chain([none, "d"], ["cat", "dog"]) == none
