"""The embedded benchmark's two regimes as datasets: stock's interface, a teacher that errs, baselines, the model."""

import pytest
import torch
from domainbed import datasets, hparams_registry

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.samples import ids_of
from domainbed_reasoning.images import creatures

NAMES = tuple(creatures.REGIME_OF)


def build(name, algorithm="MTCT", target=1, **hparams):
    values = hparams_registry.default_hparams(algorithm, name) | hparams
    return datasets.get_dataset_class(name)(None, [target], values), values


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_its_class_and_sources_alone_have_chains(name):
    dataset, values = build(name, target_per_class=3)
    assert values["model"] == "tiny-creatures" and dataset.num_classes == 12 and dataset.input_shape == (3, 28, 28)
    assert [len(env) for env in dataset] == [240, 36, 240, 240]
    image, label = dataset[0][13]
    assert image.shape == (3, 48, 48) and image.dtype == torch.uint8 and label == 1
    assert ids_of(image).tolist() == [0, 13]
    assert {env for env, _ in dataset.task.chains} == {0, 2, 3} and len(dataset.task.chains) == 720


def test_regimes_show_the_same_classes_in_different_pictures():
    clear, hidden = (build(name)[0] for name in NAMES)
    assert [label for _, label in clear[2]] == [label for _, label in hidden[2]]
    assert not torch.equal(clear[2][0][0], hidden[2][0][0])


@pytest.mark.parametrize("setting", ["verified", "unverified"])
def test_wrong_chains_are_left_out_unless_they_are_not_verified(setting, capsys):
    dataset, _ = build(NAMES[0], teacher_error=0.4, chain_verification=setting)
    labels = {key: creatures.CLASS_NAMES[creatures.label(key[1])] for key in dataset.task.chains}
    wrong = [key for key, chain in dataset.task.chains.items() if f"<CONCLUSION>{labels[key]}</" not in chain]
    if setting == "verified":
        assert not wrong and 0.5 * 720 < len(labels) < 0.7 * 720
    else:
        assert 0.3 * 720 < len(wrong) < 0.5 * 720 and len(labels) == 720


@pytest.mark.parametrize("value", [-0.1, 1.5, "many"])
def test_a_share_of_errors_is_between_0_and_1(value):
    with pytest.raises(ValueError, match="teacher_error"):
        build(NAMES[0], teacher_error=value)


def test_a_baseline_gets_small_floats():
    dataset, values = build(NAMES[1], "ERM")
    image, label = dataset[3][5]
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32 and label == 5 and "model" not in values
    assert len(dataset[1]) == 240 and registry.TWINS[NAMES[1]] == "Debug28"
