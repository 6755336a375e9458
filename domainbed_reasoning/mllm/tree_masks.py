"""Attention masks and positions of trees of tokens, by family.

Rows with two branches, the trie of class names, and tokens that are being generated all follow a prefix with an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from domainbed_reasoning.mllm.language_model import LanguageModel


def tree_mask(
    mllm: LanguageModel, allowed: torch.Tensor, query: torch.Tensor, key: torch.Tensor, question: str
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the family's attention mask for a tree of tokens.

    Gemma 3's image tokens see each other, and most of its layers see no further back than a window, which is also all
    that their cache keeps.

    Args:
        mllm: the model.
        allowed: True where a token sees another, ``(n, 1, Q, K)``; the last Q of K are the queries themselves.
        query: positions of the queries, ``(Q,)``.
        key: positions of the keys, ``(K,)``.
        question: what the keys begin with, up to the image at least.
    """
    if mllm.family.tree != "windows":
        return allowed
    types = mllm.prompt(question)["token_type_ids"][0].to(mllm.device)
    image = torch.nn.functional.pad(types.bool(), (0, max(0, len(key) - len(types))))[: len(key)]
    together = image[-len(query) :, None] & image[None, :] if len(query) == len(key) else torch.zeros_like(allowed)
    window = mllm.base.config.get_text_config().sliding_window
    near = allowed & (query[:, None] - key[None, :] < window)
    before = len(key) - len(query)  # in the cache
    return {
        "full_attention": allowed | together,
        "sliding_attention": (near | together)[..., max(0, before - window + 1) :],
    }


def tree_positions(mllm: LanguageModel, plain: torch.Tensor, question: str, encoded: Mapping[str, Any]) -> torch.Tensor:
    """Return the family's positions for rows that begin with the question's image.

    In Qwen's three dimensions an image counts for its edge, not for its tokens, and text is alike in all three.

    Args:
        mllm: the model.
        plain: positions as the number of tokens before each, ``(n, L)``.
        question: what the rows, or the rows before these, begin with, up to the image at least.
        encoded: the images.

    Returns:
        ``(n, L)``, or ``(3, n, L)`` where the family rotates in three dimensions.
    """
    if mllm.family.tree != "rope":
        return plain
    prompt = mllm.prompt(question)
    exact, shift = mllm.base.model.get_rope_index(
        prompt["input_ids"].to(mllm.device),
        mm_token_type_ids=prompt["mm_token_type_ids"].to(mllm.device),
        image_grid_thw=encoded["image_grid_thw"][:1],
    )
    image = (prompt["mm_token_type_ids"][0] != 0).nonzero()
    end = int(image[-1]) + 1  # of the image; after it every dimension advances by one per token
    counted = torch.nn.functional.pad(exact[:, :, :end], (0, max(0, int(plain.max()) + 1 - end)))
    later = torch.arange(counted.shape[-1], device=mllm.device) + shift
    counted = torch.where(torch.arange(counted.shape[-1], device=mllm.device) < end, counted, later)
    return counted[:, 0][:, plain]
