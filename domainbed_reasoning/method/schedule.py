"""Maps the training stages to DomainBed's steps and evaluations (arXiv 2602.23777, algorithm 1).

Stage 0 is MTCT on teacher chains, stage k = 1…N is SARR's round k. The paper specifies their lengths in epochs (3 each,
N = 3); DomainBed counts steps, evaluates at fixed intervals, and ``--steps`` overrides the length of training.

An epoch here is not a pass over the data, but the number of steps that draw as many images as the source domains'
training splits contain. DomainBed's loader draws with replacement, and equally from all domains: small domains are
sampled more often than large ones, and some images are never drawn (`Epoch`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

_SOURCES = 3  # source domains in the paper's datasets: four domains, one of them held out


def name_of_stage(index: int) -> str:
    """Return a readable name of stage ``index``: 0 for MTCT on teacher chains, k for SARR's round k."""
    return f"SARR round {index}" if index else "supervised stage"


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with one source of chains.

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
        """Return the name and steps of the stage."""
        return f"{name_of_stage(self.round)} (steps {self.first}-{self.last})"


@dataclass(frozen=True)
class Schedule:
    """All stages, and the evaluation frequency with which DomainBed evaluates at the end of every stage.

    Attributes:
        stages: in order.
        n_steps: total number of updates.
        checkpoint_freq: every stage ends at a multiple of it, or at the last step.
        left_out: the rounds of the stages for which there are not enough ``--steps``.
    """

    stages: tuple[Stage, ...]
    n_steps: int
    checkpoint_freq: int
    left_out: tuple[int, ...] = ()

    def at(self, step: int) -> Stage:
        """Return the stage of ``step``; steps beyond the plan belong to the last stage."""
        return next((stage for stage in self.stages if step <= stage.last), self.stages[-1])

    def shortfall(self) -> str:
        """Return a message about stages without steps; empty if every stage has steps."""
        if not self.left_out:
            return ""
        return (
            f"--steps {self.n_steps} leaves {', '.join(map(name_of_stage, self.left_out))} without a step: training "
            f"has {len(self.stages) + len(self.left_out)} stages. Pass at least as many --steps, or omit --steps."
        )


@dataclass(frozen=True)
class Epoch:
    """The steps that draw as many images as the source domains contain, with replacement and equally from each.

    Attributes:
        sources: number of training images by source domain.
        batch_size: images drawn from each domain per step.
    """

    sources: Mapping[str, int]
    batch_size: int

    @property
    def steps(self) -> int:
        """Number of steps, rounded up."""
        return math.ceil(sum(self.sources.values()) / (self.batch_size * max(1, len(self.sources))))

    def passes(self, source: str, steps: int) -> float:
        """Return the average number of times that ``steps`` steps draw an image of the domain."""
        return steps * self.batch_size / self.sources[source]

    def missed(self, source: str, steps: int) -> float:
        """Return the expected share of the domain's images, in [0, 1], that ``steps`` steps never draw."""
        return float((1 - 1 / self.sources[source]) ** (steps * self.batch_size))

    def about(self) -> Iterator[str]:
        """Yield the sizes of an epoch and a step, with advice if the number of sources is not the paper's."""
        count, images = len(self.sources), sum(self.sources.values())
        yield (
            f"an epoch is {self.steps} steps of {self.batch_size} images from each of {count} source domains, drawn "
            f"with replacement: {self.steps * self.batch_size * count:,} draws for {images:,} training images"
        )
        if count != _SOURCES:
            same = max(1, round(_SOURCES * self.batch_size / count))
            total = self.batch_size * count
            change = f'; "batch_size": {same} makes {same * count}' if same != self.batch_size else ""
            yield (
                f"batch_size {self.batch_size} is per source domain: {total} images per step from {count}, "
                f"{_SOURCES * self.batch_size} from three as on the paper's datasets{change}"
            )

    def exposure(self, stages: Sequence[Stage]) -> Iterator[str]:
        """Yield for every stage the average draws per image of each domain, and the share that is never drawn."""
        for stage in stages:
            each = (
                f"{source} {self.passes(source, stage.steps):.1f} ({self.missed(source, stage.steps):.0%})"
                for source in self.sources
            )
            yield f"passes (never drawn) in {stage}: {', '.join(each)}"


def plan_stages(
    epochs: Sequence[int], steps_per_epoch: int, n_steps: int | None = None, every_epoch: bool = False
) -> Schedule:
    """Schedule the stages so that DomainBed evaluates at their ends.

    DomainBed evaluates after step 0, after every multiple of the checkpoint frequency, and after the last step. A stage
    therefore ends at a multiple: with an epoch of 10 steps and stages of 3 and 3 epochs, MTCT takes steps 0-30 and the
    round 31-60; the first stage has one more update, the one that DomainBed evaluates as step 0.

    ``--steps`` are divided in proportion to the epochs by largest remainder, with at least one step per stage. Ends at
    which DomainBed would not evaluate are then moved to the nearest evaluation, by at most half a checkpoint frequency.
    With fewer steps than stages, the first stages get one step each and the others are in ``left_out``.

    Args:
        epochs: of each stage, MTCT first; 0 omits the stage.
        steps_per_epoch: updates that draw as many samples as the training set contains.
        n_steps: DomainBed's ``--steps``; None or 0 if not set, as in DomainBed.
        every_epoch: whether DomainBed evaluates after every epoch, not only at the ends of stages.

    Returns:
        The schedule; a single stage of one step if all epochs are 0 (zero-shot).

    Raises:
        ValueError: if ``n_steps`` is negative.
    """
    if n_steps is not None and n_steps < 0:
        raise ValueError(f"--steps must be 1 or more; got {n_steps}.")
    planned = [(index, count) for index, count in enumerate(epochs) if count > 0]
    if not planned:
        return Schedule((Stage(0, 0, (n_steps or 1) - 1),), n_steps or 1, n_steps or 1)
    unit = 1 if every_epoch else math.gcd(*(count for _, count in planned))  # epochs between two evaluations
    if not n_steps:
        frequency = max(1, unit * steps_per_epoch)
        ends = [total // unit * frequency for total in accumulate(count for _, count in planned)]
        n_steps = ends[-1] + 1
    else:
        ends, frequency = _ends_within([count // unit for _, count in planned[:n_steps]], n_steps - 1)
    firsts = [0, *(end + 1 for end in ends)]
    stages = [Stage(index, *steps) for (index, _), *steps in zip(planned, firsts, ends, strict=False)]
    left_out = tuple(index for index, _ in planned[len(ends) :])
    return Schedule(tuple(stages), n_steps, frequency, left_out)


def _ends_within(weights: Sequence[int], last: int) -> tuple[list[int], int]:
    """Return the last step of each stage, dividing steps 0 to ``last``, and the evaluation frequency.

    The first stage has step 0 in addition to its share. Rounding the frequency up avoids an evaluation right before the
    last one; it is rounded down if a stage would otherwise have no steps.

    Args:
        weights: of each stage, positive; at most ``last + 1`` stages.
        last: number of the last step.
    """
    exact = list(accumulate(_shares(weights, last)))
    for frequency in (-(-last // sum(weights)), last // sum(weights)):
        if frequency > 1:
            ends = [(2 * end + frequency - 1) // (2 * frequency) * frequency for end in exact[:-1]] + [last]
            if all(before < after for before, after in pairwise(ends)):
                return ends, frequency
    return exact, 1


def _shares(weights: Sequence[int], steps: int) -> list[int]:
    """Divide ``steps`` by largest remainder; every stage except the first, which also has step 0, gets at least 1."""
    least = [0] + [1] * (len(weights) - 1)
    shares = [max(low, weight * steps // sum(weights)) for low, weight in zip(least, weights, strict=True)]
    places = range(len(weights))

    def lacking(place: int) -> int:
        return weights[place] * steps - shares[place] * sum(weights)

    while sum(shares) < steps:
        shares[max(places, key=lacking)] += 1
    while sum(shares) > steps:
        shares[min((place for place in places if shares[place] > least[place]), key=lacking)] -= 1
    return shares
