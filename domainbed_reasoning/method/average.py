"""The average of the models that a stage's evaluations saw (the hparam ``average_adapters``).

SWAD (Cha et al., NeurIPS 2021, arXiv 2102.08604) averages the weights of a network along its training. The weights of
an adapted layer are W + s B A, so that the average over n evaluations is W + s/n Σ B_i A_i: the A_i stacked and the
B_i / n side by side are one adapter of n times the rank that has exactly these weights. The averages of A and of B
alone are not: their product differs by the covariance of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class AdapterAverage:
    """Adapters at the evaluations of one stage, and their average. Training goes on from the last, not the average.

    Memory: the adapters once an evaluation, in the main memory.
    """

    def __init__(self) -> None:
        self.stage = -1
        self._step = -1
        self._seen: list[dict[str, torch.Tensor]] = []
        self._average: dict[str, torch.Tensor] | None = None

    def add(self, stage: int, step: int, adapters: Mapping[str, torch.Tensor]) -> bool:
        """Take the adapters of an evaluation into the average, once; a new stage begins a new one.

        Args:
            stage: that the last update belongs to.
            step: number of updates so far.
            adapters: A, ``(rank, in)``, and B, ``(out, rank)``, by name.

        Returns:
            Whether the average has changed.
        """
        if (stage, step) == (self.stage, self._step):
            return False
        if stage != self.stage:
            self._seen.clear()
        self.stage, self._step = stage, step
        self._average = None
        self._seen.append({name: weight.detach().to("cpu", copy=True) for name, weight in adapters.items()})
        return True

    def adapters(self) -> dict[str, torch.Tensor] | None:
        """Return the average as one adapter: A, ``(n * rank, in)``, and B, ``(out, n * rank)``; None before any."""
        if self._average is not None or not self._seen:
            return self._average
        count = len(self._seen)
        self._average = {
            name: torch.cat([one[name] for one in self._seen], dim=0)
            if ".lora_A." in name
            else torch.cat([one[name] / count for one in self._seen], dim=1)
            for name in self._seen[0]
        }
        return self._average

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs: tensors and plain values."""
        return {"stage": self.stage, "step": self._step, "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the average."""
        self.stage, self._step, self._seen = state["stage"], state["step"], list(state["seen"])
        self._average = None
