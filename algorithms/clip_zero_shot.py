"""Zero-shot CLIP (Radford et al., ICML 2021, arXiv 2103.00020), a row of the paper's main table.

p(y = c | x) = softmax_c(τ · cos(f(x), g("a photo of a {c}."))), f and g CLIP's towers, τ its logit scale.

On the embedded datasets the default is a randomly initialized CLIP: it shows that the code runs offline, with accuracy
at chance level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning.algorithms.hparams import RESUME_HPARAMS, TRACK_HPARAMS
from domainbed_reasoning.algorithms.in_session import SessionAlgorithm
from domainbed_reasoning.bridge.samples import environment_of
from domainbed_reasoning.hparam_checks import FLAG, TEXT, integer
from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.method.answering import spread_scores
from domainbed_reasoning.mllm.clip import CLIP, load_clip
from domainbed_reasoning.registry import Hparam

PROMPT = "a photo of a {}."

# Not named like the MLLM algorithms' hparams: a sweep passes one `--hparams` to all its algorithms.
CLIP_HPARAMS = {
    **RESUME_HPARAMS,
    **TRACK_HPARAMS,
    "clip_model": Hparam(
        "openai/clip-vit-base-patch16", None, "the paper's backbone, ViT-B/16", embedded="tiny", allowed=TEXT
    ),
    "data_augmentation": Hparam(False, None, "nothing is trained", allowed=FLAG),
    "batch_size": Hparam(32, None, "DomainBed's, per domain; nothing is trained", embedded=6, allowed=integer(1)),
}


class CLIPZeroShot(SessionAlgorithm):
    """Pretrained CLIP, not fine-tuned; DomainBed's one step changes nothing."""

    HPARAMS = CLIP_HPARAMS

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.prompts = [PROMPT.format(name) for name in self.task.class_names]
        self.clip = self.load()
        self._classes: tuple[int, torch.Tensor] | None = None
        self.session.start()

    def load(self) -> CLIP:
        """Return the model."""
        return load_clip(self.hparams["clip_model"])

    def answer(self, x: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, Answers]:
        """Return class scores τ · cos(f(x), g(prompt)), and the predicted classes."""
        if self._classes is None or self._classes[0] != self.session.steps_taken:
            self._classes = (self.session.steps_taken, self.clip.text_features(self.prompts))
        scores = self.scores(x, self._classes[1])
        if self.task.offered:
            offered = self.task.classes_offered(environment_of(self.task, ids))
            scores = spread_scores(scores[:, offered], offered, scores.shape[1])
        classes = scores.argmax(1).tolist()
        return scores, Answers(classes, None, classes)

    def scores(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Return τ · cos(f(x), g(prompt)), ``(n, C)``, for text features of the classes, ``(C, d)``."""
        return self.clip.logit_scale * self.clip.image_features(x) @ classes.T

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name."""
        return self.clip.adapters()

    def load_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load trained tensors by name."""
        self.clip.load_adapters(values)
        self._classes = None
