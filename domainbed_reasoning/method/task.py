"""The task of a dataset: classes, the question's noun, domains, and the chains available for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from domainbed_reasoning.method.schedule import Schedule

SampleId = tuple[int, int]  # (environment, index within the environment)


def _nowhere() -> None:
    return None


@dataclass(frozen=True, eq=False)
class Task:
    """Names, labels, images and teacher chains of a dataset.

    Attributes:
        dataset: name of the dataset class.
        class_names: class names in the prompts, in label order.
        environments: names of the domains, in DomainBed's order.
        test_envs: the target domains, whose chains are never in ``chains``.
        subject: what the images show, the noun in the question.
        labels: per environment, the label of every index.
        images: per environment, the name (path below the dataset's folder) of every index.
        chains: teacher chains of source-domain samples, by `SampleId`.
        bundle: name and SHA-256 of the bundle used; "" if none was read.
        folder: the folder that the names in ``images`` are relative to; "" if images are rendered.
        schedule: precomputed stages; None if the algorithm schedules them.
        loaded_from: returns the DomainBed dataset whose steps the algorithm schedules; None if it no longer exists.
        offered: per environment, the labels of the classes that its questions offer, in increasing order; empty if all
            questions offer all classes.
    """

    dataset: str
    class_names: tuple[str, ...]
    environments: tuple[str, ...] = ()
    test_envs: tuple[int, ...] = ()
    subject: str = "object"
    labels: Sequence[Sequence[int]] = ()
    images: Sequence[Sequence[str]] = ()
    chains: Mapping[SampleId, str] = field(default_factory=dict)
    bundle: str = ""
    folder: str = ""
    schedule: Schedule | None = None
    loaded_from: Callable[[], Any] = _nowhere
    offered: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        """Reject chains of target domains: they must never reach training."""
        leaked = next((key for key in self.chains if key[0] in self.test_envs), None)
        if leaked is not None:
            raise ValueError(f"a chain of target domain {leaked[0]} (sample {leaked[1]}) was passed to training")

    def classes_offered(self, env: int | None = None) -> tuple[int, ...]:
        """Return the labels of the classes that the questions about an environment offer; None for all sources'."""
        if not self.offered:
            return tuple(range(len(self.class_names)))
        envs = [env] if env is not None else [one for one in range(len(self.offered)) if one not in self.test_envs]
        return tuple(sorted({label for one in envs for label in self.offered[one]}))
