"""Low-rank adapters of a multimodal LLM: which layers get them, adding them by PEFT, and checking saved ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.mllm import lora
from domainbed_reasoning.mllm.adapter_files import check_adapters
from domainbed_reasoning.mllm.families import ModelError
from domainbed_reasoning.mllm.mixtures import kept_by_peft
from domainbed_reasoning.mllm.sealed import import_peft, peft_without_bitsandbytes
from domainbed_reasoning.mllm.towers import convolutions_of, is_linear, is_of_mixture, layers_named, parts_of
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_NO_EXPERTS = ("Linear", "Embedding", "Conv", "Norm")  # modules whose weights are not experts


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters.

    Attributes:
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: of the adapter's input, in [0, 1).
        towers: ``both`` (the paper's), ``vision`` or ``language``.
        projector: whether the layers between the towers get adapters too.
        variant: ``lora``, ``rslora`` (scaled by alpha / √r, arXiv 2312.03732) or ``dora`` (arXiv 2402.09353). All leave
            the base weights as they are.
        modules: names of layers, matched as PEFT's ``target_modules`` at the end of a layer's full name, to which the
            choice of towers is restricted; None takes all.
        start: adapter folder that training starts from; None starts anew.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    towers: str = "both"
    projector: bool = False
    variant: str = "lora"
    modules: Sequence[str] | None = None
    start: str | None = None

    @classmethod
    def of(cls, hparams: Mapping[str, Any]) -> LoraSettings:
        """Return the adapters that these hyper-parameters describe."""
        return cls(
            rank=hparams["lora_rank"],
            alpha=hparams["lora_alpha"],
            dropout=hparams["lora_dropout"],
            towers=hparams["lora_targets"],
            projector=hparams["lora_projector"],
            variant=hparams.get("lora_variant", "lora"),  # older jobs have none of these
            modules=hparams.get("lora_target_modules"),
            start=hparams.get("init_adapter"),
        )


def lora_targets(
    network: torch.nn.Module, towers: str, projector: bool, modules: Sequence[str] | None = None
) -> list[str]:
    """Return the full names of the layers that get adapters.

    Every Linear of the chosen towers, quantized or not, except the output head; layers between the towers only with
    ``projector``. Of a convolutional vision tower, the convolutions that PEFT can merge too. With ``modules`` those
    among them of these names.

    Raises:
        ModelError: for an unknown choice of towers.
        ValueError: for a name that no such layer has.
    """
    if towers not in ("both", "vision", "language"):
        raise ModelError(f"lora_targets must be 'both', 'vision' or 'language'; got {towers!r}.")
    wanted = ("vision", "language") if towers == "both" else (towers,)
    names, parts = [], parts_of(network)
    convolutions = set(convolutions_of(network).adapted) if "vision" in wanted else set()
    for name, module in network.named_modules():
        part = parts(name)
        if name in convolutions or is_linear(module) and (part == "projector" and projector or part in wanted):
            names.append(name)
    names = kept_by_peft(network, names) if without_adapters(network, towers) else names
    return names if modules is None else layers_named(names, modules)


def without_adapters(network: torch.nn.Module, towers: str = "both") -> dict[str, int]:
    """Return the matrices of the chosen towers that are not part of a Linear layer, with their sizes.

    These are the fused expert weights of a mixture, ``(experts, out, in)``, and its routers. Embeddings, convolutions,
    and norms are not counted: they never get adapters.

    Args:
        network: the model, before adapters are added.
        towers: ``both``, ``vision`` or ``language``.
    """
    wanted = ("vision", "language") if towers == "both" else (towers,)
    parts = parts_of(network)
    return {
        f"{name}.{key}": weight.numel()
        for name, module in network.named_modules()
        if parts(name) in wanted and not any(kind in type(module).__name__ for kind in _NO_EXPERTS)
        for key, weight in module.named_parameters(recurse=False)
        if is_of_mixture(module) and weight.dim() > 1 and min(weight.shape) > 1
    }


def experts_note(fused: Mapping[str, int], total: int) -> str:
    """Return a note on weights without adapters; empty if every layer gets one.

    Args:
        fused: as `without_adapters` returns them.
        total: number of weights of the model.
    """
    if not fused:
        return ""
    count, largest = sum(fused.values()), max(fused, key=lambda name: fused[name])
    return (
        f"{count:,} of {total:,} weights ({count / total:.0%}) get no adapters: they are fused experts and routers, "
        f"not Linear layers ({len(fused)} tensors, such as {largest}). LoRA trains the other layers only."
    )


def add_lora(
    network: torch.nn.Module, settings: LoraSettings, values: Mapping[str, torch.Tensor] | None = None
) -> torch.nn.Module:
    """Return ``network`` as a PEFT model in which only the adapters are trainable; logs which layers get none.

    Args:
        network: the bare model.
        settings: of the adapters.
        values: initial values, whose names and shapes are checked first; None for a fresh initialization.

    Raises:
        ModelError: the chosen tower has no layers to adapt.
        ValueError: as `check_adapters`.
    """
    if values:
        check_adapters(adapter_shapes(network, settings), values)
    total = sum(weight.numel() for weight in network.parameters())
    if note := experts_note(without_adapters(network, settings.towers), total):
        _log.warning("WARNING: %s", note)
    convolutions = convolutions_of(network)
    if convolutions.frozen and settings.towers != "language":
        _log.warning("WARNING: %s", convolutions)
    targets = lora_targets(network, settings.towers, settings.projector, settings.modules)
    if not targets:
        raise ModelError(
            f"{type(network).__name__} has no layers that LoRA can adapt in its {settings.towers} tower. Set "
            "lora_targets to 'both' or 'language'."
        )
    if settings.projector and settings.modules is None:
        part_of = parts_of(network)
        if not any(part_of(name) == "projector" for name in targets):
            raise ModelError(
                f"lora_projector: the projector of {type(network).__name__} has no Linear layers. Set it to false."
            )
    if settings.variant == "dora":
        _log.info("lora_variant 'dora' trains PEFT's own layers, which compute in the adapters' float32: more memory.")
    return adapted(
        network,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.variant == "dora",
        use_rslora=settings.variant == "rslora",
    )


def adapter_shapes(network: torch.nn.Module, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Return the shapes that `add_lora` would give the adapters, by their names in the PEFT model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in lora_targets(network, settings.towers, settings.projector, settings.modules):
        layer: Any = network.get_submodule(name)
        down, up = _shapes_of(layer, settings.rank)
        shapes[f"base_model.model.{name}.lora_A.default.weight"] = down
        shapes[f"base_model.model.{name}.lora_B.default.weight"] = up
        if settings.variant == "dora":
            norms = (1, up[0], 1, 1) if isinstance(layer, torch.nn.Conv2d) else (up[0],)
            shapes[f"base_model.model.{name}.lora_magnitude_vector.default.weight"] = norms
    return shapes


def _shapes_of(layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B; of a convolution ``(rank, in, k, k)`` and ``(out, rank, 1, 1)``."""
    if isinstance(layer, torch.nn.Conv2d):
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    return (rank, layer.in_features), (layer.out_features, rank)


def adapted(network: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    """Return ``network`` as a PEFT model with adapters of these settings of its `LoraConfig`, see `lora`."""
    quantized = any(type(layer).__module__.startswith("bitsandbytes") for layer in network.modules())
    peft = import_peft(quantized)
    config = peft.LoraConfig(bias="none", **settings)
    config._register_custom_module(lora.layers(quantized))
    alone = contextlib.nullcontext() if quantized else peft_without_bitsandbytes()
    with alone, warnings.catch_warnings():  # peft uses an attribute that transformers deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model: torch.nn.Module = peft.get_peft_model(network, config)
    lora.recompute_gates(model)
    return model
