"""The stages of training, laid out over DomainBed's steps and evaluations (arXiv 2602.23777, algorithm 1).

Stage 0 is MTCT on the teacher's chains, stage k = 1…N is SARR's round k. The paper gives them in epochs (3 each,
N = 3); DomainBed counts steps, evaluates at fixed intervals, and lets ``--steps`` overrule everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A run of steps on one source of chains.

    Attributes:
        round: 0 for MTCT on teacher chains, k for SARR's round k.
        first: its first step.
        last: its last step (inclusive).
    """

    round: int
    first: int
    last: int

    @property
    def steps(self) -> int:
        """Number of updates in the stage."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        """Name the stage and its steps."""
        name = f"SARR round {self.round}" if self.round else "supervised stage"
        return f"{name} (steps {self.first}-{self.last})"


@dataclass(frozen=True)
class Schedule:
    """All stages, and how often DomainBed has to evaluate so that it does so at every stage's end.

    Attributes:
        stages: in order; stages that ``--steps`` left without a step are absent.
        n_steps: updates in all.
        checkpoint_freq: every stage ends at a multiple of it, or at the last step.
    """

    stages: tuple[Stage, ...]
    n_steps: int
    checkpoint_freq: int

    def at(self, step: int) -> Stage:
        """Return the stage of ``step``; steps beyond the plan belong to the last stage."""
        return next((stage for stage in self.stages if step <= stage.last), self.stages[-1])


def plan_stages(epochs: Sequence[int], steps_per_epoch: int, n_steps: int | None = None) -> Schedule:
    """Lay the stages out so that DomainBed's evaluations fall on their ends.

    DomainBed evaluates after step 0, after every multiple of the checkpoint frequency, and after the last step. A stage
    therefore ends at a multiple: with an epoch of 10 steps and stages of 3 and 3 epochs, MTCT takes steps 0-30 and the
    round 31-60; the first stage has one update more, the one that DomainBed evaluates as step 0.

    Args:
        epochs: of each stage, MTCT first; a 0 leaves the stage out.
        steps_per_epoch: updates that draw as many samples as the training set holds.
        n_steps: DomainBed's ``--steps``: the stages share them in proportion, rounded up; late stages may get none.

    Returns:
        the schedule; one stage of one step if there are no epochs at all (zero-shot).
    """
    wanted = [(index, count) for index, count in enumerate(epochs) if count > 0]
    if not wanted:
        return Schedule((Stage(0, 0, (n_steps or 1) - 1),), n_steps or 1, n_steps or 1)
    unit = math.gcd(*(count for _, count in wanted))  # epochs between two evaluations
    units = sum(count for _, count in wanted) // unit
    if n_steps is None:
        frequency = max(1, unit * steps_per_epoch)
        n_steps = units * frequency + 1
    else:
        frequency = max(1, math.ceil((n_steps - 1) / units))
    stages: list[Stage] = []
    first, ended = 0, 0
    for index, count in wanted:
        ended += count // unit
        last = min(ended * frequency, n_steps - 1)
        if last >= first:
            stages.append(Stage(index, first, last))
            first = last + 1
    return Schedule(tuple(stages), n_steps, frequency)
