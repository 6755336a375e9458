"""Attention of rows with two branches, without a mask over the whole row.

``[prefix | trunk | twig]``: prefix and trunk are one causal sequence, which every fast kernel knows without a mask; the
twig's few queries see prefix and twig. The pairs of trunk and twig, and those above the diagonal, are never computed.
Measured against one dense mask over the row in `benchmarks/mtct_step.py`.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "sdpa_branches"


def install(network: Any) -> None:
    """Let the language model of ``network`` take rows with branches; everything else it computes as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, branch_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.config.get_text_config()._attn_implementation = NAME


def no_mask(device: torch.device) -> torch.Tensor:
    """Return what stands for the mask of rows without a twig, ``(1, 1, 1, 1)``: they are causal and nothing else.

    Without any, transformers would make one, and have the host read the positions to see whether rows are packed.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def branch_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    branches: tuple[int, int, int] | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' sdpa attention does, for rows with branches where there are some.

    Args:
        module: the attention layer.
        query: ``(n, heads, L, width)``.
        key: ``(n, key heads, L, width)``.
        value: ``(n, key heads, L, width)``.
        attention_mask: the twig's, ``(1, 1, twig, prefix + twig)``, unread where that is empty; without branches
            whatever transformers gives.
        branches: tokens of prefix, trunk and twig; None for plain rows.
        more: passed on.

    Returns:
        ``(n, L, heads, width)``, and no weights.
    """
    from transformers.integrations import sdpa_attention

    attend: Any = sdpa_attention.sdpa_attention_forward

    if branches is None:
        return attend(module, query, key, value, attention_mask, **more)[0], None
    prefix, trunk, twig = branches
    end = prefix + trunk
    straight, _ = attend(
        module, query[:, :, :end], key[:, :, :end], value[:, :, :end], None, **{**more, "is_causal": True}
    )
    if not twig:
        return straight, None
    seen = [torch.cat([part[:, :, :prefix], part[:, :, end:]], dim=2) for part in (key, value)]
    aside, _ = attend(module, query[:, :, end:], *seen, attention_mask, **more)
    return torch.cat([straight, aside], dim=1), None
