"""Entropy reduction by fine-tuning and its top tokens: the paper's pattern mismatch (arXiv 2602.23777).

    ΔH(w) = mean over the positions t of token w of [H_A(t) - H_B(t)],   H in nats, A before and B after

for teacher chains and for self-generated ones. In the paper, the 15 tokens with the largest ΔH are disjoint: context,
viewpoint and background for teacher chains, class words for self-generated ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from domainbed_reasoning.analysis.target_tokens import TokenTable

TOP = 15
LEAST = 3  # rarer tokens are not informative; the paper states no bound
PAPER = (
    "paper, InternVL3-8B: the 15 tokens of teacher chains (context, viewpoint, background) and of self-generated\n"
    "chains (class words) have none in common"
)


def reductions(before: TokenTable, after: TokenTable, least: int = LEAST) -> list[dict[str, Any]]:
    """Return the entropy reduction of each word token, in descending order.

    Tags and the end of the turn are left out. Tokens that differ only in case or leading space are merged.

    Args:
        before: the answers' tokens under A.
        after: the same tokens under B.
        least: minimum number of positions of a token.

    Returns:
        Rows with ``token``, ``n`` (number of positions), ``before``, ``after`` and ``reduction`` in nats, and
        ``of_class``: whether the token occurs in a conclusion.
    """
    places: dict[str, list[int]] = {}
    for position, (token, kind) in enumerate(zip(before.token, before.kind, strict=True)):
        text = token.strip().casefold()
        if kind in ("word", "naming", "class") and any(letter.isalnum() for letter in text):
            places.setdefault(text, []).append(position)
    concluded = {before.token[i].strip().casefold() for i in np.flatnonzero(before.kind == "class")}
    rows = []
    for text, found in places.items():
        if len(found) >= least:
            a, b = float(before.entropy[found].mean()), float(after.entropy[found].mean())
            row = {"token": text, "n": len(found), "before": a, "after": b, "reduction": a - b}
            rows.append({**row, "of_class": text in concluded})
    return sorted(rows, key=lambda row: (-row["reduction"], row["token"]))


def overlap(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], top: int = TOP) -> float:
    """Return the overlap of the first ``top`` tokens of two lists, |A ∩ B| / |A ∪ B|, in [0, 1]."""
    a, b = {row["token"] for row in one[:top]}, {row["token"] for row in other[:top]}
    return len(a & b) / len(a | b) if a | b else 0.0
