"""Supervised fine-tuning on teacher chains alone (arXiv 2602.23777, ablation "reasoning only").

L = 1/B Σ_i -1/T_i Σ_t log p(r_{i,t} | r_{i,<t}, x_i, q_reason)
"""

from __future__ import annotations

from typing import Any

from domainbed_reasoning.algorithms.base import MLLMAlgorithm
from domainbed_reasoning.algorithms.hparams import CHAIN_HPARAMS, MODEL_HPARAMS, TRAINING_HPARAMS


class ReasoningSFT(MLLMAlgorithm):
    """The reasoning path of MTCT without the classification path; images without a chain are not used."""

    HPARAMS = {**MODEL_HPARAMS, **TRAINING_HPARAMS, **CHAIN_HPARAMS}
    CHAIN_PATH = True

    @classmethod
    def stages(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the number of epochs of the supervised stage."""
        return [hparams["mtct_epochs"]]
