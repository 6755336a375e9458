"""Variants of LoRA, chosen layers, adapters to start from, and averages of adapters, as the algorithms train them."""

import copy
import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from builders.training import build, minibatches, write_trained_job
from domainbed_reasoning.bridge.samples import ids_of
from domainbed_reasoning.jobs.export import export_adapters, export_merged
from domainbed_reasoning.jobs.predict import Predictor
from domainbed_reasoning.jobs.trained import JobError, read_job
from domainbed_reasoning.method.average import AdapterAverage
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.loading import TINY
from domainbed_reasoning.mllm.lora import mixed_adapter

QUICK = {"lr": 2e-2, "lr_schedule": "constant", "micro_batch": 8, "max_new_tokens": 8, "answer": "label"}


def trained(steps=2, name="MTCT", **changes):
    dataset, algorithm = build(name, **{**QUICK, **changes})
    before = {key: weight.detach().clone() for key, weight in algorithm.mllm.network.named_parameters()}
    losses = [algorithm.update(minibatches(dataset))["loss"] for _ in range(steps)]
    return dataset, algorithm, before, losses


def scores_of(algorithm, x):
    return algorithm.mllm.eval().class_scores(x, algorithm.q_cls, algorithm.task.class_names)


@pytest.mark.parametrize(
    "variant", ["dora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "rslora"))]
)
def test_a_variant_learns_and_its_export_loads_in_plain_peft(variant, tmp_path):
    dataset, algorithm, before, losses = trained(4, lr=4e-3, lora_variant=variant, lora_rank=4, lora_alpha=8)
    assert losses[-1] < losses[0]
    moved = {
        name for name, weight in algorithm.mllm.network.named_parameters() if not torch.equal(weight, before[name])
    }
    assert moved and moved <= set(algorithm.mllm.adapters())  # base weights stay as they are
    assert any("lora_magnitude_vector" in name for name in moved) == (variant == "dora")
    layer = next(module for module in algorithm.modules() if hasattr(module, "lora_A"))
    assert layer.scaling["default"] == pytest.approx(8 / (2 if variant == "rslora" else 4))
    job = write_trained_job(algorithm, tmp_path / "job")
    x = minibatches(dataset)[0][0]
    expected = scores_of(algorithm, x)
    loaded = read_job(job).load()
    asked = (x, algorithm.q_cls, algorithm.task.class_names)
    assert torch.equal(loaded.class_scores(*asked), expected)
    torch.testing.assert_close(loaded.merge().class_scores(*asked), expected, rtol=1e-3, atol=1e-3)

    export_adapters(job, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (variant == "dora", variant == "rslora")
    base = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    for name, weight in plain.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, algorithm.mllm.adapters()[name])
    assert torch.equal(read_job(tmp_path / "adapter").load().class_scores(*asked), expected)
    export_merged(job, tmp_path / "merged")
    merged = load_mllm(str(tmp_path / "merged")).eval()
    torch.testing.assert_close(merged.class_scores(*asked), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("variant", "ours"), [("lora", True), ("rslora", True), ("dora", False)])
def test_in_bfloat16_peft_computes_dora_and_our_layers_the_others(variant, ours, capsys):
    mllm = load_mllm("tiny", lora=LoraSettings(4, 8, variant=variant), dtype="bfloat16").train()
    assert ("PEFT's own layers" in capsys.readouterr().out) == (not ours)
    assert all(weight.dtype == torch.float32 for weight in mllm.adapters().values())
    layers = [module for module in mllm.modules() if hasattr(module, "lora_A")]
    found = {mixed_adapter(layer, torch.ones(1, layer.in_features, dtype=torch.bfloat16)) is None for layer in layers}
    assert found == {not ours}
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    values, mask = mllm.log_likelihoods(mllm.encode(images), "What is it?", ["a dog"] * 2)
    (-(values * mask).sum()).backward()
    assert any(float(weight.grad.abs().max()) > 0 for weight in mllm.adapters().values() if weight.grad is not None)


def test_layers_are_chosen_by_name_within_the_towers():
    _, algorithm = build("MTCT", lora_target_modules=["q_proj", "v_proj"], lora_targets="language")
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in algorithm.mllm.adapters()}
    assert names == {"q_proj", "v_proj"}
    assert not any("vision" in name for name in algorithm.mllm.adapters())
    with pytest.raises(ValueError, match=r"no Linear layer that lora_targets chooses is called 'proj'.*q_proj, .*v_pr"):
        build("MTCT", lora_target_modules=["q_proj", "proj"])
    for wrong in ([], "q_proj", ["q_proj", "q_proj"], [1]):
        with pytest.raises(ValueError, match="hparam lora_target_modules must be a list of different names or null"):
            build("MTCT", lora_target_modules=wrong)


def test_names_of_layers_are_in_the_export_and_in_predict(tmp_path):
    dataset, algorithm, _, _ = trained(lora_target_modules=["q_proj"])
    job = write_trained_job(algorithm, tmp_path / "job")
    export_adapters(job, tmp_path / "adapter")
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets and all(name.endswith("q_proj") for name in targets)
    x = minibatches(dataset)[0][0]
    loaded = read_job(tmp_path / "adapter").load()
    assert torch.equal(loaded.class_scores(x, algorithm.q_cls, algorithm.task.class_names), scores_of(algorithm, x))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Dataset, trained algorithm and its exported adapter of rank 4."""
    dataset, algorithm, _, _ = trained(lora_rank=4, lora_alpha=8)
    folder = tmp_path_factory.mktemp("start")
    export_adapters(write_trained_job(algorithm, folder / "job", [3]), folder / "adapter")
    return dataset, algorithm, folder / "adapter"


def test_training_starts_from_an_adapter(adapter):
    dataset, source, folder = adapter
    start = {"init_adapter": str(folder), "lora_rank": 4, "lora_alpha": 8}
    _, algorithm = build("LabelSFT", **QUICK, **start)
    x = minibatches(dataset)[0][0]
    assert torch.equal(scores_of(algorithm, x), scores_of(source, x))
    for name, weight in algorithm.mllm.adapters().items():
        assert torch.equal(weight, source.mllm.adapters()[name]) and weight.requires_grad
    algorithm.train()
    algorithm.update(minibatches(dataset))
    assert not torch.equal(scores_of(algorithm, x), scores_of(source, x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, "it has lora_rank 4, this job 8"),
        ({"lora_alpha": 16}, "it has lora_alpha 8, this job 16"),
        ({"lora_variant": "dora"}, "it has lora_variant 'lora', this job 'dora'"),
        ({"lora_targets": "vision"}, r"it adapts \d+ layers, this job \d+; only the adapter has .*language_model"),
        ({"lora_target_modules": ["q_proj"]}, r"it adapts \d+ layers, this job \d+; only the adapter has"),
        ({"lora_projector": True}, "only this job has .*projector"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_adapter_that_does_not_fit_is_refused_with_both_values(adapter, changes, message):
    hparams = {"init_adapter": str(adapter[2]), "lora_rank": 4, "lora_alpha": 8}
    with pytest.raises(ValueError, match=f"init_adapter .*{message}"):
        build("MTCT", **{**hparams, **changes})


def test_a_folder_without_a_usable_adapter_is_refused(adapter, tmp_path):
    fitting = {"lora_rank": 4, "lora_alpha": 8}
    with pytest.raises(ValueError, match=r"no adapter_config.json found there.*export --job"):
        build("MTCT", init_adapter=str(tmp_path), **fitting)
    broken = tmp_path / "broken"
    shutil.copytree(adapter[2], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        build("MTCT", init_adapter=str(broken), **fitting)
    (broken / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="not a LoRA adapter"):
        build("MTCT", init_adapter=str(broken), **fitting)


# -- averages ----------------------------------------------------------------------------------------------------------


def delta(adapters, name, scaling):
    """s B A of a layer, in float64."""
    a, b = (adapters[f"{name}.lora_{part}.default.weight"].double() for part in "AB")
    return scaling * b @ a


def test_the_average_adapter_has_the_average_of_the_products():
    """Two adapters of rank 1: ([1], [2]) and ([3], [4]) have the products 2 and 12, mean 7; those of the means: 6."""
    average = AdapterAverage()
    for step, (a, b) in enumerate([(1.0, 2.0), (3.0, 4.0)]):
        one = {"x.lora_A.default.weight": torch.tensor([[a]]), "x.lora_B.default.weight": torch.tensor([[b]])}
        assert average.add(0, step, one) and not average.add(0, step, one)
    mean = average.adapters()
    assert delta(mean, "x", 1.0).tolist() == [[7.0]]
    restored = AdapterAverage()
    restored.load_state_dict(average.state_dict())
    assert all(torch.equal(mean[name], weight) for name, weight in restored.adapters().items())
    assert average.add(1, 2, one)  # another stage: from its own evaluations alone
    assert delta(average.adapters(), "x", 1.0).tolist() == [[12.0]]


def evaluated(variant="lora", **changes):
    """An algorithm, evaluated after each of four steps; the adapters that it had after each, and its losses."""
    dataset, algorithm = build("MTCT", **QUICK, lora_variant=variant, lora_rank=2, lora_alpha=8, **changes)
    algorithm.schedule = Schedule((Stage(0, 0, 9),), 10, 1)
    seen, losses = [], []
    x = minibatches(dataset)[0][0]
    for _ in range(4):
        losses.append(algorithm.train().update(minibatches(dataset))["loss"])
        algorithm.eval()
        scores = algorithm.predict(x)
        seen.append({name: weight.detach().clone() for name, weight in algorithm.mllm.adapters().items()})
    return dataset, algorithm, seen, losses, scores


@pytest.mark.parametrize("variant", ["rslora", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("copies", [True, False])
def test_the_average_of_a_stages_evaluations_answers_and_is_saved(variant, copies, monkeypatch, tmp_path):
    """The first evaluation, after a single update, does not count; training is the same as without averages."""
    monkeypatch.setattr("domainbed_reasoning.mllm.MLLM.fits_a_copy", lambda *_: copies)
    dataset, algorithm, seen, losses, scores = evaluated(variant, average_adapters=True)
    *_, alone, plain_scores = evaluated(variant)
    assert losses == alone
    x = minibatches(dataset)[0][0]
    assert (scores - plain_scores).abs().max() > 1e-3
    scaling = 8 / (2 if variant == "lora" else 2**0.5)
    state = algorithm.state_dict()
    for name in {key.partition(".lora_")[0] for key in state}:
        mean = sum(delta(one, name, scaling) for one in seen[1:]) / 3
        torch.testing.assert_close(delta(state, name, scaling), mean, rtol=1e-5, atol=1e-7)

    job = write_trained_job(algorithm, tmp_path / "job")
    found = read_job(job)
    lora = found.lora()
    assert lora.rank == 6
    base = load_mllm("tiny").base.state_dict()
    merged = found.load().merge().base.state_dict()
    shown = 0
    for name in {key.partition(".lora_")[0] for key in state}:
        mean = sum(delta(one, name, scaling) for one in seen[1:]) / 3
        weight = name.removeprefix("base_model.model.") + ".weight"
        torch.testing.assert_close(merged[weight].double() - base[weight].double(), mean, rtol=1e-3, atol=1e-6)
        shown = max(shown, float(mean.abs().max()))
    assert shown > 1e-3
    asked = (x, algorithm.q_cls, algorithm.task.class_names)
    torch.testing.assert_close(found.load().class_scores(*asked), scores, rtol=1e-4, atol=1e-3)
    export_adapters(job, tmp_path / "adapter")
    exported = read_job(tmp_path / "adapter").load()
    assert torch.equal(exported.class_scores(*asked), found.load().class_scores(*asked))
    plain = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    layer = next(module for module in loaded.modules() if hasattr(module, "lora_A"))
    assert layer.r["default"] == 6 and layer.scaling["default"] == pytest.approx(scaling)
    assert Predictor(job, "label").predict([]) == []


def test_a_saved_average_loads_into_a_fresh_algorithm(tmp_path):
    dataset, algorithm, _, _, scores = evaluated(average_adapters=True)
    _, fresh = build("MTCT", **QUICK, lora_rank=2, lora_alpha=8, average_adapters=True)
    fresh.load_state_dict(algorithm.state_dict())
    x = minibatches(dataset)[0][0]
    assert ids_of(x) is not None
    torch.testing.assert_close(fresh.eval().predict(x), scores, rtol=1e-4, atol=1e-3)


def test_a_restored_state_goes_on_with_the_same_average():
    """What a restart restores after four updates: the fifth update and its evaluation end in the same average."""
    dataset, algorithm, _, _, _ = evaluated(average_adapters=True)
    state = copy.deepcopy(algorithm.training_state())  # as a file has it
    _, fresh = build("MTCT", **QUICK, lora_rank=2, lora_alpha=8, average_adapters=True)
    fresh.schedule, fresh.session.steps_taken = algorithm.schedule, algorithm.session.steps_taken
    fresh.restore(state)
    before = algorithm.state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in fresh.state_dict().items())
    x = minibatches(dataset)[0][0]
    for each in (algorithm, fresh):
        each.train().update(minibatches(dataset))
        each.eval().predict(x)
    after = algorithm.state_dict()
    assert {weight.shape[0] for name, weight in after.items() if ".lora_A." in name} == {8}
    assert all(torch.equal(weight, after[name]) for name, weight in fresh.state_dict().items())


def test_an_average_of_dora_is_refused_and_so_is_a_rank_that_is_no_multiple(tmp_path):
    with pytest.raises(ValueError, match="average of DoRA's weights is no adapter"):
        build("MTCT", average_adapters=True, lora_variant="dora")
    _, algorithm, _, _ = trained(lora_rank=3)
    job = write_trained_job(algorithm, tmp_path / "job")
    task = json.loads((job / "task.json").read_text())
    for average in (True, False):
        task["hparams"] |= {"lora_rank": 2, "average_adapters": average}
        (job / "task.json").write_text(json.dumps(task))
        with pytest.raises(JobError, match="has rank 3, but task.json has lora_rank 2"):
            read_job(job)


def test_an_adapter_that_changes_the_base_is_refused(tmp_path):
    """PiSSA subtracts its start from the base: its A and B belong to no model of this package."""
    bare = load_mllm(TINY).network
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(bare, config).save_pretrained(tmp_path)
    start = {"init_adapter": str(tmp_path), "lora_rank": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="init_lora_weights 'pissa'.*path_initial_model_for_weight_conversion"):
        build("MTCT", **start)


@pytest.mark.parametrize("name", ["LabelSFT", "MTCT", "RDMLDG"])
def test_no_epochs_and_no_rounds_are_nothing_to_train(name):
    with pytest.raises(ValueError, match="mtct_epochs: 0 leaves .* nothing to train on. Use MLLMZeroShot"):
        build(name, mtct_epochs=0, **({"sarr_rounds": 0} if name == "RDMLDG" else {}))
