"""One training stage: its optimizer, learning-rate schedule and, in a SARR round, the labeler's chains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning.method.optimizer import optimizer_of_stage
from domainbed_reasoning.method.schedule import Stage
from domainbed_reasoning.method.self_labeling import SelfLabels


class StageRun:
    """A running stage.

    Args:
        stage: its position in the schedule.
        adapters: the trained tensors by name, at the start of the stage.
        hparams: of the job.
        own_chains: self-labels of a SARR round; None in the supervised stage.

    Attributes:
        optimizer: a fresh AdamW.
        lr_scheduler: its schedule over the planned updates.
        chain_loss: running average of the chain loss in nats, see `running_average`; None before the first update.
        over_kept: whether an epoch is over the kept chains only (the hparam ``sarr_epoch_over``).
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
        self.chain_loss: float | None = None
        self.over_kept = own_chains is not None and hparams["sarr_epoch_over"] == "kept"
        steps = self.updates_due if self.over_kept else stage.steps
        self.optimizer, self.lr_scheduler = optimizer_of_stage(adapters.values(), hparams, steps)
        self._start = {name: weight.detach().cpu().clone() for name, weight in adapters.items()} if stage.round else {}

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return int(self.lr_scheduler.last_epoch)

    def updates_due(self) -> int:
        """Return the current estimate of the stage's number of updates.

        An epoch over all N images in batches of B has N / B steps. A round keeps N' of them, so an epoch over the kept
        chains, as in the paper, has N' / B steps. DomainBed fixes the number of steps before N' is known. With
        ``sarr_epoch_over="kept"``, the round updates in a share N' / N of its steps, rounded up and estimated from its
        chains so far; the remaining, surplus steps label images without an update.
        """
        own = self.own_chains
        if not self.over_kept or own is None or not own.labeled:
            return self.stage.steps
        return math.ceil(round(own.accepted_share * self.stage.steps, 9))  # 0.07 * 100 is slightly more than 7

    @property
    def is_surplus(self) -> bool:
        """Whether all planned updates have been taken: this step changes neither weights nor optimizer."""
        return self.over_kept and self.updates >= self.updates_due()

    def advance(self) -> None:
        """Step the optimizer and the learning-rate schedule.

        Without gradients, e.g. if none of a round's chains was kept, no weight changes. The schedule spans the planned
        updates, so that it always reaches its end. The paper specifies neither a schedule nor what to do when a round
        keeps no chains: training continues, as chains of later images may be kept.
        """
        self.optimizer.step()
        self.lr_scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`: tensors and plain values."""
        own = self.own_chains
        return {
            "stage_start": self._start,
            "chain_loss": self.chain_loss,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "own_chains": own.state_dict() if own is not None else {},
        }

    def load_state_dict(self, state: Mapping[str, Any], labeled: Sequence[tuple[int, int, str, bool]]) -> None:
        """Restore the stage.

        Args:
            state: from `state_dict`.
            labeled: the round's self-labels, from `SelfLabels.newly_written`.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        self.chain_loss = state.get("chain_loss")  # absent from states of earlier versions
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.own_chains is not None:
            self.own_chains.load_state_dict(state["own_chains"], labeled)
