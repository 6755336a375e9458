"""Datasets that provide labels, images and chains themselves, and what is rejected before training."""

import pickle

import pytest
import torch
from domainbed import hparams_registry
from PIL import Image

from builders.files import chain_text
from domainbed_reasoning import ReasoningDataset
from domainbed_reasoning.bridge.samples import ids_of


class Colors(ReasoningDataset):
    ENVIRONMENTS = ["dark", "light"]
    CLASS_NAMES = ["red", "blue"]
    INPUT_SHAPE = (3, 28, 28)

    def labels(self, env):
        return [index % 2 for index in range(20)]

    def picture(self, env, index):
        return Image.new("RGB", (40, 40), ("red", "blue")[index % 2])

    def chain(self, env, index):
        assert env not in self.test_envs, "a chain of a target domain was asked for"
        return chain_text(self.CLASS_NAMES[index % 2]) if index else None


def build(algorithm, cls=Colors, **changes):
    hparams = hparams_registry.default_hparams(algorithm, "ShapesReasoning") | changes
    return cls(None, [1], {name: value for name, value in hparams.items() if name not in ("rho", "teacher")})


def test_a_baseline_gets_floats_and_an_mllm_bytes_that_know_their_sample():
    x, y = build("ERM")[0][3]
    assert x.shape == (3, 28, 28) and x.dtype == torch.float32 and float(x.min()) == -1 and y == 1
    dataset = build("MTCT")
    x, y = dataset[0][3]
    assert x.dtype == torch.uint8 and ids_of(x).tolist() == [0, 3] and y == 1
    assert set(dataset.task.chains) == {(0, index) for index in range(1, 20)}
    assert dataset.task.images[1][2] == "light/2" and dataset.task.class_names == ("red", "blue")
    assert not build("LabelSFT").task.chains


def test_large_images_of_a_baseline_are_normalized_and_augmented_in_source_domains_alone():
    class Large(Colors):
        INPUT_SHAPE = (3, 224, 224)

    dataset = build("ERM", Large, data_augmentation=True)
    assert dataset[0][0][0].shape == dataset[1][0][0].shape == (3, 224, 224)
    assert torch.equal(dataset[1][0][0], dataset[1][0][0]) and float(dataset[1][0][0][0, 0, 0]) > 2


def test_workers_get_pictures_without_the_chains():
    environment = pickle.loads(pickle.dumps(build("MTCT")[0]))
    assert environment[1][1] == 1 and environment.task is None


class WrongLabel(Colors):
    def labels(self, env):
        return [0, 2]


class BadChain(Colors):
    def chain(self, env, index):
        return "<SUMMARY>No more.</SUMMARY>"


class NumberForAChain(Colors):
    def chain(self, env, index):
        return 3


class NoChain(Colors):
    def chain(self, env, index):
        return None


class TwinNames(Colors):
    CLASS_NAMES = ["red", "Red"]


@pytest.mark.parametrize(
    ("cls", "cause"),
    [
        (WrongLabel, r"WrongLabel: domain 0 \(dark\) has label 2, but CLASS_NAMES has 2 names: labels are in \[0, 1\]"),
        (BadChain, "BadChain: the chain of image dark/0 is not a five-stage chain: <CAPTION> is missing"),
        (NumberForAChain, "the chain of image dark/0 is not a five-stage chain"),
        (NoChain, "NoChain: no image of a source domain has a chain, but MTCT trains on chains"),
        (TwinNames, "two classes have the name 'Red'"),
    ],
)
def test_invalid_datasets_are_rejected_before_training(cls, cause):
    with pytest.raises(ValueError, match=cause):
        build("MTCT", cls)
