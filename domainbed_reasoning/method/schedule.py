"""The stages of training, laid out over DomainBed's steps and evaluations (arXiv 2602.23777, algorithm 1).

Stage 0 is MTCT on the teacher's chains, stage k = 1…N is SARR's round k. The paper gives them in epochs (3 each,
N = 3); DomainBed counts steps, evaluates at fixed intervals, and lets ``--steps`` overrule everything.

An epoch here is no pass over the data, but as many steps as draw as many images as the training splits of the source
domains hold. DomainBed's loader draws with replacement, and the same number from every domain: a small domain is passed
over more often than a large one, and some images are never drawn (`Epoch`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

_SOURCES = 3  # of the paper's datasets, four domains each with one left out


def name_of_stage(index: int) -> str:
    """Return what a person calls stage ``index``: 0 for MTCT on teacher chains, k for SARR's round k."""
    return f"SARR round {index}" if index else "supervised stage"


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
        return f"{name_of_stage(self.round)} (steps {self.first}-{self.last})"


@dataclass(frozen=True)
class Schedule:
    """All stages, and how often DomainBed has to evaluate so that it does so at every stage's end.

    Attributes:
        stages: in order.
        n_steps: updates in all.
        checkpoint_freq: every stage ends at a multiple of it, or at the last step.
        left_out: the rounds of the stages that ``--steps`` are too few for.
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
    """As many steps as draw as many images as the source domains hold, drawn with replacement, equally from each.

    Attributes:
        sources: number of training images by source domain.
        batch_size: images that a step draws from each.
    """

    sources: Mapping[str, int]
    batch_size: int

    @property
    def steps(self) -> int:
        """Number of steps, rounded up."""
        return math.ceil(sum(self.sources.values()) / (self.batch_size * max(1, len(self.sources))))

    def passes(self, source: str, steps: int) -> float:
        """Return how often ``steps`` draw an image of the domain, on average."""
        return steps * self.batch_size / self.sources[source]

    def missed(self, source: str, steps: int) -> float:
        """Return the share of the domain's images, in [0, 1], that ``steps`` are expected never to draw."""
        return float((1 - 1 / self.sources[source]) ** (steps * self.batch_size))

    def about(self) -> Iterator[str]:
        """Yield what an epoch and a step are, and what to do where the default batch is not for so many sources."""
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
                f"batch_size {self.batch_size} is per source domain: {total} images a step from {count}, "
                f"{_SOURCES * self.batch_size} from three as on the paper's datasets{change}"
            )

    def exposure(self, stages: Sequence[Stage]) -> Iterator[str]:
        """Yield for every stage how often each domain is passed over, and the share of it that is never drawn."""
        for stage in stages:
            each = (
                f"{source} {self.passes(source, stage.steps):.1f} ({self.missed(source, stage.steps):.0%})"
                for source in self.sources
            )
            yield f"passes (never drawn) in {stage}: {', '.join(each)}"


def plan_stages(epochs: Sequence[int], steps_per_epoch: int, n_steps: int | None = None) -> Schedule:
    """Lay out the stages so that DomainBed's evaluations coincide with their ends.

    DomainBed evaluates after step 0, after every multiple of the checkpoint frequency, and after the last step. A stage
    therefore ends at a multiple: with an epoch of 10 steps and stages of 3 and 3 epochs, MTCT takes steps 0-30 and the
    round 31-60; the first stage has one update more, the one that DomainBed evaluates as step 0.

    ``--steps`` are shared in proportion to the epochs by largest remainder, each stage getting one step at least. An
    end at which DomainBed would not evaluate is then moved to the nearest evaluation, by half a checkpoint frequency at
    most. With fewer steps than stages the first stages get one each and the others are in ``left_out``.

    Args:
        epochs: of each stage, MTCT first; a 0 leaves the stage out.
        steps_per_epoch: updates that draw as many samples as the training set holds.
        n_steps: DomainBed's ``--steps``; None or 0, as for DomainBed, means none were given.

    Returns:
        the schedule; one stage of one step if there are no epochs at all (zero-shot).

    Raises:
        ValueError: for fewer than 0 steps.
    """
    if n_steps is not None and n_steps < 0:
        raise ValueError(f"--steps must be 1 or more; got {n_steps}.")
    planned = [(index, count) for index, count in enumerate(epochs) if count > 0]
    if not planned:
        return Schedule((Stage(0, 0, (n_steps or 1) - 1),), n_steps or 1, n_steps or 1)
    unit = math.gcd(*(count for _, count in planned))  # epochs between two evaluations
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
    """Return the last steps of stages that share steps 0 to ``last``, and the frequency of the evaluations.

    The first stage has step 0 beside its share. Rounded up, the frequency spares an evaluation just before the last;
    it is rounded down where a stage would be left without a step.

    Args:
        weights: of each stage, above 0; ``last + 1`` stages at most.
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
    """Share ``steps`` by largest remainder; every stage but the first, which has step 0 as well, gets 1 at least."""
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
