"""Assign layers to the vision tower, the projector, or the language model, by the structure of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def layers_named(layers: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return the layers that PEFT's ``target_modules`` would match: by whole parts at the end of their names.

    Args:
        layers: full names.
        modules: ends of names, such as ``q_proj`` or ``3.q_proj``.

    Raises:
        ValueError: for one that matches none, with the layers' names.
    """
    matches = {end: [name for name in layers if f".{name}".endswith(f".{end}")] for end in modules}
    for end, found in matches.items():
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ValueError(
                f"hparam lora_target_modules: no Linear layer that lora_targets chooses is called {end!r:.200}. This "
                f"model has: {known or 'none'}."
            )
    chosen = {name for found in matches.values() for name in found}
    return [name for name in layers if name in chosen]


def is_of_mixture(module: torch.nn.Module) -> bool:
    """Return whether a module holds the experts of a mixture or routes to them, by its class name."""
    return any(word in type(module).__name__ for word in ("Router", "Gate", "Expert", "Moe"))


@dataclass(frozen=True)
class Convolutions:
    """The layers of a vision tower that consists of convolutions, by their names.

    Attributes:
        adapted: convolutions that LoRA trains.
        frozen: those that PEFT cannot adapt or merge: grouped (depthwise among them), dilated, or of a class of their
            own. Empty, as ``adapted``, for a transformer, whose one or two convolutions cut the image into patches.
        linear: number of its Linear layers.
        weights: of the frozen ones.
    """

    adapted: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    linear: int = 0
    weights: int = 0

    def __str__(self) -> str:
        """Return one line about what LoRA trains and what stays frozen; empty for a transformer."""
        if not self.adapted and not self.frozen:
            return ""
        trains = f"LoRA trains {len(self.adapted)} convolutions and {self.linear} Linear layers of the vision tower"
        if not self.frozen:
            return f"{trains}."
        return (
            f"{trains}. Its other {len(self.frozen)} convolutions ({self.weights:,} weights, such as "
            f"{self.frozen[0]}) stay frozen: they are grouped or dilated, and PEFT cannot merge adapters into them."
        )


def convolutions_of(network: torch.nn.Module) -> Convolutions:
    """Return the convolutions of a convolutional vision tower: one with more Conv2d than Linear layers.

    Args:
        network: the bare transformers model.
    """
    part, adapted, linear = parts_of(network), [], 0
    frozen: dict[str, int] = {}
    for name, module in network.named_modules():
        if part(name) != "vision":
            continue
        linear += isinstance(module, torch.nn.Linear)
        if isinstance(module, torch.nn.Conv2d):
            if _is_plain(module):
                adapted.append(name)
            else:
                frozen[name] = sum(weight.numel() for weight in module.parameters())
    if len(adapted) + len(frozen) <= linear:
        return Convolutions()
    return Convolutions(tuple(adapted), tuple(frozen), linear, sum(frozen.values()))


def _is_plain(layer: torch.nn.Conv2d) -> bool:
    """Return whether PEFT's adapter of a convolution computes, and merges into, what the layer computes."""
    kinds = type(layer) is torch.nn.Conv2d or type(layer).__name__ == "Conv2dSame"  # timm's, padded as TensorFlow does
    return kinds and layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
