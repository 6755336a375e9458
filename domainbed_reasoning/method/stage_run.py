"""One stage of training: its optimizer, its learning rate and, in a SARR round, the chains of its labeler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning.method.optimizer import optimizer_of_stage
from domainbed_reasoning.method.schedule import Stage
from domainbed_reasoning.method.self_labeling import SelfLabels


class StageRun:
    """A stage that has begun.

    Args:
        stage: its place in the schedule.
        adapters: the trained tensors by name, as they are when the stage begins.
        hparams: of the job.
        own_chains: of a SARR round; None in the supervised stage.

    Attributes:
        optimizer: a fresh AdamW.
        lr_scheduler: over the stage's steps.
    """

    def __init__(
        self,
        stage: Stage,
        adapters: Mapping[str, torch.Tensor],
        hparams: Mapping[str, Any],
        own_chains: SelfLabels | None = None,
    ):
        self.stage = stage
        self.own_chains = own_chains
        self.optimizer, self.lr_scheduler = optimizer_of_stage(adapters.values(), hparams, stage.steps)
        self._start = {name: weight.detach().cpu().clone() for name, weight in adapters.items()} if stage.round else {}

    def advance(self) -> None:
        """Take the optimizer's step and move the learning rate on.

        Without gradients, as where none of a round's chains was kept, no weight changes: the schedule is laid over the
        stage's steps, so that the last ones get its end whatever was rejected. The paper publishes no schedule, nor
        what to do when a round keeps nothing: training continues, for later images may do better.
        """
        self.optimizer.step()
        self.lr_scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs: tensors and plain values."""
        own = self.own_chains
        return {
            "stage_start": self._start,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "own_chains": own.state_dict() if own is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any], labeled: Sequence[tuple[int, int, str, bool]]) -> None:
        """Restore the stage.

        Args:
            state: what `state_dict` returned.
            labeled: the round's own chains, as `SelfLabels.newly_written` returned them.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.own_chains is not None:
            self.own_chains.load_state_dict(state["own_chains"], labeled)
