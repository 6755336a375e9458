"""Releases of transformers, and models, that would ignore arguments."""

import pytest
import torch
import transformers

from domainbed_reasoning.mllm import LoraSettings, load_mllm
from domainbed_reasoning.mllm.families import ModelError
from domainbed_reasoning.mllm.interface import LEAST_TRANSFORMERS


def core_class(folder):
    """Return the class whose forward is called: the whole model without its head."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        return type(transformers.AutoModelForImageTextToText.from_config(config).model)


def test_every_family_has_the_required_interface_and_sees_images(family_folder):
    load_mllm(family_folder)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, alpha=4)], ids=["bare", "adapted"])
def test_a_forward_that_swallows_the_encoded_images_is_refused(family_folder, lora, monkeypatch):
    """As transformers below 5.18 does: everything that its forward does not name ends in **kwargs."""
    cls = core_class(family_folder)
    forward = cls.forward

    def swallowing(self, **kwargs):
        kwargs.pop("mm_encoder_outputs", None)
        return forward(self, **kwargs)

    monkeypatch.setattr(cls, "forward", swallowing)
    with pytest.raises(ModelError, match="mm_encoder_outputs") as raised:
        load_mllm(family_folder, lora=lora)
    message = str(raised.value)
    assert (
        transformers.__version__ in message
        and f"transformers>={LEAST_TRANSFORMERS}" in message
        and cls.__name__ in message
    )


@pytest.mark.parametrize("name", ["position_ids", "attention_mask", "mm_encoder_outputs"])
def test_any_argument_that_is_not_named_is_refused(folder_of, name, monkeypatch):
    import inspect

    cls = core_class(folder_of("InternVL"))
    forward = cls.forward

    def other(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    other.__signature__ = signature.replace(parameters=[p for p in signature.parameters.values() if p.name != name])
    monkeypatch.setattr(cls, "forward", other)
    with pytest.raises(ModelError, match=f"forward takes no {name}"):
        load_mllm(folder_of("InternVL"))


def test_qwens_positions_and_gemmas_types_are_needed_too(folder_of, monkeypatch):
    cls = core_class(folder_of("Qwen3-VL"))
    monkeypatch.setattr(cls, "get_rope_index", lambda self, input_ids, image_grid_thw, **kwargs: None)
    with pytest.raises(ModelError, match="get_rope_index takes no mm_token_type_ids"):
        load_mllm(folder_of("Qwen3-VL"))


def test_a_forward_that_names_the_images_and_ignores_them_is_refused(folder_of, monkeypatch):
    """A signature is a promise; two pictures that give the same hidden states break it."""
    import functools

    cls = core_class(folder_of("InternVL"))
    forward = cls.forward

    @functools.wraps(forward)
    def blind(self, *args, **kwargs):
        kwargs["inputs_embeds"] = torch.zeros_like(kwargs["inputs_embeds"])  # where images have their places
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", blind)
    with pytest.raises(ModelError, match="ignores its images"):
        load_mllm(folder_of("InternVL"))


def test_looking_changes_neither_random_state_nor_modes(folder_of):
    """DomainBed's samplers draw from the same random state: a job's batches must not depend on the check."""
    import domainbed_reasoning.mllm.load as module

    def load(check):
        with pytest.MonkeyPatch.context() as patched:
            if not check:
                patched.setattr(module, "require_sight", lambda mllm: None)
            torch.manual_seed(0)
            mllm = load_mllm(folder_of("InternVL"), lora=LoraSettings(rank=2, alpha=4, dropout=0.5))
        return torch.get_rng_state(), [part.training for part in mllm.modules()], mllm

    (before, modes, _), (after, checked, _) = load(False), load(True)
    assert torch.equal(before, after) and modes == checked


def test_batch_normalization_of_a_frozen_tower_neither_learns_nor_mixes_images(folder_of, images):
    """FastVLM's tower normalizes by running statistics: in training too, an image's features are its own."""
    mllm = load_mllm(folder_of("FastVLM"), lora=LoraSettings(4, 8)).train()
    buffers = {name: value.clone() for name, value in mllm.base.named_buffers() if "running" in name}
    assert buffers and mllm.base.model.language_model.training
    together = mllm.encode(images)["mm_encoder_outputs"]["image"].pooler_output
    alone = mllm.encode(images[:1])["mm_encoder_outputs"]["image"].pooler_output
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
    for name, value in mllm.base.named_buffers():
        if name in buffers:
            assert torch.equal(value, buffers[name])
