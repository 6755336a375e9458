"""Load a multimodal LLM, with adapters, and try out what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from domainbed_reasoning.mllm import trials
from domainbed_reasoning.mllm.adapter_files import initial_adapter
from domainbed_reasoning.mllm.adapters import LoraSettings, adapter_shapes, add_lora
from domainbed_reasoning.mllm.attention import avoid_plans, takes_tree_masks
from domainbed_reasoning.mllm.devices import default_device
from domainbed_reasoning.mllm.dynamic_tiles import DynamicTiles
from domainbed_reasoning.mllm.families import is_general, require_dynamic, tile_grid
from domainbed_reasoning.mllm.interface import require_interface, require_sight
from domainbed_reasoning.mllm.loading import load_network, resolve
from domainbed_reasoning.mllm.model import MLLM
from domainbed_reasoning.mllm.opening import small_files_digest


def load_mllm(
    model: str,
    *,
    lora: LoraSettings | None = None,
    adapters: Mapping[str, torch.Tensor] | None = None,
    dtype: str = "auto",
    quantize: str = "none",
    gradient_checkpointing: bool = False,
    max_tiles: int = 1,
    tiling: str = "square",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "auto",
) -> MLLM:
    """Load a multimodal LLM, with fresh adapters if ``lora`` is given.

    Args:
        model: ``tiny``, a folder or a hub id of one of the supported families.
        lora: adapters to add; None loads the base model.
        adapters: trained values by name, which must match; None keeps the fresh initialization, or loads the
            folder that ``lora`` names.
        dtype: ``auto`` (bfloat16 on a GPU, float32 on the CPU), ``float32``, ``bfloat16`` or ``float16``.
        quantize: ``none``, ``nf4`` or ``int8``.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        max_tiles: maximum number of tiles per image, for families that tile images.
        tiling: ``square``, or ``dynamic`` for InternVL's grids by aspect ratio; see `dynamic_tiles`.
        device: None uses PyTorch's current accelerator, the CPU without one.
        revision: a branch, tag or commit of the hub's repository; None is its main branch.
        trust_remote_code: whether the checkpoint's own Python files run, where it has any.
        attn_implementation: ``auto``, ``sdpa``, ``eager``, ``flash_attention_2`` or ``flash_attention_3``; see
            `attention`.

    Raises:
        ModelError: if the model cannot be used.
        ValueError: if ``adapters`` do not match it.
    """
    where = torch.device(device or default_device())
    hub = (revision, trust_remote_code)
    avoid_plans(attn_implementation, where)
    network, processor, family = load_network(model, dtype, quantize, where, *hub, attn_implementation)
    tiles, grid = None, 1
    if tiling == "dynamic":
        require_dynamic(family)
        tiles = DynamicTiles(processor.image_processor, family.tile_edge(processor.image_processor), max_tiles)
    else:
        grid = tile_grid(family, max_tiles)
    shares_prefixes, general_path = takes_tree_masks(attn_implementation), is_general(family)
    if not general_path:
        require_interface(network, family)
    if general_path or not shares_prefixes:
        small_files = small_files_digest(model, resolve(model, revision), revision)
        edge = family.tile_edge(processor.image_processor)
        entry = (family.name, family.tree, edge, grid, family.image_settings(edge, grid)) if family.has_entry else ()
        more = () if attn_implementation == "auto" else (attn_implementation,)
        digest = trials.digest_of(small_files, dtype, quantize, where, *entry, *more)
        candidates = [family.tree] * bool(family.tree) if family.has_entry else None
        if not shares_prefixes:
            candidates = []
        family = trials.known(lambda settings: MLLM(network, processor, settings, grid), family, digest, candidates)
    if lora is not None:
        if adapters is None and lora.start is not None:
            shapes = adapter_shapes(network, lora)
            adapters = initial_adapter(lora.start, lora.rank, lora.alpha, lora.variant, shapes)
        network = add_lora(network, lora, adapters)
    mllm = MLLM(network, processor, family, grid, quantized=quantize != "none")
    if not general_path:  # others have been probed
        trials.image_tokens(mllm)
    if family.tree:
        require_sight(mllm)
    else:
        trials.require_sight(mllm)
    if general_path and lora is not None:
        trials.require_gradients(mllm)
    if tiles is not None:
        mllm = MLLM(network, processor, family, quantized=mllm.quantized, tiles=tiles)
    if adapters:
        mllm.load_adapters(adapters)
    if gradient_checkpointing:
        checkpoint_activations(mllm.base)
    return mllm


def checkpoint_activations(network: Any) -> None:
    """Enable gradient checkpointing, under the name that the installed transformers release uses."""
    named = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"  # from 5.24 on; before
    getattr(network, f"{named}_checkpointing_enable")({"use_reentrant": False})
