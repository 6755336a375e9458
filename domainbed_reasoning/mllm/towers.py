"""Assign layers to the vision tower, the projector, or the language model, by the structure of the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Linear layers outside of transformer blocks: the output head and what connects vision to language.
_NOT_ADAPTED = ("lm_head", ".head")
PROJECTOR = ("merger", "projector", "connector", "resampler")
_VISION = ("vision", "visual")
_OTHER = ("audio", "speech", "video_tower")  # towers that images do not pass


def part_of(name: str) -> str:
    """Return the part that a layer belongs to by its name: ``vision``, ``projector``, ``language`` or ``head``."""
    if any(part in name for part in _NOT_ADAPTED):
        return "head"
    if any(part in name for part in PROJECTOR):
        return "projector"
    return "vision" if any(part in name for part in _VISION) else "language"


def parts_of(network: torch.nn.Module) -> Callable[[str], str]:
    """Return the function from a layer's name to its part of this model.

    The language tower is what holds the input embeddings, beside the output head; the vision towers are the models
    inside of it that have the config's ``vision_config``, or are named so. What remains joins them. A model that keeps
    its embeddings at the top has no such structure, and its layers are told apart by their names.

    Args:
        network: the bare transformers model.

    Returns:
        A function whose values are ``vision``, ``projector``, ``language``, ``head`` or ``other``.
    """
    model: Any = network
    names = {id(module): name for name, module in model.named_modules()}
    language = names.get(id(model.get_input_embeddings()), "").rpartition(".")[0]
    if language.count(".") < 1 and language in ("", "model"):
        return part_of
    head = names.get(id(model.get_output_embeddings()), "lm_head")
    wanted = getattr(model.config, "vision_config", None)
    vision = [name for name, module in model.named_modules() if wanted and getattr(module, "config", None) is wanted]

    def part(name: str) -> str:
        if name == head or part_of(name) == "head":
            return "head"
        if name.startswith(f"{language}."):
            return "language"
        if any(word in name for word in _OTHER):
            return "other"
        if any(word in name for word in PROJECTOR):
            return "projector"
        seen = any(name.startswith(f"{root}.") for root in vision) or any(word in name for word in _VISION)
        return "vision" if seen else "projector"

    return part


def is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module computes what a Linear layer does, quantized or not.

    Subclasses with another forward pass, such as the routers of a mixture of experts, do not count.
    """
    if not isinstance(module, torch.nn.Linear):
        return False
    return type(module).forward is torch.nn.Linear.forward or type(module).__module__.startswith("bitsandbytes")


def is_of_mixture(module: torch.nn.Module) -> bool:
    """Return whether a module holds the experts of a mixture or routes to them, by its class name."""
    return any(word in type(module).__name__ for word in ("Router", "Gate", "Expert", "Moe"))


def convolutions_note(network: torch.nn.Module) -> str:
    """Return a note on a convolutional vision tower, which gets few adapters; empty for a transformer.

    A transformer begins with one or two convolutions that cut the image into patches; a convolutional tower consists
    of them.
    """
    part = parts_of(network)
    kinds: dict[type[torch.nn.Module], list[int]] = {torch.nn.Conv2d: [], torch.nn.Linear: []}
    for name, module in network.named_modules():
        for kind, counts in kinds.items():
            if isinstance(module, kind) and part(name) == "vision":
                counts.append(sum(weight.numel() for weight in module.parameters()))
    frozen, adapted = kinds.values()
    if len(frozen) <= len(adapted):
        return ""
    return (
        f"the vision tower has {len(frozen)} convolutions ({sum(frozen):,} weights), which stay frozen: LoRA trains "
        f"its {len(adapted)} Linear layers only."
    )
