"""What is asked of every image: classes, the question's noun, domains, and the chains that may be learned from."""

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
    """What is asked of every image of a dataset.

    Attributes:
        dataset: name of the dataset class.
        class_names: as the prompts name them, in label order.
        environments: names of the domains, in DomainBed's order.
        test_envs: the target domains; no chain of theirs is in ``chains``.
        subject: what the images show, the noun of the question.
        labels: per environment, the label of every index.
        images: per environment, the name (path below the dataset's folder) of every index.
        chains: teacher chains of source-domain samples, by `SampleId`.
        bundle: name and SHA-256 of the bundle that chains may be from; "" where none was read.
        folder: that the names in ``images`` are below; "" where the dataset draws its images.
        schedule: stages that are laid out already; None leaves that to the algorithm.
        loaded_from: returns the DomainBed dataset whose steps the algorithm lays out; None where it is gone.
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

    def __post_init__(self) -> None:
        """Refuse chains of target domains: they must never reach training."""
        leaked = next((key for key in self.chains if key[0] in self.test_envs), None)
        if leaked is not None:
            raise ValueError(f"a chain of target domain {leaked[0]} (sample {leaked[1]}) was passed to training")
