"""Probe a model of any architecture, including those with an entry in `families`."""

from __future__ import annotations

from domainbed_reasoning.mllm.devices import default_device
from domainbed_reasoning.mllm.families import is_general
from domainbed_reasoning.mllm.findings import Findings
from domainbed_reasoning.mllm.interface import require_interface
from domainbed_reasoning.mllm.loading import load_network
from domainbed_reasoning.mllm.model import MLLM
from domainbed_reasoning.mllm.trials import try_out


def inspect_model(model: str) -> tuple[str, Findings]:
    """Return a description of a model's architecture and the findings of probing it.

    Args:
        model: ``tiny``, a folder or a hub id.

    Raises:
        ModelError: if the model cannot be used.
    """
    network, processor, family = load_network(model, "auto", "none", default_device())
    if is_general(family):
        candidates, note = None, f"{family.name}: no settings of its own; tried out below"
    else:
        require_interface(network, family)
        candidates, note = (family.tree,), f"{family.name}: settings of its own, tried out below"
    return note, try_out(lambda settings: MLLM(network, processor, settings), family, candidates)
