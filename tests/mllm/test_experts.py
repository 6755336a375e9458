"""Mixtures of experts: weights without adapters are reported, on tiny models of real mixtures."""

import pytest
import torch
import transformers

from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.loading import empty_network, without_adapters
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
