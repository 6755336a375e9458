"""Self-labeling without the label path (arXiv 2602.23777, ablation "SARR without MTCT").

What stands in MTCT's place is not published beyond its name. Ours is the reasoning path alone, first on the teacher's
chains (``mtct_epochs``; 0 starts from the base model, without a teacher), then N rounds on the model's own.
"""

from __future__ import annotations

from typing import Any

from domainbed_reasoning.algorithms.hparams import SARR_HPARAMS
from domainbed_reasoning.algorithms.reasoning_sft import ReasoningSFT


class SARR(ReasoningSFT):
    """ReasoningSFT, then N rounds of self-labeling, label term nowhere."""

    HPARAMS = {**ReasoningSFT.HPARAMS, **SARR_HPARAMS}

    @classmethod
    def stages(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the epochs of the supervised stage and of each round."""
        return [hparams["mtct_epochs"], *[hparams["sarr_epochs"]] * hparams["sarr_rounds"]]
