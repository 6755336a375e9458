"""Select the layers of a mixture of experts that PEFT adapts under their own names."""

from __future__ import annotations

from typing import Any

import torch

from domainbed_reasoning.mllm.sealed import import_peft
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)


def kept_by_peft(network: torch.nn.Module, names: list[str]) -> list[str]:
    """Return the names that PEFT adapts as requested.

    In some mixtures PEFT maps ``gate_proj``, ``up_proj`` and ``down_proj`` of any module to the experts, which
    transformers named so before 5.0, and adapts the fused experts instead.
    """
    peft = import_peft()
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # before PEFT 0.19
        return names
    config: Any = peft.LoraConfig(target_modules=list(names))
    convert(config, model=network, conversions=None)
    if left_out := [name for name in names if name not in config.target_modules]:
        _log.warning(
            "WARNING: %d Linear layers beside the fused experts get no adapters, such as %s: PEFT would adapt the "
            "experts in their place.",
            len(left_out),
            left_out[0],
        )
    return [name for name in names if name in config.target_modules]
