"""Chains that support their conclusion, by a known likelihood and by the embedded model."""

import pytest
import torch

from domainbed_reasoning.chains.chain import Chain
from domainbed_reasoning.chains.contradiction import contradiction
from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.consistency import RIVALS, ConsistencyFilter, rename

NAMES = ("cat", "bob cat", "dog")
QUESTIONS = ("which?", "why?")


class Reader:
    """Finds a text likely if it holds the word that goes with its conclusion: whiskers the cat's, barks the dog's."""

    def __init__(self):
        self.shown = []
        self.asked = []

    def encode(self, images):
        self.shown.append(images)
        return {}

    def log_likelihoods(self, encoded, question, texts):
        self.asked.append(question)
        words = {"cat": "whiskers", "dog": "barks", "bob cat": "tufts"}
        fits = [float(words[text.split("<CONCLUSION>")[1].split("<")[0].lower()] in text) for text in texts]
        return torch.tensor(fits)[:, None], torch.ones(len(texts), 1, dtype=torch.bool)


def chain(caption, name, reasoning="so it seems"):
    return Chain("a look", caption, reasoning, "fine", name).render()


def ask(*chains_and_labels, reader=None):
    chains, labels = [text for text, _ in chains_and_labels], [label for _, label in chains_and_labels]
    images = torch.arange(len(chains) * 12, dtype=torch.uint8).view(-1, 3, 2, 2)
    return ConsistencyFilter(QUESTIONS, NAMES).judge(reader or Reader(), images, chains, labels)


def test_a_class_is_renamed_wherever_it_is_a_word_of_its_own():
    assert rename("A Cat, the cat's bobcat; bob_cat", "cat", "dog") == "A dog, the dog's bobcat; bob_cat"
    assert rename("bob_cat and Bob  Cat", "bob cat", "dog") == "dog and dog"
    assert rename(r"a cat", "cat", r"\1 of g<0>") == r"a \1 of g<0>"


def test_a_chain_whose_words_fit_its_conclusion_is_supported_and_one_that_fits_a_rival_is_not():
    """Versions (cat, bob cat, dog) of the three: (1, 0, 0), (0, 0, 1), (0, 0, 1); a chain's own must gain most."""
    verdicts = ask((chain("whiskers", "cat"), 0), (chain("barks", "cat"), 0), (chain("barks", "Dog"), 2))
    assert verdicts == [True, False, True]


def test_name_that_is_likely_regardless_of_the_text_is_not_evidence():
    """To this reader every chain sounds like a dog's (+5). Held against the round's mean only the words count."""

    class Biased(Reader):
        def log_likelihoods(self, encoded, question, texts):
            found, mask = super().log_likelihoods(encoded, question, texts)
            dogs = torch.tensor([5.0 * ("<CONCLUSION>dog" in text) for text in texts])
            return found + dogs[:, None], mask

    chains = [(chain("whiskers", "cat"), 0), (chain("tufts", "bob cat"), 1), (chain("whiskers", "dog"), 2)]
    assert ask(*chains, reader=Biased()) == [True, True, False]


def test_the_mean_is_over_the_chains_of_the_round_so_far():
    """The first chain has nothing to be held against; the second of its kind, after another class's, is kept."""
    support, images = ConsistencyFilter(QUESTIONS, NAMES), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    first, second = chain("whiskers", "cat"), chain("barks", "dog")
    assert support.judge(Reader(), images, [first], [0]) == [False]
    assert support.judge(Reader(), images, [second], [2]) == [True]
    assert support.judge(Reader(), images, [first], [0]) == [True]


def test_the_likelihood_is_asked_of_a_blank_image():
    reader = Reader()
    ask((chain("whiskers", "cat"), 0), (chain("barks", "dog"), 2), reader=reader)
    assert reader.asked == ["why?"]
    (images,) = reader.shown
    assert images.shape == (6, 3, 2, 2) and images.dtype == torch.uint8
    assert len(images.unique()) == 1


def test_a_chain_that_contradicts_itself_or_lacks_a_stage_is_not_supported():
    other = (chain("barks", "dog"), 2)
    assert ask((chain("whiskers", "cat", reasoning="It must be a dog."), 0), other) == [False, True]
    assert ask(("<CAPTION>whiskers</CAPTION><CONCLUSION>cat</CONCLUSION>", 0), other) == [False, True]
    assert ask((chain("whiskers", "cat"), 0), other) == [True, True]
    assert ask() == []


def test_contradiction_reads_the_last_claim():
    stages = Chain("a", "b", "It is a cat. No, it is a dog.", "fine", "cat")
    assert "states 'dog'" in contradiction(stages, 0, NAMES)


def test_of_many_classes_the_rivals_are_those_that_the_label_path_finds_likeliest():
    names = [f"class {index}" for index in range(20)]
    seen = []

    class Many(Reader):
        def class_scores(self, images, question, class_names):
            assert question == "which?"
            return torch.arange(20.0)[None].expand(len(images), -1)

        def log_likelihoods(self, encoded, question, texts):
            seen.extend(texts)
            return torch.zeros(len(texts), 1), torch.ones(len(texts), 1, dtype=torch.bool)

    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    ConsistencyFilter(QUESTIONS, names).judge(Many(), images, [chain("x", "class 18")], [18])
    named = [text.split("<CONCLUSION>")[1].split("<")[0] for text in seen]
    assert named == ["class 18"] + [f"class {index}" for index in (19, 17, 16, 15, 14, 13)]
    assert len(named) == 1 + RIVALS


@pytest.fixture(scope="module")
def tiny():
    from domainbed_reasoning.mllm import load_mllm

    return load_mllm("tiny")


def test_the_embedded_model_finds_right_captions_more_supportive_than_another_classs(tiny):
    """The base has seen the study's names a little: of chains with their own parts more pass than of swapped ones."""
    from domainbed_reasoning.chains.prompts import q_cls, q_reason

    questions = (q_cls(shapes.CLASS_NAMES, "creature"), q_reason(shapes.CLASS_NAMES, "creature"))
    labels = list(range(7)) * 2
    images = torch.zeros(14, 3, 48, 48, dtype=torch.uint8)

    def share(shift):
        chains = [
            Chain(
                "compare parts",
                ", ".join(shapes.KINDS[part][kind] for part, kind in enumerate(shapes.CODES[(name + shift) % 7])),
                f"all fit {shapes.CLASS_NAMES[name]}",
                "nothing odd",
                shapes.CLASS_NAMES[name],
            ).render()
            for name in labels
        ]
        return sum(ConsistencyFilter(questions, shapes.CLASS_NAMES).judge(tiny, images, chains, labels)) / len(labels)

    assert share(0) > max(share(1), share(2))


def test_single_class_has_no_rivals():
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    support = ConsistencyFilter(QUESTIONS, ("cat",))
    chains = [chain("whiskers", "cat"), "<CAPTION>whiskers</CAPTION><CONCLUSION>cat</CONCLUSION>"]
    assert support.judge(Reader(), images, chains, [0, 0]) == [True, False]


def test_a_version_is_as_likely_as_all_its_tokens_together():
    """In nats a token: a cat's chain 4 x -1, as a dog's 1 x -3; a dog's chain 1 x -3, as a cat's 12 x -0.5.

    Sums: (-4, -3) and (-6, -3) for (cat, dog): gains (-0.5, 0.5) and (-1.5, 1.5), the round's means (-1, 1), so that
    each chain's own class gains 0.5. Means over tokens, (-1, -3) and (-0.5, -3), would have each rival gain 0.125.
    """

    class Tokens(Reader):
        def log_likelihoods(self, encoded, question, texts):
            rows = {("look", "cat"): (4, -1.0), ("look", "dog"): (1, -3.0)}
            rows |= {("bark", "dog"): (1, -3.0), ("bark", "cat"): (12, -0.5)}
            keys = [("look" if "look" in text else "bark", "cat" if ">cat<" in text else "dog") for text in texts]
            mask = torch.tensor([[index < rows[key][0] for index in range(12)] for key in keys])
            values = torch.tensor([[rows[key][1]] * 12 for key in keys])
            return values, mask  # what is behind the mask counts nowhere

    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    chains = [Chain("s", word, "r", "fine", name).render() for word, name in (("look", "cat"), ("bark", "dog"))]
    support = ConsistencyFilter(QUESTIONS, ("cat", "dog"))
    assert support.judge(Tokens(), images, chains, [0, 1]) == [True, True]
    assert support.sums.tolist() == [-2.0, 2.0] and support.counts.tolist() == [2.0, 2.0]


def test_more_texts_than_a_pass_takes_are_judged_as_in_one(monkeypatch):
    """Nine versions in passes of 4, 4 and 1 are those of one pass, in the same order."""
    chains = [(chain("whiskers", "cat"), 0), (chain("barks", "cat"), 0)]
    together = ask(*chains, (chain("barks", "dog"), 2))
    monkeypatch.setattr("domainbed_reasoning.method.consistency._ROWS", 4)
    reader = Reader()
    assert ask(*chains, (chain("barks", "dog"), 2), reader=reader) == together == [True, False, True]
    assert [len(images) for images in reader.shown] == [4, 4, 1]
