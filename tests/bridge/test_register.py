"""Entries in DomainBed's registries, and the hyper-parameters of each algorithm on each dataset."""

import json

import numpy
import pytest
from domainbed import algorithms, datasets, hparams_registry

from domainbed_reasoning import registry
from domainbed_reasoning.bridge import register
from domainbed_reasoning.bridge.hparam_names import check_hparams

STOCK = [name for name in algorithms.ALGORITHMS if name not in registry.ALGORITHMS]
IMAGE_FOLDERS = [(ours, twin) for ours, twin in registry.TWINS.items() if ours not in registry.RENDERED]


def test_our_names_stand_after_the_stock_ones():
    assert algorithms.ALGORITHMS == [*STOCK, *registry.ALGORITHMS]
    assert datasets.DATASETS[-len(registry.DATASETS) :] == list(registry.DATASETS)


@pytest.mark.parametrize(("ours", "twin"), IMAGE_FOLDERS)
@pytest.mark.parametrize("algorithm", STOCK)
def test_baselines_get_the_twins_hparams(algorithm, ours, twin):
    assert hparams_registry.default_hparams(algorithm, ours) == hparams_registry.default_hparams(algorithm, twin)
    assert hparams_registry.random_hparams(algorithm, ours, 7) == hparams_registry.random_hparams(algorithm, twin, 7)


@pytest.mark.parametrize("dataset", registry.RENDERED)
def test_baselines_get_debug28s_hparams_on_rendered_datasets_but_for_the_batch_size(dataset):
    ours = hparams_registry.default_hparams("ERM", dataset)
    assert ours.pop("batch_size") == 16
    twin = hparams_registry.default_hparams("ERM", "Debug28")
    del twin["batch_size"]
    assert ours == twin


@pytest.mark.parametrize("dataset", registry.RENDERED)
def test_random_batches_on_rendered_datasets_fit_into_the_training_split_of_a_domain(dataset):
    """The smallest has 140 images, 112 of them to train on; a larger batch never fills, and the job never ends."""
    drawn = {hparams_registry.random_hparams("ERM", dataset, seed)["batch_size"] for seed in range(50)}
    assert min(drawn) >= 8
    assert max(drawn) <= 32
    assert len(drawn) > 5


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
@pytest.mark.parametrize("dataset", ["Debug28", "PACS", "PACSReasoning", "ShapesReasoning"])
def test_hparams_are_plain_python(algorithm, dataset):
    """DomainBed writes them as JSON at every checkpoint; numpy's scalars end a run there."""
    for hparams in (
        hparams_registry.default_hparams(algorithm, dataset),
        hparams_registry.random_hparams(algorithm, dataset, 1),
    ):
        assert json.loads(json.dumps(hparams)) == hparams


def test_plain_turns_numpy_into_python_however_deep():
    value = {"a": [numpy.float64(0.5), (numpy.int64(2),)], "b": numpy.bool_(True), "c": numpy.arange(2), "d": "text"}
    plain = register.plain(value)
    assert plain == {"a": [0.5, (2,)], "b": True, "c": [0, 1], "d": "text"}
    assert type(plain["a"][0]) is float
    assert type(plain["a"][1][0]) is int
    assert plain["b"] is True


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_our_algorithms_get_their_own_table_and_the_datasets(name):
    cls = algorithms.get_algorithm_class(name)
    hparams = hparams_registry.default_hparams(name, "PACSReasoning")
    table = cls.HPARAMS | datasets.get_dataset_class("PACSReasoning").HPARAMS
    assert hparams.keys() == table.keys() | {"algorithm", "data_augmentation", "class_balanced"}
    assert hparams["algorithm"] == name
    assert "resnet18" not in hparams
    for key, hparam in table.items():
        assert hparams[key] == hparam.default, key


def test_the_embedded_datasets_have_defaults_of_their_own():
    assert hparams_registry.default_hparams("RDMLDG", "ShapesReasoning")["model"] == "tiny"
    assert hparams_registry.default_hparams("RDMLDG", "Debug28")["model"] == "tiny"
    assert hparams_registry.default_hparams("RDMLDG", "PACSReasoning")["model"] == "OpenGVLab/InternVL3-8B-hf"


def test_draws_on_the_embedded_datasets_are_around_their_own_defaults():
    """The same draws, in proportion: InternVL3's learning rates would train nothing there."""
    for seed in range(1, 6):
        real, embedded = (
            hparams_registry.random_hparams("MTCT", name, seed) for name in ("PACSReasoning", "ShapesReasoning")
        )
        assert embedded["lr"] == pytest.approx(real["lr"] * 4e-3 / 5e-4)
        assert embedded["batch_size"] == max(1, round(real["batch_size"] * 6 / 43))
        assert type(embedded["batch_size"]) is int and embedded["lora_rank"] == real["lora_rank"]


def test_random_search_draws_what_has_a_sampler_and_nothing_else():
    table = algorithms.get_algorithm_class("RDMLDG").HPARAMS
    drawn = [hparams_registry.random_hparams("RDMLDG", "PACSReasoning", seed) for seed in range(20)]
    for name, hparam in table.items():
        values = {json.dumps(hparams[name]) for hparams in drawn}
        if hparam.sample is None:
            assert values == {json.dumps(hparam.default)}, name
    assert len({hparams["lr"] for hparams in drawn}) == 20
    assert drawn[3] == hparams_registry.random_hparams("RDMLDG", "PACSReasoning", 3)


def test_misspelled_hparam_is_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match="Unknown hparam of MTCT 'lora_rnk'. Did you mean 'lora_rank'"):
        check_hparams({"lora_rnk": 4}, "MTCT")


def test_hparams_of_the_other_algorithms_in_a_sweep_are_accepted():
    """A sweep passes one ``--hparams`` to all its algorithms, so MTCT sees those of ERM and of RDMLDG."""
    check_hparams({"resnet18": True, "sarr_rounds": 1, "irm_lambda": 1.0, "chains": None}, "MTCT")


def test_our_own_hparams_pass_the_check():
    for name in registry.ALGORITHMS:
        check_hparams(hparams_registry.random_hparams(name, "ShapesReasoning", 5), name)


def test_publishing_again_changes_nothing():
    before = [*algorithms.ALGORITHMS], [*datasets.DATASETS], hparams_registry._hparams
    for module in (algorithms, datasets, hparams_registry):
        register.publish(module)
    assert (algorithms.ALGORITHMS, datasets.DATASETS, hparams_registry._hparams) == before


def test_the_registry_says_of_algorithms_what_their_classes_say():
    """Datasets prepare chains and images for an algorithm that does not exist yet, by its name alone."""
    classes = {name: registry.load(target) for name, target in registry.ALGORITHMS.items()}
    chains = {name for name, cls in classes.items() if getattr(cls, "CHAIN_PATH", False)}
    assert chains == registry.READ_CHAINS
    assert {name for name, cls in classes.items() if "clip_model" in cls.HPARAMS} == registry.ON_CLIP
