"""Token-probability shift between two checkpoints: the paper's optimization gap (arXiv 2602.23777).

Of the target tokens t, p_A(t) and p_B(t) their probabilities under the checkpoints A (before) and B (after):

    low_A = |{t: p_A < 0.25}| / N        high_A = |{t: p_A > 0.75}| / N
    risen = |{t: p_A < 0.25, p_B > 0.75}| / N        fallen = |{t: p_A > 0.75, p_B < 0.25}| / N

for all tokens, for those of class names (of a chain: its conclusion), for those where a chain first names the class of
its conclusion, which the conclusion then copies, and for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from domainbed_reasoning.analysis.target_tokens import TokenTable

LOW, HIGH = 0.25, 0.75
_RESAMPLES = 1000

# The paper's counterpart of ``risen``, in percent of all target tokens on InternVL3-8B, by what is trained on.
PAPER_RISEN = {"label": 43.38, "teacher": 1.88, "own": 29.74}
PAPER = (
    "paper, InternVL3-8B: of the target tokens moved from below 0.25 to above 0.75 by label supervision +43.38\n"
    "points, by teacher chains +1.88, by self-generated chains +29.74; class tokens above 0.75: label SFT 92.23%,\n"
    "reasoning SFT 86.33%, MTCT 90.23%, their share below 0.25: 7.59% to 3.19%; of teacher-chain tokens 19.33% stay\n"
    "below 0.25 after MTCT"
)
OWN = (
    "own chains are what --before writes: greedy ones are its likeliest token at every place, so that their\n"
    "probabilities are high before and few are left to rise"
)


def found_in(row: Mapping[str, Any], paper: float | None = None) -> list[str]:
    """Return what a row of `shift` says, a line a finding.

    Args:
        row: the shares.
        paper: its ``risen`` in percent; None where there is none.
    """
    beside = f" (paper: {paper:+.2f})" if paper is not None else ""
    risen, fallen, high = (100 * row[key] for key in ("risen", "fallen", "high_before"))
    gain = 100 * row["high_after"] - high
    return [
        f"moved from below {LOW} to above {HIGH}: {risen:+.2f} points{beside}",
        f"minus those that fell from above {HIGH} to below {LOW}: {risen - fallen:+.2f} points",
        f"share above {HIGH}: {high:.2f}% before, {high + gain:.2f}% after: {gain:+.2f} points (paper: not reported)",
    ]


def shift(before: TokenTable, after: TokenTable) -> list[dict[str, Any]]:
    """Return a row of shares for each group of tokens.

    Args:
        before: the answers' tokens under A.
        after: the same tokens under B.

    Returns:
        rows with ``tokens`` (``all``, ``class``, ``naming``, ``other``), ``n``, shares in [0, 1], and ``risen``'s 95%
        interval over resampled answers.
    """
    of_class, naming = before.kind == "class", before.kind == "naming"
    groups = {"all": np.ones_like(naming), "class": of_class, "naming": naming, "other": ~(of_class | naming)}
    return [{"tokens": name, **_shares(before, after, chosen)} for name, chosen in groups.items() if chosen.any()]


def _shares(before: TokenTable, after: TokenTable, chosen: np.ndarray) -> dict[str, Any]:
    a, b = before.probability[chosen], after.probability[chosen]
    risen = (a < LOW) & (b > HIGH)
    low, high = _interval(risen, before.answer[chosen])
    return {
        "n": len(a),
        "low_before": float((a < LOW).mean()),
        "low_after": float((b < LOW).mean()),
        "high_before": float((a > HIGH).mean()),
        "high_after": float((b > HIGH).mean()),
        "risen": float(risen.mean()),
        "risen_from": low,
        "risen_to": high,
        "fallen": float(((a > HIGH) & (b < LOW)).mean()),
    }


def _interval(hits: np.ndarray, answer: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of a share of tokens, answers resampled as wholes."""
    _, group = np.unique(answer, return_inverse=True)
    sums, counts = np.bincount(group, hits), np.bincount(group)
    drawn = np.random.RandomState(0).randint(len(sums), size=(_RESAMPLES, len(sums)))
    shares = sums[drawn].sum(1) / counts[drawn].sum(1)
    return float(np.quantile(shares, 0.025)), float(np.quantile(shares, 0.975))
