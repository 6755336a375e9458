"""Trying out a model of any architecture, those with a row in the table of families included."""

from __future__ import annotations

import torch

from domainbed_reasoning.mllm.families import is_general
from domainbed_reasoning.mllm.findings import Findings
from domainbed_reasoning.mllm.interface import require_interface
from domainbed_reasoning.mllm.loading import load_network
from domainbed_reasoning.mllm.model import MLLM
from domainbed_reasoning.mllm.trials import try_out


def inspect_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, Findings]:
    """Return a model's architecture in words and what trying it out finds.

    Args:
        model: ``tiny``, a folder or a hub id.
        revision: see `load_mllm`.
        trust_remote_code: see `load_mllm`.

    Raises:
        ModelError: for a model that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, processor, family = load_network(model, "auto", "none", device, revision, trust_remote_code)
    if is_general(family):
        candidates, said = None, f"{family.name}: no settings of its own; tried out below"
    else:
        require_interface(network, family)
        candidates, said = (family.tree,), f"{family.name}: settings of its own, tried out below"
    return said, try_out(lambda settings: MLLM(network, processor, settings), family, candidates)
