"""Multi-task cross-training (arXiv 2602.23777, eq. 1).

L_MTCT = 1/B Σ_i [ -log p(y_i | x_i, q_cls) - 1/T_i Σ_t log p(r_{i,t} | r_{i,<t}, x_i, q_reason) ]

over the teacher's chains r; an image without a chain contributes only its label term.
"""

from __future__ import annotations

from typing import Any

from domainbed_reasoning.algorithms.base import MLLMAlgorithm
from domainbed_reasoning.algorithms.hparams import (
    BALANCE_HPARAMS,
    CHAIN_HPARAMS,
    LABEL_HPARAMS,
    MODEL_HPARAMS,
    TRAINING_HPARAMS,
)


class MTCT(MLLMAlgorithm):
    """Joint training of both paths on the teacher's chains."""

    HPARAMS = {**MODEL_HPARAMS, **TRAINING_HPARAMS, **LABEL_HPARAMS, **CHAIN_HPARAMS, **BALANCE_HPARAMS}
    LABEL_PATH = True
    CHAIN_PATH = True

    @classmethod
    def stages(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the number of epochs of the supervised stage."""
        return [hparams["mtct_epochs"]]
