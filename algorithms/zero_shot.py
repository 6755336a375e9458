"""The base model without training (arXiv 2602.23777, table 3, first row)."""

from __future__ import annotations

from domainbed_reasoning.algorithms.base import MLLMAlgorithm
from domainbed_reasoning.algorithms.hparams import MODEL_HPARAMS
from domainbed_reasoning.jobs.session import Minibatches


class MLLMZeroShot(MLLMAlgorithm):
    """Zero-shot answers; DomainBed's one step changes nothing."""

    HPARAMS = MODEL_HPARAMS

    def step(self, minibatches: Minibatches) -> dict[str, float]:
        """Do nothing but count the step: no loss is computed."""
        return {"stage": 0.0}
