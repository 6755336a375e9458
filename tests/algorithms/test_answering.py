"""Class scores of chains with and without a class, and of a model that is being trained."""

import pytest
import torch
from domainbed import algorithms, datasets, hparams_registry

from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.answering import majority_chains, scores_of_chains
from domainbed_reasoning.mllm import MLLM

NAMES = ("cat", "dog")
QUARTER = torch.tensor(3.0).log()  # ahead by ln 3: probabilities 1/4 and 3/4


class Reader:
    """Finds dog ln 3 likelier than cat for even images, and cat for odd ones; records the images it was shown."""

    def __init__(self):
        self.shown = []

    def class_scores(self, images, question, names):
        assert question == "which?" and names == NAMES
        self.shown.append(images[:, 0, 0, 0].tolist())
        odd = images[:, 0, 0, 0] % 2
        return torch.stack([odd * QUARTER, (1 - odd) * QUARTER], dim=1)


def pictures(*values):
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize("known", [False, True])
def test_every_chain_without_a_class_falls_back_to_its_own_image(known):
    """Images 4, 6, 1, 3, 8: chains of the second, third and last name no class; the others name cat, dog."""
    chains = ["<CONCLUSION>cat</CONCLUSION>", "no", "a cat", "<CONCLUSION>dog</CONCLUSION>", "<CONCLUSION>cow"]
    reader, images = Reader(), pictures(4, 6, 1, 3, 8)
    by_label = Reader().class_scores(images, "which?", NAMES) if known else None
    scores = scores_of_chains(reader, images, "which?", NAMES, chains, by_label)
    expected = [[1, 0], [0.25, 0.75], [0.75, 0.25], [0, 1], [0.25, 0.75]]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    assert reader.shown == ([] if known else [[6, 1, 8]])


def test_where_every_chain_names_a_class_nothing_is_asked():
    reader = Reader()
    scores = scores_of_chains(reader, pictures(1, 2), "which?", NAMES, ["<CONCLUSION>dog</CONCLUSION>"] * 2)
    assert scores.tolist() == [[0, 1], [0, 1]] and not reader.shown


def test_votes_are_counted_for_each_image_by_itself():
    """Three rounds over two batches of two images and one: cat, dog, cat; cat, dog, dog; dog, dog, cat."""
    rounds = iter(["cat cat", "dog dog", "cat dog", "dog", "dog", "cat"])

    class FixedChains:
        def generate(self, images, question, max_new_tokens):
            answers = next(rounds).split()
            assert len(answers) == len(images)
            return [f"<CONCLUSION>{answer}</CONCLUSION>" for answer in answers]

    chains = majority_chains(FixedChains(), pictures(1, 2, 3), "why?", NAMES, 9, 2, 3)
    assert chains == [f"<CONCLUSION>{answer}</CONCLUSION>" for answer in ("cat", "dog", "dog")]


def build(name, **changes):
    """An algorithm on ShapesReasoning, and six images of each source."""
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams(name, "ShapesReasoning") | changes
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    algorithm = algorithms.get_algorithm_class(name)(dataset.input_shape, dataset.num_classes, 3, hparams)
    collate = torch.utils.data.default_collate
    return algorithm, [tuple(collate([dataset[env][i] for i in range(6)])) for env in range(3)]


def test_images_fall_back_to_their_own_scores_however_they_are_split(monkeypatch):
    """Every second of six images is answered "wug" by its chain; the others by their own likelihoods, two at a time."""
    algorithm, ((x, _), *_) = build("MLLMZeroShot", eval_batch=2)
    named = {image.numpy().tobytes() for image in x.as_subclass(torch.Tensor)[::2]}

    def generate(self, images, *given):
        return ["<CONCLUSION>wug" if image.numpy().tobytes() in named else "no" for image in images]

    monkeypatch.setattr(MLLM, "generate", lambda *given: [f"{text}</CONCLUSION>" for text in generate(*given)])
    with torch.no_grad():
        found = algorithm.predict(x)
        own = algorithm.mllm.class_scores(x, algorithm.q_cls, shapes.CLASS_NAMES).softmax(1)
    expected = torch.nn.functional.one_hot(torch.tensor([shapes.CLASS_NAMES.index("wug")] * 6), 7).float()
    expected[1::2] = own[1::2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (own[1] - own[3]).abs().max() > 1e-3


@pytest.mark.parametrize("copy", [True, False])
def test_answers_after_an_update_are_the_updated_models(monkeypatch, copy):
    """Asked before and after an update, through a merged copy or without one."""
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda self, *bytes: copy)
    algorithm, batch = build("LabelSFT", answer="label", lora_dropout=0.3)
    for _ in range(2):
        algorithm.train()
        algorithm.update(batch)
        algorithm.eval()
        with torch.no_grad():
            found = algorithm.predict(batch[0][0])
            expected = algorithm.mllm.class_scores(batch[0][0], algorithm.q_cls, shapes.CLASS_NAMES)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
