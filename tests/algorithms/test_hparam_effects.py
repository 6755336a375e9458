"""Every hyper-parameter of optimizer, adapters and sampling takes effect, as the algorithms pass it on."""

import copy
import math

import pytest
import torch
from domainbed import algorithms, datasets, hparams_registry
from PIL import Image

from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.optimizer import optimizer_of_stage
from domainbed_reasoning.mllm import load_mllm

OPTIMIZER = {"lr": 0.1, "weight_decay": 0.5, "lr_schedule": "constant", "warmup": 0.0}


def build(name, **changes):
    """An algorithm as the train script builds it."""
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams(name, "ShapesReasoning") | changes
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    return dataset, algorithms.get_algorithm_class(name)(dataset.input_shape, dataset.num_classes, 3, hparams)


@pytest.mark.parametrize(("weight_decay", "expected"), [(0.5, 3.8), (0.0, 4.0)])
def test_weight_decay_shrinks_a_weight_by_rate_times_decay_times_weight(weight_decay, expected):
    """4 - 0.1 · 0.5 · 4, apart from the gradient (AdamW): as a part of the gradient it would be a whole step of 0.1."""
    weight = torch.nn.Parameter(torch.tensor(4.0))
    optimizer, _ = optimizer_of_stage([weight], OPTIMIZER | {"weight_decay": weight_decay}, steps=10)
    weight.grad = torch.tensor(0.0)
    optimizer.step()
    assert float(weight.detach()) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["MTCT", "CLIPLoRA"])
def test_the_algorithms_optimizer_has_the_rate_and_the_decay_that_are_asked_for(name):
    dataset, algorithm = build(name, lr=2e-3, weight_decay=0.07, **({"warmup": 0.0} if name == "MTCT" else {}))
    algorithm.update([torch.utils.data.default_collate([dataset[env][0]]) for env in range(3)])
    (group,) = (algorithm.run if name == "MTCT" else algorithm).optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (2e-3, 0.07)
    adapters = (algorithm.mllm if name == "MTCT" else algorithm.clip).adapters()
    assert {id(weight) for weight in group["params"]} == {id(weight) for weight in adapters.values()}


LORA = {"lora_rank": 2, "lora_alpha": 12, "lora_dropout": 0.5}
CLIP_LORA = {f"clip_{name}": value for name, value in LORA.items()}


@pytest.mark.parametrize(("name", "hparams", "scale"), [("MTCT", LORA, 12 / 2), ("CLIPLoRA", CLIP_LORA, 12 / 2**0.5)])
def test_an_adapter_adds_its_scaled_product_and_drops_inputs_in_training_alone(name, hparams, scale):
    """W x + α/r · B A x; CLIP-LoRA's is α/√r. A share of 0.5 of x is dropped, the rest doubled: (0 or 2) · x."""
    _, algorithm = build(name, **hparams)
    layers = [module for module in algorithm.modules() if hasattr(module, "lora_A")]
    assert layers
    for layer in (layers[0], layers[-1]):  # either tower
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        torch.nn.init.normal_(b.weight)
        assert a.weight.shape[0] == b.weight.shape[1] == 2
        x = torch.ones(1, a.in_features)
        algorithm.eval()
        torch.testing.assert_close(layer(x) - layer.base_layer(x), scale * b(a(x)), rtol=1e-4, atol=1e-4)
        algorithm.train()
        seen = []
        handle = a.register_forward_hook(lambda module, given, out, seen=seen: seen.append(given[0]))
        layer(x.expand(1000, -1))
        handle.remove()
        assert seen[0].unique().tolist() == [0, 2]
        assert float((seen[0] == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("targets", "towers"), [("vision", {"vision"}), ("language", {"language"})])
def test_adapters_are_where_they_are_asked_for(targets, towers):
    _, algorithm = build("MTCT", lora_targets=targets, lora_projector=True)
    names = list(algorithm.mllm.adapters())
    assert {tower for tower in ("vision", "language") if any(tower in name for name in names)} == towers
    assert any("projector" in name for name in names)


def test_dynamic_tiling_sees_more_of_a_wide_image():
    """Twice as wide as high: two tiles and a thumbnail, where a square grid of the same max_tiles has one tile."""
    wide = Image.effect_noise((192, 96), 90).convert("RGB")
    x, scores = {}, {}
    for tiling in ("square", "dynamic"):
        _, algorithm = build("MLLMZeroShot", tiling=tiling, max_tiles=2)
        x[tiling] = algorithm.mllm.from_picture(wide)[None]
        scores[tiling] = algorithm.mllm.class_scores(x[tiling], algorithm.q_cls, shapes.CLASS_NAMES)
    assert x["square"].shape == (1, 3, 48, 48) and algorithm.mllm.tiles.counts(x["dynamic"]) == [3]
    assert (scores["square"] - scores["dynamic"]).abs().max() > 0.1


@pytest.fixture(scope="module")
def mllm():
    return load_mllm("tiny").eval()


@pytest.mark.parametrize("beginnings", [None, ["<SUMMARY>"] * 8])
def test_a_nucleus_of_nothing_is_the_likeliest_token_at_any_temperature(mllm, beginnings):
    """top_p of 1e-6 leaves one token; without it, at a temperature of 9, hardly a token is the likeliest."""
    pixels = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked = (pixels, q_reason(shapes.CLASS_NAMES, "creature"), 12)
    greedy = mllm.generate(*asked, beginnings=beginnings)
    torch.manual_seed(0)
    assert mllm.generate(*asked, temperature=9.0, top_p=1e-6, beginnings=beginnings) == greedy
    free = mllm.generate(*asked, temperature=9.0, top_p=1.0, beginnings=beginnings)
    assert not set(free) & set(greedy)
    assert mllm.generate(*asked, temperature=1e-4, top_p=1.0, beginnings=beginnings) == greedy


def test_a_falling_loss_weights_the_chains_and_is_restored():
    """0 in the first update, then exp(-L). A restart after two updates takes the third like the uninterrupted job."""
    dataset, algorithm = build("MTCT", chain_weighting="falling_loss")
    batch = [torch.utils.data.default_collate([dataset[env][0]]) for env in range(3)]
    first, second = algorithm.update(batch), algorithm.update(batch)
    assert first["chain_scale"] == 0
    assert second["chain_scale"] == pytest.approx(math.exp(-first["chain_loss"]))
    _, again = build("MTCT", chain_weighting="falling_loss")
    again.session.steps_taken = algorithm.session.steps_taken
    again.restore(copy.deepcopy(algorithm.training_state()))
    assert again.update(batch) == algorithm.update(batch)
