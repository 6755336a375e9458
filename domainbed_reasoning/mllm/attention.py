"""How attention is computed: the hyper-parameter ``attn_implementation``.

Rows with two paths and the trie of class names share a prefix through attention masks of their own, which PyTorch's
scaled-dot-product attention (sdpa) takes; where no mask is needed, it runs FlashAttention kernels by itself. The
packages flash_attn and flash_attn_3 take no such masks: with them, and with transformers' eager attention, models are
computed by the general path: two rows a sample, a row a class name (see `general`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from domainbed_reasoning.mllm.families import ModelError

IMPLEMENTATIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")
_PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}


def takes_tree_masks(implementation: str) -> bool:
    """Return whether rows with a shared prefix can be computed: their masks have branches."""
    return implementation in ("auto", "sdpa")


def avoid_plans(implementation: str, device: torch.device) -> None:
    """Turn off cuDNN's attention in this process, where PyTorch's would choose it.

    It builds a plan for every shape that is new, which takes 0.2 s of a micro-batch on an H100, and most micro-batches
    are as long as no other; PyTorch's other kernels are as fast.
    """
    if takes_tree_masks(implementation) and device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def check_attention(implementation: str, dtype: torch.dtype, device: torch.device) -> None:
    """Reject an implementation that is unknown, not installed, or unable to compute in this type or on this device.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        dtype: of the activations.
        device: of the model.

    Raises:
        ModelError: with what is missing and what to use instead.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ModelError(f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}.")
    if implementation not in _PACKAGES:
        return
    instead = "Use 'sdpa': it runs PyTorch's own FlashAttention kernels wherever a path needs no mask."
    if device.type != "cuda":
        raise ModelError(
            f"attn_implementation {implementation!r} needs a CUDA device; this is {device.type}. {instead}"
        )
    if not _is_available(implementation):
        raise ModelError(
            f"attn_implementation {implementation!r} needs the package {_PACKAGES[implementation]}, which is not "
            f"installed. {instead}"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ModelError(
            f"attn_implementation {implementation!r} computes in bfloat16 or float16; dtype is "
            f"{str(dtype).removeprefix('torch.')}. Set dtype to bfloat16, or use 'sdpa'."
        )


def _is_available(implementation: str) -> bool:
    from transformers import utils

    available: Callable[[], bool] = getattr(utils, f"is_{implementation.replace('attention', 'attn')}_available")
    return bool(available())
