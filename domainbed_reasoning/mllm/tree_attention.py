"""Attention over rows with two branches, without a mask over the whole row.

``[prefix | trunk | twig]``: prefix and trunk are one causal sequence, which every fast kernel knows without a mask; the
twig's few queries see prefix and twig. The pairs of trunk and twig, and those above the diagonal, are never computed.
Measured against one dense mask over the row in `benchmarks/mtct_step.py`.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "sdpa_branches"


def install(network: Any) -> None:
    """Enable rows with branches in the language model of ``network``; other rows are computed as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, branch_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.config.get_text_config()._attn_implementation = NAME


def no_mask(device: torch.device) -> torch.Tensor:
    """Return a placeholder for the mask of plain causal rows, ``(1, 1, 1, 1)``.

    Without one, transformers would build a mask and synchronize with the host to see whether rows are packed.
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
    """Return what transformers' sdpa attention does, extended to rows with branches.

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
        ``(n, L, heads, width)``, and None in place of attention weights.
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
