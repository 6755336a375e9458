import torch

from builders.files import chain_text as chain
from domainbed_reasoning.method.self_labeling import SelfLabels, accept

NAMES = ["cat", "dog"]


class Labeller:
    """Writes the chains it is given, in turn, and counts the images it is asked about."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return [chain(self.answers.pop(0)) for _ in images]


def test_a_chain_is_kept_when_its_conclusion_is_the_label():
    assert accept(chain("Dog"), 1, NAMES) == chain("Dog")
    assert accept(chain("cat"), 1, NAMES) is None
    assert accept("a dog", 1, NAMES) is None


def test_an_own_chain_with_blemishes_is_kept_and_trained_on_in_canonical_form():
    written = f"<think>A cat?</think>\n```\n{chain('A dog.')}\n```"
    assert accept(written, 1, NAMES) == chain("dog")
    assert accept(written, 1, NAMES, exact=True) is None
    assert accept(chain("not a dog"), 1, NAMES) is None
    labels = SelfLabels(lambda images: [written, chain("a cat")], NAMES)
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    assert labels.chains_for(images, [1, 1], [(0, 1), (0, 2)]) == [chain("dog"), None]
    # What is resumed is what was trained on; what was rejected is kept as it was written.
    assert labels.newly_written() == [(0, 1, chain("dog"), True), (0, 2, chain("a cat"), False)]
    exact = SelfLabels(lambda images: [written], NAMES, exact=True)
    assert exact.chains_for(images[:1], [1], [(0, 1)]) == [None]


def test_an_own_chain_that_lacks_a_stage_is_kept_for_its_conclusion_as_it_was_written():
    written = "It has paws. <CAPTION>An animal.</CAPTION> <CONCLUSION>dog</CONCLUSION>"
    assert accept(written, 1, NAMES, exact=True) == written
    assert accept(written, 1, NAMES) == "<CAPTION>An animal.</CAPTION>\n<CONCLUSION>dog</CONCLUSION>"


def test_a_sample_is_labeled_once_a_round_even_within_one_batch():
    """Samples a, b, a, then b again: two images are labelled; a is kept, b (labelled cat, written dog) is not."""
    labeller = Labeller("cat", "dog")
    labels = SelfLabels(labeller, NAMES)
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    first = labels.chains_for(images, [0, 0, 0], [(0, 1), (0, 2), (0, 1)])
    assert first == [chain("cat"), None, chain("cat")]
    assert labels.chains_for(images[:1], [0], [(0, 2)]) == [None]
    assert labeller.seen == 2
    assert labels.labeled == 2
    assert labels.accepted_share == 0.5


def test_samples_without_ids_are_labeled_each_time():
    labels = SelfLabels(Labeller("cat", "dog", "dog"), NAMES)
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    assert labels.chains_for(images, [0, 1], None) == [chain("cat"), chain("dog")]
    assert labels.chains_for(images[:1], [0], None) == [None]
    assert labels.labeled == 3


def test_second_filter_only_judges_what_the_first_kept():
    """Written: cat, dog, cat for a cat, a cat, a cat. The filter sees the two cats and keeps the second."""
    asked = []

    def supports(images, chains, labels):
        asked.append((images[:, 0, 0, 0].tolist(), chains, labels))
        return [False, True]

    labels = SelfLabels(Labeller("cat", "dog", "cat"), NAMES, supports)
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert labels.chains_for(images, [0, 0, 0], [(0, 1), (0, 2), (0, 3)]) == [None, None, chain("cat")]
    assert asked == [([0, 2], [chain("cat")] * 2, [0, 0])]
    assert labels.accepted_share == 1 / 3


def pictures(*values):
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_in_a_batch_that_is_partly_known_every_chain_is_judged_by_its_own_row():
    """Sample 1, a dog, is known. The next batch: 1 again, 5 (a cat), 6 (a dog), 5 again, 7 (a dog).

    Images hold their sample's number. Three are new: written cat, dog, cat; kept are those of 5 and 6, and the second
    filter takes 5's away. By the labels of the batch's first three rows (dog, cat, dog) none would be kept.
    """
    shown, asked = [], []

    def write(images):
        shown.append(images[:, 0, 0, 0].tolist())
        return [chain({1: "dog", 5: "cat", 6: "dog", 7: "cat"}[number]) for number in shown[-1]]

    def supports(images, chains, labels):
        asked.append((images[:, 0, 0, 0].tolist(), chains, labels))
        return [number != 5 for number in asked[-1][0]]

    labels = SelfLabels(write, NAMES, supports)
    assert labels.chains_for(pictures(1), [1], [(0, 1)]) == [chain("dog")]
    ids = [(0, 1), (0, 5), (0, 6), (0, 5), (0, 7)]
    found = labels.chains_for(pictures(1, 5, 6, 5, 7), [1, 0, 1, 0, 1], ids)
    assert found == [chain("dog"), None, chain("dog"), None, None]
    assert shown == [[1], [5, 6, 7]]
    assert asked == [([1], [chain("dog")], [1]), ([5, 6], [chain("cat"), chain("dog")], [0, 1])]
    assert labels.labeled == 4 and labels.accepted_share == 0.5
    assert labels.newly_written() == [
        (0, 1, chain("dog"), True),
        (0, 5, chain("cat"), False),
        (0, 6, chain("dog"), True),
        (0, 7, chain("cat"), False),
    ]


def test_restored_chains_are_not_judged_or_counted_again():
    """Three chains then, two of them kept; of a batch of one of them and a new one, the new one alone is written."""
    labeller = Labeller("dog")
    labels = SelfLabels(labeller, NAMES)
    rows = [(0, 1, chain("cat"), True), (0, 2, chain("dog"), False)]
    labels.load_state_dict({"labelled": 3, "accepted": 2, "well_formed": 1, "support": []}, rows)
    assert labels.chains_for(pictures(2, 1, 3), [0, 0, 1], [(0, 2), (0, 1), (0, 3)]) == [
        None,
        chain("cat"),
        chain("dog"),
    ]
    assert labeller.seen == 1
    assert (labels.labeled, labels.accepted_share) == (4, 3 / 4)
    assert labels.newly_written() == [(0, 3, chain("dog"), True)]
