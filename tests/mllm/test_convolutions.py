"""Vision towers of convolutions: PEFT's adapters where it can merge them, the rest frozen and named."""

import peft
import pytest
import torch
from torch import nn

from builders import architectures
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.mllm import LoraSettings, ModelError, findings, load_mllm, trials
from domainbed_reasoning.mllm.adapters import adapter_shapes, add_lora, lora_targets
from domainbed_reasoning.mllm.loading import empty_network
from domainbed_reasoning.mllm.towers import convolutions_of
from domainbed_reasoning.sweeps.costs import shape_of

FROZEN = "2 convolutions (2,880 weights, such as model.vision_tower.timm_model.blocks.3.0.conv_dw) stay frozen"


@pytest.fixture(scope="module", params=["FastVLM", "Gemma3n"])
def folder(request, folder_of, tmp_path_factory):
    """timm's tiny EfficientNet below a Qwen 2 and below a Gemma 3n."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "cache_folder", lambda: cache)
        if request.param == "FastVLM":
            yield folder_of("FastVLM")
        else:
            yield str(architectures.build("Gemma3n", tmp_path_factory.mktemp("models") / "gemma3n"))


def test_convolutions_get_pefts_own_adapters_and_grouped_ones_are_named(folder, capsys):
    """15 convolutions; two of 192 and 128 channels are depthwise, of 9 weights each: 2,880."""
    mllm = load_mllm(folder, lora=LoraSettings(4, 8))
    said = [line for line in capsys.readouterr().out.splitlines() if "convolutions" in line]
    assert len(said) == 1 and "LoRA trains 15 convolutions" in said[0] and FROZEN in said[0]
    tower = [module for name, module in mllm.network.named_modules() if "vision_tower" in name]
    layers = [module for module in tower if isinstance(module, peft.tuners.lora.layer.LoraLayer)]
    assert {type(layer) for layer in layers} == {peft.tuners.lora.Conv2d} and len(layers) == 15
    depthwise = [module for module in tower if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert [layer.weight.requires_grad for layer in depthwise] == [False, False]


def test_gradient_reaches_every_adapter_of_both_towers(folder, caplog):
    mllm = load_mllm(folder, lora=LoraSettings(4, 8)).train()
    caplog.clear()
    trials.require_gradients(mllm)
    assert not caplog.records


def test_the_shapes_of_adapters_are_known_before_they_are_made(folder):
    """A: (rank, in, k, k); B: (out, rank, 1, 1)."""
    settings, network = LoraSettings(4, 8), empty_network(folder)[0]
    shapes = adapter_shapes(network, settings)
    made = add_lora(network, settings)
    trained = {name: tuple(weight.shape) for name, weight in made.named_parameters() if weight.requires_grad}
    assert trained == shapes and {len(shape) for shape in shapes.values()} == {2, 4}


def test_merged_convolutions_answer_as_their_adapters_do(folder, images):
    mllm = load_mllm(folder, lora=LoraSettings(4, 8)).eval()
    before = mllm.class_scores(images, "What is it?", ["dog", "an axe"])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in mllm.adapters().items():
            if "vision" in name:
                weight.normal_(std=0.05)
    trained = mllm.class_scores(images, "What is it?", ["dog", "an axe"])
    assert (trained - before).abs().max() > 1e-2
    merged = mllm.copy_for_inference()
    scores = merged.class_scores(images, "What is it?", ["dog", "an axe"])
    torch.testing.assert_close(scores, trained, rtol=1e-4, atol=1e-3)


def test_in_bfloat16_adapters_stay_float32_and_get_gradients(folder, images):
    mllm = load_mllm(folder, lora=LoraSettings(4, 8), dtype="bfloat16").train()
    values, mask = mllm.log_likelihoods(mllm.encode(images[:2]), "What is it?", ["dog", "an axe"])
    (values * mask).sum().backward()
    reached = {name: weight for name, weight in mllm.adapters().items() if "vision" in name and "lora_B" in name}
    assert all(weight.dtype == torch.float32 for weight in reached.values())
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in reached.values())


def test_the_language_tower_alone_leaves_convolutions_frozen_without_a_line(folder, capsys):
    mllm = load_mllm(folder, lora=LoraSettings(4, 8, towers="language"))
    assert not any("vision" in name for name in mllm.adapters())
    assert "convolutions" not in capsys.readouterr().out


def test_doctor_shows_what_gets_adapters(folder, capsys):
    assert cli.main(["doctor", "--model", folder]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "adapters, vision tower 15 Conv2d" in said
    assert "grouped convolutions 2 2,880 weights stay frozen" in said


def test_the_cost_model_knows_what_convolutions_keep_and_how_many_adapters_they_have(folder_of):
    """Bytes that the tower saves for the backward pass, in bfloat16, of an image of 64 x 64: within 30%."""
    folder = folder_of("FastVLM")
    tower, mllm = shape_of(folder).vision, load_mllm(folder, lora=LoraSettings(4, 8), dtype="bfloat16").train()
    trained = sum(weight.numel() for name, weight in mllm.adapters().items() if "vision" in name)
    assert tower.lora_weights(4) == trained
    own = {value.data_ptr() for value in [*mllm.base.parameters(), *mllm.base.buffers()]}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        mllm.base.model.vision_tower(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
    kept = {value.data_ptr(): value.untyped_storage().nbytes() for value in saved if value.data_ptr() not in own}
    assert tower.saved_bytes(4, itemsize=2) == pytest.approx(sum(kept.values()), rel=0.3)


class Standardized(nn.Conv2d):
    """As timm's StdConv2d: what it computes is not its weight's convolution."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean())


class Tower(nn.Module):
    """A tower of these layers, found by its name."""

    def __init__(self, *layers):
        super().__init__()
        self.vision_tower = nn.Sequential(*layers)
        self.lm_head = nn.Linear(2, 2)
        self.config = type("Config", (), {})()

    def get_input_embeddings(self):
        return nn.Embedding(2, 2)


def test_only_what_peft_can_merge_is_adapted():
    plain = nn.Conv2d(4, 4, 3)
    others = (
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        Standardized(4, 4, 3),
    )
    found = convolutions_of(Tower(plain, *others))
    assert found.adapted == ("vision_tower.0",) and len(found.frozen) == len(others)
    assert found.weights == sum(weight.numel() for layer in others for weight in layer.parameters())
    assert lora_targets(Tower(plain, *others), "vision", False) == ["vision_tower.0"]
    assert str(convolutions_of(Tower(plain))).endswith("1 convolutions and 0 Linear layers of the vision tower.")


def test_a_tower_of_grouped_convolutions_alone_has_nothing_to_adapt():
    with pytest.raises(ModelError, match="no layers that LoRA can adapt in its vision tower.*lora_targets"):
        add_lora(Tower(nn.Conv2d(4, 4, 3, groups=4)), LoraSettings(4, 8, towers="vision"))


def test_a_transformer_keeps_its_patch_convolution_frozen():
    network = empty_network("tiny")[0]
    assert str(convolutions_of(network)) == ""
    assert not any(isinstance(network.get_submodule(name), nn.Conv2d) for name in lora_targets(network, "both", False))
