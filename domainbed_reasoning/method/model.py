"""The interface of multimodal LLMs that the method requires."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class ReasoningModel(Protocol):
    """A model that generates chains and scores texts; implemented by `mllm.MLLM`."""

    def encode(self, images: torch.Tensor) -> dict[str, Any]:
        """Encode images, ``(n, 3, H, W)``, for any number of questions."""
        ...

    def log_likelihoods(
        self, encoded: dict[str, Any], question: str, answers: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p of each token of the n answers, in nats, and the mask of target tokens, ``(n, T)`` each."""
        ...

    def class_scores(self, images: torch.Tensor, question: str, names: Sequence[str]) -> torch.Tensor:
        """Return log p(name | image, question) in nats, ``(n, C)``."""
        ...

    def generate(
        self, images: torch.Tensor, question: str, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
    ) -> list[str]:
        """Generate n answers of at most ``max_new_tokens`` tokens; temperature 0 is greedy."""
        ...
