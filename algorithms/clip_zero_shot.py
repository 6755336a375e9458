"""Zero-shot CLIP (Radford et al., ICML 2021, arXiv 2103.00020), a row of the paper's main table.

p(y = c | x) = softmax_c(τ · cos(f(x), g("a photo of a {c}."))), f and g CLIP's towers, τ its logit scale.

On the embedded datasets the default is a CLIP of random weights, which was never trained: it shows that the machinery
runs offline, and its accuracy is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from domainbed.algorithms import Algorithm

from domainbed_reasoning.algorithms.base import schedule_of_stock_dataset, task_without_names
from domainbed_reasoning.algorithms.hparams import check_values
from domainbed_reasoning.algorithms.records import AnswerRecords, records_for
from domainbed_reasoning.job import job_arguments
from domainbed_reasoning.mllm.clip import CLIP, clip_image_edge, load_clip
from domainbed_reasoning.register import check_hparams
from domainbed_reasoning.registry import Hparam
from domainbed_reasoning.samples import ids_of, task_of

PROMPT = "a photo of a {}."

# Named apart from the MLLM algorithms' own: a sweep passes one `--hparams` to all its algorithms.
CLIP_HPARAMS = {
    "clip_model": Hparam("openai/clip-vit-base-patch16", None, "the paper's backbone, ViT-B/16", embedded="tiny"),
    "data_augmentation": Hparam(False, None, "nothing is trained"),
    "batch_size": Hparam(32, None, "DomainBed's, per domain; nothing is trained", embedded=6),
}


class CLIPZeroShot(Algorithm):  # type: ignore[misc]
    """CLIP as it comes; DomainBed's one step changes nothing.

    Class attributes:
        HPARAMS: its hyper-parameters, with defaults and sources.
        CHAIN_PATH: no chain is read or written.
    """

    HPARAMS: ClassVar[dict[str, Hparam]] = CLIP_HPARAMS
    CHAIN_PATH: ClassVar[bool] = False

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        check_hparams(hparams, type(self).__name__)
        check_values(hparams)
        self.task = task_of(hparams) or task_without_names(num_classes)
        self.schedule = self.task.schedule or schedule_of_stock_dataset(self.stage_epochs(hparams))
        self.prompts = [PROMPT.format(name) for name in self.task.class_names]
        self.clip = self._load()
        self.steps_taken = 0
        self.records: AnswerRecords | None = records_for(self.task, job_arguments())
        self._classes: tuple[int, torch.Tensor] | None = None

    @staticmethod
    def image_edge(hparams: dict[str, Any]) -> int:
        """Return the edge in pixels at which the model sees an image."""
        return clip_image_edge(hparams["clip_model"])

    @classmethod
    def stage_epochs(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the epochs between evaluations; [] without training."""
        return []

    def _load(self) -> CLIP:
        return load_clip(self.hparams["clip_model"])

    def update(
        self, minibatches: list[tuple[torch.Tensor, torch.Tensor]], unlabeled: list[torch.Tensor] | None = None
    ) -> dict[str, float]:
        """Do nothing: no loss is computed, the step is counted."""
        self.steps_taken += 1
        return {"stage": 0.0}

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores τ · cos(f(x), g(prompt)), ``(n, num_classes)``.

        Args:
            x: ``(n, c, H, W)``, bytes or DomainBed's floats.
        """
        if self._classes is None or self._classes[0] != self.steps_taken:
            self._classes = (self.steps_taken, self.clip.text_features(self.prompts))
        scores = self._scores(x, self._classes[1])
        ids = ids_of(x)
        if self.records is not None and ids is not None:
            self.records.add(ids, None, scores.argmax(1).tolist(), self.steps_taken >= self.schedule.n_steps)
        return scores

    def _scores(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return self.clip.logit_scale * self.clip.image_features(x) @ classes.T

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the adapters alone, none here: the base model is on disk already, under the hparam ``clip_model``."""
        return {name: weight.detach().clone() for name, weight in self.clip.adapters().items()}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load adapters.

        Raises:
            ValueError: for tensors that do not fit this model's adapters.
        """
        self.clip.load_adapters(state_dict)
        self._classes = None
        return torch.nn.modules.module._IncompatibleKeys([], [])
