"""A study: the sweeps that fill one table, and the stock commands that run them.

`collect_results` distinguishes jobs only by dataset, algorithm, targets and seeds. Grids with different
hyper-parameters therefore have separate folders; grids with different algorithms share one folder and one table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.images import shapes, user_datasets
from domainbed_reasoning.results import published
from domainbed_reasoning.sweeps.stock import stock_command

EMBEDDED = "ShapesReasoning"
FOUR = ("PACSReasoning", "VLCSReasoning", "OfficeHomeReasoning", "TerraIncognitaReasoning")

STUDIES = {
    name: f"domainbed_reasoning.sweeps.studies.{name}:STUDY"
    for name in (
        "main_comparison",
        "ablation",
        "sarr_rounds",
        "single_source",
        "base_to_new",
        "random_search",
        "teacher_vs_bootstrap",
    )
}


@dataclass(frozen=True)
class Grid:
    """One stock sweep.

    Attributes:
        algorithms: the rows.
        folder: below the study's; "" is the study's own.
        hparams: overrides of the defaults, which are the paper's.
        mllm: whether these are MLLM algorithms, to which the user's model and hparams apply.
        clip: whether these are CLIP algorithms, to which the user's ``clip_…`` hparams apply.
        n_hparams: draws of hyper-parameters; 1 is the defaults.
        n_trials: seeds of the splits; DomainBed's 3, the paper publishes none.
        as_long_as: default ``mtct_epochs``, ``sarr_rounds`` and ``sarr_epochs`` of RDMLDG: the grid trains MTCT for
            as many epochs in total; empty for its own schedule.
        pairs: whether pairs of domains are targets too, as required by leave-one-domain-out selection.
        steps: of every job, unless the user sets them; None for the algorithm's epochs, whose steps depend on the
            target domains: leave-one-domain-out selection compares jobs step by step.
    """

    algorithms: tuple[str, ...]
    folder: str = ""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    mllm: bool = True
    clip: bool = False
    n_hparams: int = 1
    n_trials: int = 3
    as_long_as: Mapping[str, int] = field(default_factory=dict)
    pairs: bool = False
    steps: int | None = None


@dataclass(frozen=True)
class Study:
    """One table of the paper, or an additional one.

    Attributes:
        name: its name for `study`.
        title: one line.
        claim: the hypothesis.
        paper: the published numbers and their source.
        datasets: datasets at scale `paper`.
        grids: its sweeps.
        mini: its sweeps on the embedded dataset with the embedded model.
        one_source: whether jobs train on one domain with all others as targets, which stock sweeps do not support.
        sources: numbers of these domains; empty for each in turn.
        embedded: the dataset at scale `mini`.
    """

    name: str
    title: str
    claim: str
    paper: str
    datasets: tuple[str, ...]
    grids: tuple[Grid, ...]
    mini: tuple[Grid, ...]
    one_source: bool = False
    sources: tuple[int, ...] = ()
    embedded: str = EMBEDDED

    def at(self, scale: str) -> tuple[tuple[str, ...], tuple[Grid, ...]]:
        """Return the datasets and grids of a scale, `mini` or `paper`."""
        return ((self.embedded,), self.mini) if scale == "mini" else (self.datasets, self.grids)


@dataclass(frozen=True)
class Settings:
    """The user's settings of a study.

    Attributes:
        data_dir: DomainBed's ``--data_dir``.
        output_dir: the study's folder.
        launcher: a name in DomainBed's registry of launchers.
        model: model of the MLLM algorithms; "" for the default.
        hparams: overrides of the grid's hparams for MLLM algorithms; names that start with ``clip_`` are for CLIP.
        steps: DomainBed's ``--steps``.
        n_trials: overrides the grid's.
    """

    data_dir: str
    output_dir: str
    launcher: str = "parallel"
    model: str = ""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    n_trials: int | None = None

    def hparams_of(self, grid: Grid) -> dict[str, Any]:
        """Return the ``--hparams`` of a grid."""
        of_clip = {name: value for name, value in self.hparams.items() if name.startswith("clip_")}
        of_mllms = {name: value for name, value in self.hparams.items() if name not in of_clip}
        model = {"model": self.model} if self.model else {}
        chosen = {**grid.hparams, **(model | of_mllms if grid.mllm else {}), **(of_clip if grid.clip else {})}
        stages = {name: chosen.get(name, default) for name, default in grid.as_long_as.items()}
        if stages and all(type(value) is int for value in stages.values()):  # others are rejected by name
            chosen["mtct_epochs"] = stages["mtct_epochs"] + stages["sarr_rounds"] * stages["sarr_epochs"]
        return chosen

    def steps_of(self, grid: Grid) -> int | None:
        """Return the ``--steps`` of a grid; None for the algorithm's epochs."""
        return grid.steps if self.steps is None else self.steps

    def trials_of(self, grid: Grid) -> int:
        """Return the number of trials of a grid."""
        return grid.n_trials if self.n_trials is None else self.n_trials

    def folder_of(self, grid: Grid) -> str:
        """Return the folder of a grid's jobs."""
        return str(Path(self.output_dir) / grid.folder)


def load_study(name: str) -> Study:
    """Return the study of that name.

    Raises:
        ValueError: if there is no such study; the message suggests the closest name.
    """
    if name not in STUDIES:
        raise registry.unknown("study", name, STUDIES)
    study: Study = registry.load(STUDIES[name])
    return study


def for_laptop(*grids: Grid) -> tuple[Grid, ...]:
    """Return grids for the embedded model on two cores: one trial, at most two draws."""
    return tuple(replace(grid, n_trials=1, n_hparams=min(grid.n_hparams, 2)) for grid in grids)


def domains_of(dataset: str) -> int:
    """Return the number of domains of one of our datasets, or of the user's."""
    if dataset.endswith(registry.BASE_TO_NEW):
        return 2
    if dataset == EMBEDDED:
        return len(shapes.DOMAINS)
    data = published.data_of(dataset)
    return data.domains if data is not None else len(user_datasets.find(dataset).environments)


def jobs_of(study: Study, grid: Grid, dataset: str, settings: Settings) -> int:
    """Return the number of jobs of one algorithm of a grid on a dataset."""
    domains = len(study.sources) or domains_of(dataset)
    targets = domains + (domains * (domains - 1) // 2 if grid.pairs and not study.one_source else 0)
    return targets * settings.trials_of(grid) * grid.n_hparams


def sweep_command(grid: Grid, datasets: Sequence[str], settings: Settings, what: str = "launch") -> list[str]:
    """Return the stock command that launches a grid, or runs ``delete_incomplete`` for it."""
    words = [what, "--algorithms", *grid.algorithms, "--datasets", *datasets]
    words += ["--n_hparams", str(grid.n_hparams), "--n_trials", str(settings.trials_of(grid))]
    if not grid.pairs:
        words.append("--single_test_envs")
    words += ["--command_launcher", settings.launcher, "--skip_confirmation"]
    words += ["--data_dir", settings.data_dir, "--output_dir", settings.folder_of(grid)]
    if hparams := settings.hparams_of(grid):
        words += ["--hparams", json.dumps(hparams)]
    if (steps := settings.steps_of(grid)) is not None:
        words += ["--steps", str(steps)]
    command: list[str] = stock_command("sweep", *words)
    return command


def collect_commands(grids: Sequence[Grid], settings: Settings) -> list[list[str]]:
    """Return the stock commands that print the tables, one per folder."""
    folders = dict.fromkeys(settings.folder_of(grid) for grid in grids)
    return [stock_command("collect_results", "--input_dir", folder) for folder in folders]
