"""Mixtures of experts: weights without adapters are reported, on tiny models of real mixtures."""

import peft
import pytest
import torch
import transformers

from builders import architectures
from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.adapters import adapter_shapes, add_lora, without_adapters
from domainbed_reasoning.mllm.families import FAMILIES
from domainbed_reasoning.mllm.loading import empty_network
from domainbed_reasoning.mllm.towers import is_linear, parts_of
from domainbed_reasoning.sweeps.costs import shape_of

WIDE, NARROW, EXPERTS, LAYERS = 64, 32, 4, 2


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def mixture(request, folder_of, tmp_path_factory):
    """An InternVL whose decoder is a mixture: of InternVL3.5's 30B-A3B, or Mixtral's."""
    folder = folder_of("InternVL")
    text = {
        "model_type": request.param,
        "moe_intermediate_size": NARROW,
        "intermediate_size": NARROW,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "head_dim": 16,
    }
    old = transformers.AutoConfig.from_pretrained(folder)
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    config = transformers.InternVLConfig(
        vision_config=old.vision_config.to_dict(),
        text_config=text | {name: getattr(old.text_config, name) for name in kept},
        image_token_id=old.image_token_id,
        image_seq_length=old.image_seq_length,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    network = transformers.InternVLForConditionalGeneration(config)
    target = tmp_path_factory.mktemp(request.param)
    network.to(torch.float32).save_pretrained(target)
    transformers.AutoProcessor.from_pretrained(folder).save_pretrained(target)
    return str(target)


def test_fused_experts_are_named_with_their_share_at_loading(mixture, capsys):
    """2 layers of 4 experts: gate and up, 2 x 32 x 64, and down, 64 x 32; and a router, 4 x 64."""
    expected = LAYERS * (EXPERTS * (2 * NARROW * WIDE + WIDE * NARROW) + EXPERTS * WIDE)
    mllm = load_mllm(mixture, lora=LoraSettings(rank=2, alpha=4))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    total = sum(weight.numel() for name, weight in mllm.base.named_parameters() if "lora_" not in name)
    assert len(printed) == 1
    assert f"{expected:,} of {total:,} weights ({expected / total:.0%}) get no adapters" in printed[0]
    assert "experts" in printed[0] and not any("experts" in name for name in mllm.adapters())


def test_the_cost_model_knows_them_too(mixture):
    shape = shape_of(mixture)
    assert sum(shape.fused.values()) == LAYERS * (EXPERTS * 3 * NARROW * WIDE + EXPERTS * WIDE)
    assert shape.language.weights < shape.weights - sum(shape.fused.values())


def test_towers_without_experts_and_bare_models_report_nothing(mixture, capsys):
    load_mllm(mixture)
    load_mllm(mixture, lora=LoraSettings(rank=2, alpha=4, towers="vision"))
    assert "get no adapters" not in capsys.readouterr().out


def test_a_dense_model_has_none(family_folder, capsys):
    assert without_adapters(empty_network(family_folder)[0]) == {}
    load_mllm(family_folder, lora=LoraSettings(rank=2, alpha=4))
    assert "get no adapters" not in capsys.readouterr().out


def test_internvls_mixture_has_internvls_entry_and_shared_rows_equal_separate_ones(mixture, images, class_names):
    """InternVL3.5-30B-A3B's class is InternVL's: rows with a shared prefix, as measured for the dense model."""
    mllm = load_mllm(mixture, lora=LoraSettings(rank=2, alpha=4)).train()
    assert mllm.family is FAMILIES["InternVLForConditionalGeneration"] and mllm.family.tree == "plain"
    names, chains = list(class_names[:2]), ["a look, four legs", "an axe"]
    found = [
        mllm.two_path_log_likelihoods(images[:2], (q_cls(class_names), q_reason(class_names)), (names, chains), rows)
        for rows in ("tree", "naive")
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    sum((values * mask).sum() for values, mask in found[0]).backward()
    towers = {parts_of(mllm.base)(name.removeprefix("base_model.model.")) for name in mllm.adapters()}
    assert towers == {"vision", "language"}
    assert all(weight.grad is not None for name, weight in mllm.adapters().items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["Qwen3-VL-MoE", "Qwen3.5-MoE", "GLM-4.5V", "Aria", "Kimi-K2.5"])
def test_peft_adapts_the_layers_that_are_named_and_no_fused_expert(name, capsys):
    """Shared experts are Linear layers and get adapters, save GLM-4.5V's: PEFT would adapt the fused ones instead."""
    settings = LoraSettings(rank=2, alpha=4)
    network = architectures.BUILDERS[name]()[0].requires_grad_(False)
    shapes = adapter_shapes(network, settings)
    linear = {key for key, module in network.named_modules() if is_linear(module)}
    assert without_adapters(network) and all(key.partition(".lora")[0].split(".", 2)[2] in linear for key in shapes)
    capsys.readouterr()
    made = add_lora(network, settings)
    assert {key: tuple(value.shape) for key, value in made.named_parameters() if value.requires_grad} == shapes
    said = "PEFT would adapt the experts in their place" in capsys.readouterr().out
    assert said == (name == "GLM-4.5V")


@pytest.mark.filterwarnings("ignore")
def test_what_peft_would_do_with_all_of_glms_layers():
    """The reason: named by their full names, they stand for the fused experts."""
    network = architectures.BUILDERS["GLM-4.5V"]()[0].requires_grad_(False)
    names = [key for key, module in network.named_modules() if is_linear(module) and "language" in key]
    made = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=names))
    trained = [key for key, value in made.named_parameters() if value.requires_grad]
    assert any(".experts." in key for key in trained) and not any("shared_experts" in key for key in trained)
