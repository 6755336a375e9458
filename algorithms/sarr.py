"""Self-labeling without the label path (arXiv 2602.23777, ablation "SARR without MTCT").

The paper does not specify what replaces MTCT. Here it is the reasoning path alone, first on teacher chains
(``mtct_epochs``; 0 starts from the base model, without a teacher), then N rounds on self-generated ones.
"""

from __future__ import annotations

from typing import Any

from domainbed_reasoning.algorithms.hparams import SARR_HPARAMS
from domainbed_reasoning.algorithms.reasoning_sft import ReasoningSFT


class SARR(ReasoningSFT):
    """ReasoningSFT, then N rounds of self-labeling, without the label term."""

    HPARAMS = {**ReasoningSFT.HPARAMS, **SARR_HPARAMS}

    @classmethod
    def stages(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the number of epochs of the supervised stage and of each round."""
        return [hparams["mtct_epochs"], *[hparams["sarr_epochs"]] * hparams["sarr_rounds"]]
