"""``stages.jsonl`` of a tracked job: a line per stage with the means of its losses and examples of its chains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.method.schedule import Schedule, Stage, name_of_stage
from domainbed_reasoning.method.task import Task

STAGES = "stages.jsonl"
_EXAMPLES = 8
_MEANS = ("loss", "label_loss", "chain_loss", "chain_share")

SelfLabel = tuple[int, int, str, bool]  # environment, index, chain, whether it was kept


class StageFile:
    """Collects the steps of a stage and writes its line after its last step.

    Args:
        task: of the job.
        schedule: its stages.
        folder: of the job; the file of an earlier process is removed, as its steps are replayed.
    """

    def __init__(self, task: Task, schedule: Schedule, folder: Path):
        self.task, self.schedule, self.path = task, schedule, folder / STAGES
        self._sums: dict[str, list[float]] = {}
        self._lines: list[str] = []
        with suppress(OSError):  # then the first stage's end fails, and says so
            self.path.unlink(missing_ok=True)

    def add(self, step: int, values: Mapping[str, float], own_chains: Sequence[SelfLabel]) -> None:
        """Add a step.

        Args:
            step: its number.
            values: that it returned.
            own_chains: that were self-labeled in its stage so far.
        """
        stage = self.schedule.at(step)
        for name in _MEANS:
            if name in values:
                self._sums.setdefault(name, []).append(values[name])
        if step == stage.last:
            self._lines.append(json.dumps(self._describe(stage, values, own_chains), ensure_ascii=False) + "\n")
            self._sums = {}
            replace_text(self.path, "".join(self._lines))

    def _describe(self, stage: Stage, values: Mapping[str, float], own: Sequence[SelfLabel]) -> dict[str, Any]:
        shares = {"accepted": "kept_share", "well_formed": "well_formed_share"}
        kept = {name: values[key] for end, name in shares.items() if (key := f"sarr{stage.round}_{end}") in values}
        means = {name: sum(numbers) / len(numbers) for name, numbers in self._sums.items()}
        rows = own if stage.round else [(*key, chain, True) for key, chain in sorted(self.task.chains.items())]
        shown = rows[:: max(1, len(rows) // _EXAMPLES)][:_EXAMPLES]
        return {
            "name": name_of_stage(stage.round),
            "first": stage.first,
            "last": stage.last,
            "values": means | kept,
            "examples": [self._example(*row) for row in shown],
        }

    def _example(self, env: int, index: int, chain: str, kept: bool) -> dict[str, Any]:
        task = self.task
        label = task.class_names[task.labels[env][index]]
        image = task.images[env][index] if task.images else f"{env}/{index}"
        return {"image": image, "domain": task.environments[env], "label": label, "kept": kept, "chain": chain}
