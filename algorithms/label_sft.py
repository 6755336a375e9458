"""Label supervision alone (arXiv 2602.23777, ablation "CLS").

L = 1/B Σ_i -log p(y_i | x_i, q_cls)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from domainbed_reasoning.algorithms.base import MLLMAlgorithm
from domainbed_reasoning.algorithms.hparams import LABEL_HPARAMS, MODEL_HPARAMS, TRAINING_HPARAMS


class LabelSFT(MLLMAlgorithm):
    """The classification path of MTCT without the reasoning path; answers by the label."""

    HPARAMS = {
        **MODEL_HPARAMS,
        **TRAINING_HPARAMS,
        **LABEL_HPARAMS,
        "answer": replace(MODEL_HPARAMS["answer"], default="label", source="it is not trained on chains"),
    }
    LABEL_PATH = True

    @classmethod
    def stages(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the number of epochs of the supervised stage."""
        return [hparams["mtct_epochs"]]
