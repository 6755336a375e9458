"""Passes DomainBed's calls of an algorithm to the job's session, which replays them after a restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from domainbed.algorithms import Algorithm

from domainbed_reasoning.jobs.replay_log import Answers
from domainbed_reasoning.jobs.session import Minibatches, Session
from domainbed_reasoning.registry import Hparam


class SessionAlgorithm(Algorithm):  # type: ignore[misc]
    """An algorithm that implements step, answer and state (`jobs.session.Resumable`); the session does the rest.

    Class attributes:
        HPARAMS: hyper-parameters, with defaults, samplers and sources.
        SHARES_WORK: whether several ranks of torchrun share its updates and answers (`session.ranks`); if not, it runs
            in one process.

    Attributes:
        session: the job's session.
        task: classes, images and chains.
        schedule: the stages of training.

    Raises:
        ValueError: if hyper-parameters are invalid; raised before training.
    """

    HPARAMS: ClassVar[dict[str, Hparam]]
    SHARES_WORK: ClassVar[bool] = False

    def __init__(self, input_shape: Sequence[int], num_classes: int, num_domains: int, hparams: dict[str, Any]):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.session = Session(type(self), num_classes, num_domains, hparams, self.stages(hparams))
        self.task, self.schedule = self.session.task, self.session.schedule

    @classmethod
    def stages(cls, hparams: dict[str, Any]) -> list[int]:
        """Return the number of epochs of every stage; [] without training."""
        return []

    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        """Take one step and return its values; see DomainBed's `Algorithm.update` and `step`."""
        return self.session.update(self, minibatches)

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Return class scores, ``(n, num_classes)``, of the images ``x``, bytes or DomainBed's floats; see `answer`."""
        return self.session.predict(self, x)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return only the trained tensors: the base model is on disk already."""
        return self.session.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained tensors.

        Raises:
            ValueError: if a tensor does not match this model; the message names the first one.
        """
        self.load_adapters(state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def step(self, minibatches: Minibatches) -> dict[str, float]:
        """Do nothing but count the step: no loss is computed, nothing is trained."""
        return {"stage": 0.0}

    def after_step(self) -> None:
        """Do nothing: nothing is kept that depends on the weights."""

    def answer(self, x: torch.Tensor, ids: torch.Tensor | None) -> tuple[torch.Tensor, Answers]:
        """Return class scores of the images ``x``, ``(n, num_classes)``, and the answers to be recorded."""
        raise NotImplementedError

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the trained tensors by name."""
        raise NotImplementedError

    def load_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load trained tensors by name."""
        raise NotImplementedError

    def before_answers(self) -> None:
        """Do nothing: called before the images of an evaluation are answered, for each batch of them."""

    def training_state(self) -> dict[str, Any]:
        """Return the state from which training resumes, given the recorded steps; {} without training."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `training_state` returned."""

    def recall(self, x: torch.Tensor, answers: Answers) -> None:
        """Cache an earlier process's answers for the images ``x``, if they can be reused."""

    def new_self_labels(self) -> list[tuple[int, int, str, bool]]:
        """Return the chains self-labeled in the last step: environment, index, chain, whether it was kept."""
        return []
