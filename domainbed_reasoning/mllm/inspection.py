"""Probe a model of any architecture, including those with an entry in `families`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from domainbed_reasoning.mllm.adapters import lora_targets, without_adapters
from domainbed_reasoning.mllm.devices import default_device
from domainbed_reasoning.mllm.families import is_general
from domainbed_reasoning.mllm.family_plugins import entry_of
from domainbed_reasoning.mllm.interface import require_interface
from domainbed_reasoning.mllm.loading import load_network
from domainbed_reasoning.mllm.model import MLLM
from domainbed_reasoning.mllm.towers import convolutions_of, parts_of
from domainbed_reasoning.mllm.trials import try_out

Row = tuple[str, str, str]  # what was tried, what was found, what it costs


def inspect_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, list[Row]]:
    """Return a description of a model's architecture and what probing it finds: rows as of `Findings.table`.

    Args:
        model: ``tiny``, a folder or a hub id.
        revision: see `load_mllm`.
        trust_remote_code: see `load_mllm`.

    Raises:
        ModelError: if the model cannot be used.
    """
    network, processor, family = load_network(model, "auto", "none", default_device(), revision, trust_remote_code)
    adapters = list(_adapters(network))  # before tree attention replaces layers' forward passes
    plugin = entry_of(type(network).__name__)
    if plugin is not None:
        candidates = (family.tree,) if family.tree else ()
        note = f"{family.name}: settings of {plugin.target} of {plugin.source}, tried out below"
    elif is_general(family):
        candidates, note = None, f"{family.name}: no settings of its own; tried out below"
    else:
        require_interface(network, family)
        candidates, note = (family.tree,), f"{family.name}: settings of its own, tried out below"
    found = try_out(lambda settings: MLLM(network, processor, settings), family, candidates)
    return note, [*found.table(), *adapters]


def _adapters(network: torch.nn.Module) -> Iterator[Row]:
    """Yield which layers of each tower get adapters, and which weights cannot have any."""
    part = parts_of(network)
    layers = {name: network.get_submodule(name) for name in lora_targets(network, "both", False)}
    convolutions, fused = convolutions_of(network), without_adapters(network)
    for tower in ("vision", "language"):
        kinds = Counter(
            "Conv2d" if isinstance(layer, torch.nn.Conv2d) else "Linear"
            for name, layer in layers.items()
            if part(name) == tower
        )
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
        yield f"adapters, {tower} tower", found, ""
    if convolutions.frozen:
        said = f"{convolutions.weights:,} weights stay frozen"
        yield "grouped convolutions", str(len(convolutions.frozen)), said
    if fused:
        yield "fused experts and routers", f"{len(fused)} tensors", f"{sum(fused.values()):,} weights stay frozen"
