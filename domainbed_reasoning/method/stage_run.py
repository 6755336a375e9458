"""One stage of training: its optimizer, its learning rate and, in a SARR round, the chains of its labeler."""

from __future__ import annotations

import math
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
        lr_scheduler: over the updates that are due.
        over_kept: whether its epochs are over the chains that were kept (the hparam ``sarr_epoch_over``).
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
        self.over_kept = own_chains is not None and hparams["sarr_epoch_over"] == "kept"
        steps = self.updates_due if self.over_kept else stage.steps
        self.optimizer, self.lr_scheduler = optimizer_of_stage(adapters.values(), hparams, steps)
        self._start = {name: weight.detach().cpu().clone() for name, weight in adapters.items()} if stage.round else {}

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return int(self.lr_scheduler.last_epoch)

    def updates_due(self) -> int:
        """Return how many updates the stage takes, as far as is known.

        An epoch over all images has N / B steps, N images in batches of B. Of the N a round keeps N', so that an epoch
        over what it kept, as the paper tunes on, has N' / B. DomainBed fixes the number of steps before N' is known:
        with ``sarr_epoch_over`` at ``kept`` the round takes the share N' / N of its steps, rounded up, by the chains
        written so far; in the others, surplus ones, images are labeled and nothing is learned.
        """
        own = self.own_chains
        if not self.over_kept or own is None or not own.labeled:
            return self.stage.steps
        return math.ceil(round(own.accepted_share * self.stage.steps, 9))  # 0.07 * 100 is a little more than 7

    @property
    def is_surplus(self) -> bool:
        """Whether the updates that are due have been taken: this step changes neither weights nor optimizer."""
        return self.over_kept and self.updates >= self.updates_due()

    def advance(self) -> None:
        """Take the optimizer's step and move the learning rate on.

        Without gradients, as where none of a round's chains was kept, no weight changes: the schedule is laid over the
        updates that are due, so that the last ones get its end whatever was rejected. The paper publishes no schedule,
        nor what to do when a round keeps nothing: training continues, for later images may do better.
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
