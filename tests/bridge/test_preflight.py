"""Checks before training: target domains, batches larger than a split, hyper-parameters."""

import argparse
import json
import math

import pytest
import torch
from domainbed import algorithms, datasets, hparams_registry

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.hparam_names import check_hparams

SHAPES = "ShapesReasoning"  # 140 images a domain, 28 of them held out


def job(build, algorithm="ERM", dataset=SHAPES, test_envs=(3,), **changes):
    """Call ``build`` as a train script with these arguments would."""
    args = argparse.Namespace(
        algorithm=algorithm, dataset=dataset, test_envs=list(test_envs), steps=None, output_dir="no-such-folder"
    )
    vars(args).update(trial_seed=0, hparams_seed=0, holdout_fraction=0.2, uda_holdout_fraction=0, hparams=None)
    vars(args).update({"task": "domain_generalization"} | changes)
    return build()


def dataset_of(algorithm="ERM", name=SHAPES, test_envs=(3,), **changes):
    hparams = hparams_registry.default_hparams(algorithm, name) | changes
    return vars(datasets)[name](None, test_envs if isinstance(test_envs, int) else list(test_envs), hparams)


# -- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ERM", "MTCT", "CLIPLoRA"])
def test_a_batch_larger_than_a_training_split_is_refused_with_the_largest_that_works(algorithm):
    message = (
        r"ShapesReasoning: the training split of domain 0 \(photo\) has 112 images, fewer than batch_size 113.*largest "
        "batch_size that works is 112"
    )
    with pytest.raises(ValueError, match=message):
        job(lambda: dataset_of(algorithm, batch_size=113), algorithm)
    job(lambda: dataset_of(algorithm, batch_size=112), algorithm)
    job(lambda: dataset_of(algorithm, batch_size=113, class_balanced=True), algorithm)  # draws with replacement
    with pytest.raises(ValueError, match="has 70 images"):
        job(lambda: dataset_of(algorithm, batch_size=71), algorithm, holdout_fraction=0.5)


def test_a_batch_larger_than_the_uda_split_is_refused_where_it_is_drawn():
    """7 target images: 1 held out, half of 6 for adaptation. Shapes have no workers, which draw ahead."""

    def build(size):
        return lambda: dataset_of(batch_size=size, target_per_class=1)

    adapting = {"task": "domain_adaptation", "uda_holdout_fraction": 0.5}
    with pytest.raises(ValueError, match=r"the uda split of domain 3 \(negative\) has 3 images.*works is 3"):
        job(build(4), **adapting)
    job(build(3), **adapting)
    job(build(4), uda_holdout_fraction=0.5)
    with pytest.raises(ValueError, match="uda split of target domain 3.*is empty at --uda_holdout_fraction 0.1"):
        job(build(3), task="domain_adaptation", uda_holdout_fraction=0.1)


@pytest.mark.parametrize(("share", "message"), [(0, "out split of domain 0"), (1, "must be in"), (-0.2, "must be in")])
def test_a_holdout_that_leaves_a_split_empty_is_refused(share, message):
    with pytest.raises(ValueError, match=message):
        job(dataset_of, holdout_fraction=share)


def test_our_algorithms_on_a_debug_dataset_are_checked_before_its_loaders():
    """16 images an environment, 3 held out; its loaders have workers, which draw before the algorithm is built."""

    def ask():
        return hparams_registry.default_hparams("MTCT", "Debug28")

    with pytest.raises(ValueError, match="Debug28: the training split of domain 1 .* 13 images.*batch_size 14"):
        job(ask, "MTCT", "Debug28", test_envs=[0], hparams='{"batch_size": 14}')
    state = torch.get_rng_state()
    job(ask, "MTCT", "Debug28", test_envs=[0], hparams='{"batch_size": 13}')
    assert torch.equal(torch.get_rng_state(), state)
    job(lambda: hparams_registry.default_hparams("ERM", "Debug28"), "ERM", "Debug28", hparams='{"batch_size": 99}')


def test_a_stock_dataset_with_a_twin_is_refused_before_it_is_built():
    with pytest.raises(ValueError, match="use --dataset PACSReasoning"):
        job(lambda: hparams_registry.default_hparams("MTCT", "PACS"), "MTCT", "PACS")


# -- target domains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test_envs", "message"),
    [
        ([7], r"--test_envs 7: ShapesReasoning has no domain 7. Its domains are 0 \(photo\), 1"),
        ([-1], "no domain -1"),
        ([4], "no domain 4"),
        ([0, 9], "--test_envs 0 9: .*no domain 9"),
        ([3, 3], "names domain 3 of ShapesReasoning twice"),
        ([0, 1, 2, 3], "--test_envs 0 1 2 3 leaves ShapesReasoning no source domain"),
        (["3"], "no domain '3'"),
        ([1.0], "no domain 1.0"),
        ([True], "no domain True"),
        (4, "no domain 4"),
    ],
)
@pytest.mark.parametrize("algorithm", ["ERM", "MTCT", "CLIPZeroShot"])
def test_invalid_target_domains_are_rejected(algorithm, test_envs, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(algorithm, test_envs=test_envs)


def test_no_target_domain_makes_all_of_them_sources():
    assert len(dataset_of("MTCT", test_envs=()).task.chains) == 560


def test_target_domains_of_stock_datasets_are_checked_for_our_algorithms_alone():
    with pytest.raises(ValueError, match="--test_envs 5: Debug28 has no domain 5"):
        job(lambda: hparams_registry.default_hparams("MTCT", "Debug28"), "MTCT", "Debug28", test_envs=[5])
    job(lambda: hparams_registry.default_hparams("ERM", "Debug28"), "ERM", "Debug28", test_envs=[5])


# -- hyper-parameters ---------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "warmup": [5, -0.1],
    "top_p": [0, 1.5],
    "lora_dropout": [1.0, 2],
    "clip_lora_dropout": [1.0],
    "rho": [1.5],
    "batch_size": [0],
    "workers": [-1],
    "sarr_epochs": [0],
    "lr": [0.0],
    "lora_alpha": [0],
    "model": [" "],
    "chains": [""],
    "lora_target_modules": [["q_proj", ""], ["q_proj", "q_proj"], [1]],
}
OF_TYPE = {
    bool: ["false", "true", 0, 1, 0.0],
    int: ["8", 8.5, True, -1, 1 << 40, math.nan],
    float: ["0.1", True, -1, math.nan, math.inf, 10**400],
    str: [7, True, "", "no such thing", ["tiny"]],
}


def tables():
    for name, target in [*registry.ALGORITHMS.items(), *registry.DATASETS.items()]:
        yield name, registry.load(target).HPARAMS
    yield from registry.BASELINE_HPARAMS.items()
    yield "DomainBed", registry.STOCK_CODE_HPARAMS


def wrong_values(name, row):
    kind = str if row.default is None else type(row.default)
    kind = float if name.endswith("alpha") else kind  # whole by default, and no integer's affair
    values = [*OF_TYPE[kind], [], {}, *OUT_OF_RANGE.get(name, [])]
    if row.default is not None:
        values.append(None)
    if name in ("model", "clip_model", "chains", "init_adapter"):
        values.remove("no such thing")  # looked for when it is loaded
    if name == "lora_target_modules":
        values.remove(["tiny"])  # likewise
    return values


ROWS = [pytest.param(table, name, row, id=f"{table}-{name}") for table, rows in tables() for name, row in rows.items()]


@pytest.mark.parametrize(("table", "name", "row"), ROWS)
def test_wrong_types_and_out_of_range_values_of_every_row_are_refused_by_name(table, name, row):
    algorithm = table if table in registry.ALGORITHMS else "RDMLDG"
    for value in wrong_values(name, row):
        with pytest.raises(ValueError, match=rf"^hparam {name} must be .+; got ") as error:
            check_hparams({name: value}, algorithm)
        assert repr(value)[:60] in str(error.value)


def test_every_default_and_every_draw_is_allowed():
    for name in registry.ALGORITHMS:
        for dataset in (SHAPES, "PACSReasoning", "Debug28"):
            check_hparams(hparams_registry.default_hparams(name, dataset), name)
            for seed in range(1, 6):
                check_hparams(hparams_registry.random_hparams(name, dataset, seed), name)


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("RDMLDG", {"batch_size": None}),
        ("RDMLDG", {"batch_size": "8"}),
        ("RDMLDG", {"sarr_rounds": 2.5}),
        ("RDMLDG", {"model": None}),
        ("CLIPLoRA", {"clip_epochs": None}),
        ("ERM", {"data_augmentation": "false"}),
        ("ERM", {"class_balanced": 1}),
        ("ERM", {"batch_size": "16"}),
        ("ERM", {"rho": "0.5"}),
    ],
)
def test_dataset_rejects_hparams_that_it_or_the_algorithm_cannot_use(algorithm, changes):
    with pytest.raises(ValueError, match=f"hparam {next(iter(changes))} must be"):
        dataset_of(algorithm, **changes)


@pytest.mark.parametrize("algorithm", ["ERM", "CORAL"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sarr_rounds": "3"}, "hparam sarr_rounds must be an integer"),
        ({"resume": "false"}, "hparam resume must be true or false; got 'false'"),
        ({"workers": -1}, "hparam workers must be an integer from 0"),
        ({"btch_size": 4}, "Did you mean 'batch_size'"),
        ({"algorithm": "RDMLDG"}, "which --algorithm chooses; got 'RDMLDG'"),
    ],
)
def test_a_baselines_job_on_our_dataset_refuses_ours_that_are_wrong(algorithm, given, message):
    """A sweep passes one ``--hparams`` to all its algorithms: it is refused by the first of them."""

    def ask():
        return hparams_registry.default_hparams(algorithm, SHAPES)

    with pytest.raises(ValueError, match=message):
        job(ask, algorithm, hparams=json.dumps(given))
    job(ask, algorithm, hparams=json.dumps({"sarr_rounds": 3, "lr": "0.1", "workers": 0}))  # its lr is stock's affair
    job(lambda: hparams_registry.default_hparams(algorithm, "Debug28"), algorithm, "Debug28", hparams=json.dumps(given))


@pytest.mark.parametrize("given", ["{bad", "[1]", "7", '{"batch_size": 8'])
def test_hparams_that_are_not_a_json_object_are_rejected(given):
    with pytest.raises(ValueError, match="--hparams (is not valid JSON|must be a JSON object)"):
        job(lambda: hparams_registry.default_hparams("MTCT", SHAPES), "MTCT", hparams=given)


# -- the task of an algorithm -------------------------------------------------------------------------------------

TINY = {"batch_size": 2, "max_new_tokens": 4, "target_per_class": 1}


def algorithm_of(dataset, hparams, name="MTCT"):
    sources = len(dataset) - len(dataset.task.test_envs)
    return algorithms.get_algorithm_class(name)(dataset.input_shape, dataset.num_classes, sources, hparams)


def batches(dataset, envs):
    collate = torch.utils.data.default_collate
    return [tuple(collate([dataset[env][index] for index in range(2)])) for env in envs]


@pytest.fixture
def hparams():
    return hparams_registry.default_hparams("MTCT", SHAPES) | TINY


def test_a_copy_of_the_hparams_trains_on_the_datasets_names_and_chains(hparams):
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    algorithm = algorithm_of(dataset, json.loads(json.dumps(hparams)))
    assert algorithm.task is dataset.task and "class 0" not in algorithm.q_cls
    assert algorithm.update(batches(dataset, [0, 1, 2]))["chain_share"] == 1.0


def test_hparams_changed_after_the_dataset_was_built_are_refused(hparams):
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    with pytest.raises(ValueError, match="MTCT cannot find its dataset's class names and chains"):
        algorithm_of(dataset, hparams | {"lr": 0.123})


def test_an_algorithm_of_other_hparams_is_refused_by_its_first_batch(hparams):
    """Without the names of the dataset's own hyper-parameters it looks as if made for a stock dataset."""
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    others = {name: value for name, value in hparams.items() if name not in dataset.HPARAMS}
    algorithm = algorithm_of(dataset, others)
    with pytest.raises(ValueError, match="cannot find its dataset's class names and chains"):
        algorithm.update(batches(dataset, [0, 1, 2]))


def test_images_of_a_target_domain_or_without_their_identity_are_not_trained_on(hparams):
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    algorithm = algorithm_of(dataset, hparams)
    with pytest.raises(ValueError, match="contains images of domain 3, a target"):
        algorithm.update(batches(dataset, [0, 1, 3]))
    changed = [(x.as_subclass(torch.Tensor), y) for x, y in batches(dataset, [0, 1, 2])]
    with pytest.raises(ValueError, match="chains cannot be found"):
        algorithm.update(changed)


def test_dataset_is_found_while_only_its_loaders_exist(hparams):
    def environments():
        return list(datasets.ShapesReasoning(None, [3], hparams))

    envs = environments()
    algorithm = algorithms.get_algorithm_class("MTCT")((3, 28, 28), 7, 3, dict(hparams))
    assert algorithm.task is envs[0].task


def test_a_dataset_for_another_algorithm_or_other_targets_than_the_arguments_is_refused(hparams):
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    with pytest.raises(ValueError, match="hparam algorithm must be 'LabelSFT', the algorithm that runs; got 'MTCT'"):
        algorithm_of(dataset, hparams, "LabelSFT")
    with pytest.raises(ValueError, match="are --dataset ShapesReasoning --test_envs 2, but .* domains 3"):
        job(lambda: algorithm_of(dataset, hparams), "MTCT", test_envs=[2])


def test_algorithm_outside_of_a_job_explains_the_consequences(hparams, capsys):
    dataset = datasets.ShapesReasoning(None, [3], hparams | {"batch_size": 113})
    algorithm_of(dataset, hparams | {"batch_size": 113})
    printed = capsys.readouterr().out
    assert "MTCT: found no arguments of a running train script in this process" in printed
    assert f"Default schedule of {dataset.N_STEPS} steps" in printed and "no records, no resume" in printed
    assert "batch_size 113 is larger than a source domain's training split, of 112 images" in printed
