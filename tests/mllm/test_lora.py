"""Adapters in the model's precision against PEFT's, by layer and for whole models of every family."""

import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks import roofline
from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.adapters import adapted
from domainbed_reasoning.mllm.lora import GatedLowRankUpdate, InComputePrecision, LowRankUpdate, RecomputedGate

IN, OUT, RANK, SCALING = 24, 32, 4, 1.5
LOW = torch.bfloat16


def leaves(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_hand(x, down, up, weight, bias):
    return torch.nn.functional.linear(x, weight, bias) + (x @ down.t() @ up.t()) * SCALING


@pytest.mark.parametrize("frozen_layer", ["plain", "other"])
def test_in_float32_outputs_and_gradients_are_those_of_the_formula(frozen_layer):
    tensors = leaves((2, 5, IN), (RANK, IN), (OUT, RANK))
    weight, bias = (each.detach() for each in leaves((OUT, IN), (OUT,)))
    expected = by_hand(*tensors, weight, bias)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, tensors, gradient)
    given = (weight, bias, None)
    if frozen_layer == "other":
        given = (None, None, torch.nn.functional.linear(tensors[0], weight, bias))
    out = LowRankUpdate.apply(*tensors, SCALING, *given)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)
    for found, exact in zip(torch.autograd.grad(out, tensors, gradient), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-5)


def test_a_gate_that_is_made_again_gives_the_formulas_gradients():
    gate, lift, down, up = leaves((2, 5, IN), (2, 5, IN), (RANK, IN), (OUT, RANK))
    weight = leaves((OUT, IN))[0].detach()
    expected = by_hand(torch.nn.functional.silu(gate) * lift, down, up, weight, None)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (gate, lift, down, up), gradient)
    out = GatedLowRankUpdate.apply(gate, lift, torch.nn.functional.silu, down, up, SCALING, weight, None)
    for found, exact in zip(torch.autograd.grad(out, (gate, lift, down, up), gradient), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


def test_in_bfloat16_gradients_are_float32_and_within_rounding_of_the_exact_ones():
    """Relative to the largest entry; bfloat16 rounds by 2^-9 = 0.002, a few times over."""
    tensors = leaves((2, 5, IN), (RANK, IN), (OUT, RANK))
    weight, bias = (each.detach() for each in leaves((OUT, IN), (OUT,)))
    rounded = [tensors[0].detach().to(LOW).requires_grad_(), *tensors[1:]]
    exact = by_hand(*(each.double() for each in tensors), weight.double(), bias.double())
    wanted = torch.autograd.grad(exact.sum(), tensors)
    out = LowRankUpdate.apply(*rounded, SCALING, weight.to(LOW), bias.to(LOW), None)
    found = torch.autograd.grad(out.sum(), rounded)
    assert out.dtype == found[0].dtype == LOW and found[1].dtype == found[2].dtype == torch.float32
    for low, high in zip((out, *found), (exact, *wanted), strict=True):
        assert (low.double() - high).abs().max() < 0.02 * high.abs().max()


class Naive(torch.nn.Module):
    """Three projections of one input, as attention has them."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(IN, IN, bias=False) for _ in range(3))

    def forward(self, x):
        return self.query(x) + self.key(x) + self.value(x)


def test_layers_that_share_an_input_keep_it_once():
    """Of 50 rows: the input, 24 numbers of 2 bytes; a rank-4 product and its two matrices for each of three layers."""
    network = adapted(Naive().to(LOW), r=RANK, lora_alpha=8, target_modules=["query", "key", "value"])
    weights = {weight.data_ptr() for weight in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(50, IN, dtype=LOW, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x)
    assert sum(kept.values()) == 2 * (50 * IN + 3 * (50 * RANK + RANK * IN + IN * RANK))


def losses_and_gradients(mllm, images):
    mllm.train()
    (values, mask), _ = mllm.two_path_log_likelihoods(images[:2], ("What is it?", "Why?"), (["a dog"] * 2, ["b"] * 2))
    loss = -(values * mask).sum()
    loss.backward()
    return float(loss.detach()), {
        name: weight.grad for name, weight in mllm.adapters().items() if weight.grad is not None
    }


def with_random_adapters(folder, dtype, **given):
    mllm = load_mllm(folder, lora=LoraSettings(4, 8), dtype=dtype, **given)
    generator = torch.Generator().manual_seed(0)
    values = {name: 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in mllm.adapters().items()}
    mllm.load_adapters(values)
    return mllm


@pytest.fixture
def pefts_own(monkeypatch):
    """``pefts_own()``: from then on PEFT's layers run."""
    from domainbed_reasoning.mllm import lora

    return lambda: monkeypatch.setattr(lora, "mixed_adapter", lambda layer, x: None)


def test_in_float32_nothing_changes_to_the_bit(family_folder, images, pefts_own):
    mllm = with_random_adapters(family_folder, "float32")
    assert any(isinstance(module, InComputePrecision) for module in mllm.modules())
    loss, gradients = losses_and_gradients(mllm, images)
    pefts_own()
    expected, exact = losses_and_gradients(with_random_adapters(family_folder, "float32"), images)
    assert loss == expected and all(torch.equal(gradients[name], exact[name]) for name in exact)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_gradients_point_where_pefts_do(family_folder, images, pefts_own, checkpointing):
    """All adapters together: cosine above 0.99 against PEFT's, which are float32 in between."""
    mllm = with_random_adapters(family_folder, "bfloat16", gradient_checkpointing=checkpointing)
    loss, gradients = losses_and_gradients(mllm, images)
    pefts_own()
    expected, exact = losses_and_gradients(with_random_adapters(family_folder, "bfloat16"), images)
    assert loss == pytest.approx(expected, rel=0.02)
    assert gradients.keys() == exact.keys() and all(each.dtype == torch.float32 for each in gradients.values())
    ours, theirs = (torch.cat([values[name].flatten() for name in exact]) for values in (gradients, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantized_layers_adapt_in_the_models_precision(folder_of, images, pefts_own, quantize):
    mllm = with_random_adapters(folder_of("InternVL"), "bfloat16", quantize=quantize)
    loss, gradients = losses_and_gradients(mllm, images)
    pefts_own()
    expected, exact = losses_and_gradients(
        with_random_adapters(folder_of("InternVL"), "bfloat16", quantize=quantize), images
    )
    assert loss == pytest.approx(expected, rel=0.02)
    ours, theirs = (torch.cat([values[name].flatten() for name in exact]) for values in (gradients, exact))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.98


def test_dropout_drops_in_the_models_precision(folder_of, images, pefts_own):
    mllm = load_mllm(folder_of("InternVL"), lora=LoraSettings(4, 8, dropout=0.5), dtype="bfloat16")
    layer = next(module for module in mllm.modules() if isinstance(module, InComputePrecision))
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.ones(3, layer.in_features, dtype=LOW)
    torch.manual_seed(1)
    dropped = layer.train()(x)
    assert dropped.dtype == LOW and not torch.equal(dropped, layer.eval()(x))
    torch.testing.assert_close(layer(x), layer.train(False)(x), rtol=0, atol=0)
    torch.manual_seed(1)
    pefts_own()
    torch.testing.assert_close(layer.train()(x), dropped, rtol=0.02, atol=0.02)


def test_copies_merge_and_plain_peft_loads_what_is_saved(folder_of, images, tmp_path, pefts_own):
    """The copy's merged layers are plain; the folder names none of our classes and gives PEFT's own logits."""
    mllm = with_random_adapters(folder_of("InternVL"), "bfloat16").eval()
    scores = mllm.class_scores(images, "What is it?", ["a dog", "cat"])
    merged = mllm.copy_for_inference()
    assert not any(isinstance(module, InComputePrecision) for module in merged.modules())
    torch.testing.assert_close(
        merged.class_scores(images, "What is it?", ["a dog", "cat"]), scores, rtol=0.05, atol=0.5
    )
    mllm.network.save_pretrained(tmp_path)
    assert "InComputePrecision" not in (tmp_path / "adapter_config.json").read_text()
    base = AutoModelForImageTextToText.from_pretrained(folder_of("InternVL"), dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(8, 16)[None]
    exact = with_random_adapters(folder_of("InternVL"), "float32").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, exact.network(input_ids=ids).logits, rtol=0, atol=0)


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(IN, OUT) for _ in range(2))
        self.down_proj, self.act_fn = torch.nn.Linear(OUT, IN), torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clipped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))


@pytest.mark.parametrize(("kind", "recomputed"), [(Gated, True), (Clipped, False)])
def test_only_mlps_whose_forward_is_the_gated_product_are_recomputed(kind, recomputed):
    targets = ["gate_proj", "up_proj", "down_proj"]
    network = adapted(torch.nn.ModuleDict({"mlp": kind().to(LOW)}), r=RANK, target_modules=targets)
    assert isinstance(network.base_model.model["mlp"], RecomputedGate) == recomputed


def test_training_step_at_8b_stays_below_its_limits():
    """Counted on the meta device; two images count as four do, an image each."""
    settings = (2, 0.0, 7, 250, 3)
    counting, kept = roofline.count("float32", *settings)
    bare, _ = roofline.count("none", *settings)
    assert roofline.float32_share(counting, bare) <= roofline.FLOAT32_BAR
    assert kept / 2 / 2**30 <= roofline.KEPT_BAR
    assert sum(counting.kernels.values()) <= 8_400  # PEFT's own layers: 9,965


def test_bitsandbytes_is_imported_for_quantized_models_alone():
    """It imports PyTorch's compiler, which takes seconds of every job's start."""
    script = """
import sys
from domainbed_reasoning.mllm import LoraSettings, load_mllm
load_mllm("tiny", lora=LoraSettings(2, 4)).copy_for_inference()
print("bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
layer = type(load_mllm("tiny", lora=LoraSettings(2, 4), quantize="nf4").network.get_submodule(sys.argv[1]))
print("bitsandbytes" in sys.modules, layer.__name__)
"""
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "Linear4bit"]
