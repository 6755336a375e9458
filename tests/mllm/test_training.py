"""Each family through MTCT and a SARR round, full precision and quantized: which weights change, and reloading."""

import pytest
import torch

from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.mllm import load_mllm
from domainbed_reasoning.mllm.adapters import LoraSettings, lora_targets

MTCT_STEPS, SARR_STEPS = 50, 2


def frozen_weights(algorithm):
    return {
        name: weight.detach().clone()
        for name, weight in algorithm.mllm.network.named_parameters()
        if not weight.requires_grad
    }


def tower(name: str) -> str:
    return "vision" if "vision" in name or "visual" in name else "language"


def learns_nothing(algorithm, name: str) -> bool:
    """LLaVA reads its vision encoder before the last layer, whose adapters can have no gradient."""
    return algorithm.mllm.family.name == "LLaVA-1.5" and "vision_tower" in name and ".layers.2." in name


@pytest.fixture(scope="session")
def run(family_folder, algorithm_on, minibatches):
    """An RDMLDG run of one MTCT stage and one SARR round, with what was seen on the way."""
    schedule = Schedule((Stage(0, 0, MTCT_STEPS - 1), Stage(1, MTCT_STEPS, MTCT_STEPS + SARR_STEPS - 1)), 52, 52)
    algorithm = algorithm_on(
        family_folder, "RDMLDG", schedule, lr=1e-2, lr_schedule="constant", lora_rank=16, micro_batch=8
    )
    seen = {"frozen": frozen_weights(algorithm), "names": list(algorithm.mllm.adapters())}
    seen["values"] = [algorithm.update(minibatches)]
    seen["first"] = {name: weight.detach().clone() for name, weight in algorithm.mllm.adapters().items()}
    seen["values"] += [algorithm.update(minibatches) for _ in range(MTCT_STEPS - 1)]
    before = {name: weight.detach().clone() for name, weight in algorithm.mllm.adapters().items()}
    seen["sarr"] = [algorithm.update(minibatches) for _ in range(SARR_STEPS)]
    seen["moved"] = {n: not torch.equal(w, before[n]) for n, w in algorithm.mllm.adapters().items()}
    return algorithm, seen


def test_the_loss_of_mtct_falls(run):
    values = run[1]["values"]
    assert values[0]["chain_share"] == 1.0
    assert values[0]["label_loss"] > 0 and values[0]["chain_loss"] > 0
    assert values[-1]["label_loss"] < 0.5 * values[0]["label_loss"]
    assert values[-1]["chain_loss"] < 0.5 * values[0]["chain_loss"]


def test_only_adapters_move(run):
    algorithm, seen = run
    after = frozen_weights(algorithm)
    assert after.keys() == seen["frozen"].keys()
    assert all(torch.equal(after[name], weight) for name, weight in seen["frozen"].items())
    assert all("lora_" in name for name in seen["names"])


def test_the_first_step_reaches_every_adapter_of_both_towers(run):
    """B starts at zero, and its gradient does not: after one step every B has moved, save LLaVA's unused layer."""
    algorithm, seen = run
    ups = {name: weight for name, weight in seen["first"].items() if "lora_B" in name}
    assert {tower(name) for name in ups} == {"vision", "language"}
    still = {name for name, weight in ups.items() if not weight.any()}
    assert still == {name for name in ups if learns_nothing(algorithm, name)}
    assert not any(part in name for name in ups for part in ("lm_head", "projector", "merger", "connector"))


def test_a_round_of_sarr_tunes_on_the_models_own_chains(run):
    """After 50 steps on one chain the model writes it: kept, and tuned on."""
    _, seen = run
    assert seen["sarr"][0]["stage"] == 1.0
    assert seen["sarr"][0]["sarr1_accepted"] > 0.5
    assert seen["sarr"][0]["chain_loss"] < seen["values"][0]["chain_loss"]
    assert any(seen["moved"].values())


def test_both_answers_name_the_class_that_was_learned(run, minibatches):
    algorithm, _ = run
    algorithm.eval()
    for answer in ("label", "chain"):
        algorithm.hparams["answer"] = answer
        scores = algorithm.predict(minibatches[0][0])
        assert scores.shape == (4, 4)
        assert scores.argmax(1).tolist() == [0] * 4


def test_a_copy_for_inference_answers_as_the_trained_model(run, minibatches, class_names):
    """Adapters merged into a copy: equal up to rounding, and the trained weights are not touched."""
    algorithm, _ = run
    algorithm.eval()
    images, before = minibatches[0][0], frozen_weights(algorithm)
    expected = algorithm.mllm.class_scores(images, algorithm.q_cls, class_names)
    copied = algorithm.mllm.copy_for_inference()
    torch.testing.assert_close(
        copied.class_scores(images, algorithm.q_cls, class_names), expected, rtol=1e-4, atol=1e-3
    )
    assert copied.generate(images, algorithm.q_reason, 40) == algorithm.mllm.generate(images, algorithm.q_reason, 40)
    assert all(torch.equal(weight, before[name]) for name, weight in frozen_weights(algorithm).items())


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_models_train_and_answer(family_folder, algorithm_on, minibatches, quantize):
    """bitsandbytes on the CPU: the towers' layers are quantized, adapters of both towers move, answers are finite."""
    schedule = Schedule((Stage(0, 0, 3), Stage(1, 4, 4)), 5, 4)
    given = {"lr": 5e-3, "micro_batch": 8, "quantize": quantize, "max_new_tokens": 8}
    algorithm = algorithm_on(family_folder, "RDMLDG", schedule, **given)
    kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantize]
    quantized = {name for name, module in algorithm.mllm.base.named_modules() if type(module).__name__ == kind}
    quantized = {name for name in quantized if "lora_" not in name}
    assert {tower(name) for name in quantized} | {"vision"} == {"vision", "language"}  # FastVLM: convolutions
    assert not any(part in name for name in quantized for part in ("lm_head", "projector", "merger", "connector"))
    values = [algorithm.update(minibatches)]
    algorithm.eval()  # DomainBed evaluates between updates
    algorithm.predict(minibatches[0][0])
    algorithm.train()
    values += [algorithm.update(minibatches) for _ in range(3)]
    assert values[-1]["loss"] < values[0]["loss"]
    moved = {name for name, weight in algorithm.mllm.adapters().items() if "lora_B" in name and weight.any()}
    assert {tower(name) for name in moved} == {"vision", "language"}
    before = {name: weight.detach().clone() for name, weight in algorithm.mllm.adapters().items()}
    assert algorithm.update(minibatches)["sarr1_accepted"] == 0.0  # eight tokens are no chain
    assert algorithm.run.own_chains.labeled == 8
    assert all(torch.equal(weight, before[name]) for name, weight in algorithm.mllm.adapters().items())
    algorithm.eval()
    for answer in ("label", "chain"):
        algorithm.hparams["answer"] = answer
        assert algorithm.predict(minibatches[0][0]).isfinite().all()


def test_zero_shot_answers_either_way(family_folder, algorithm_on, minibatches):
    """By the label: log-likelihoods. By the chain: a random model writes none, so the label's probabilities."""
    algorithm = algorithm_on(family_folder, "MLLMZeroShot", answer="label", max_new_tokens=8).eval()
    assert algorithm.update(minibatches) == {"stage": 0.0} and not algorithm.mllm.adapters()
    images = minibatches[0][0]
    by_label = algorithm.predict(images)
    assert by_label.shape == (4, 4) and (by_label < 0).all()
    algorithm.hparams["answer"] = "chain"
    torch.testing.assert_close(algorithm.predict(images), by_label.softmax(1))


@pytest.mark.parametrize("towers", ["vision", "language"])
def test_adapters_of_one_tower_alone(family_folder, towers):
    mllm = load_mllm(family_folder, lora=LoraSettings(4, 8, towers=towers))
    assert {tower(name) for name in mllm.adapters()} == {towers}


def test_the_projector_gets_adapters_when_asked(family_folder):
    network = load_mllm(family_folder).network
    more = set(lora_targets(network, "both", True)) - set(lora_targets(network, "both", False))
    is_gemma = type(network).__name__.startswith("Gemma3")
    assert bool(more) != is_gemma  # Gemma's projection is a bare matrix


def test_gradient_checkpointing_changes_no_gradient(family_folder, algorithm_on, minibatches):
    gradients = []
    for checkpointing in (False, True):
        algorithm = algorithm_on(family_folder, "MTCT", micro_batch=8, gradient_checkpointing=checkpointing)
        algorithm.train()
        algorithm.update(minibatches)
        gradients.append({name: weight.grad for name, weight in algorithm.mllm.adapters().items()})
    for name, expected in gradients[0].items():
        if expected is not None:
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_the_first_update_is_taken_in_training_mode_as_all_others(folder_of, algorithm_on):
    """Models are loaded for answering; without training mode the first step would not checkpoint its activations."""
    algorithm = algorithm_on(folder_of("InternVL"), "MTCT", gradient_checkpointing=True)
    assert all(module.training for module in algorithm.modules())
