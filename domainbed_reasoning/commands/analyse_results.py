"""What all analyses share: the job and its data at the beginning, tables, text and plot at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.analysis import plots
from domainbed_reasoning.analysis.checkpoints import Checkpoint
from domainbed_reasoning.analysis.data import AnalysisData, data_of_job
from domainbed_reasoning.analysis.results import Results, results_at
from domainbed_reasoning.analysis.tables import as_text, write_csv
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.jobs.trained import TrainedJob


def job_of(checkpoint: Checkpoint) -> TrainedJob:
    """Return what trained a checkpoint.

    Raises:
        ValueError: where nothing did.
    """
    if checkpoint.job is None:
        raise ValueError(
            f"{checkpoint.name} is no folder of a job: give one that DomainBed's train or sweep wrote with an MLLM "
            "algorithm, or a checkpoint in it."
        )
    return checkpoint.job


def data_for(given: argparse.Namespace, checkpoint: Checkpoint, chains: bool | str) -> AnalysisData:
    """Return a job's data, found where the command says they are now."""
    return data_of_job(job_of(checkpoint), given.data_dir, chains=chains, model=given.model)


def results_for(given: argparse.Namespace, name: str, *of: Checkpoint) -> Results:
    """Return where files go: --output, else the folder `analysis` beside the first of the jobs that they are of."""
    beside = job_of(of[0]).folder.resolve().parent / "analysis" if of else Path("analysis")
    return results_at(given.output or beside, name, given.command)


def write(
    results: Results,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[str],
    paper: str,
    shown: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print the table, what is found in it and the paper's numbers; leave rows as CSV and the rest as text."""
    said = "\n".join([*found, paper])
    print(f"\n{title}\n\n{as_text(rows if shown is None else shown)}\n\n{said}\n")
    leave(results, title, rows, said)
    print(f"written: {results.path('.txt')}\nwritten: {results.path('.csv')}")


def leave(results: Results, title: str, rows: Sequence[Mapping[str, Any]], said: str) -> None:
    """Write the rows as CSV and the rest as text."""
    arguments.write_text(results.path(".txt"), results.text(f"{title}\n{said}"))
    write_csv(results.path(".csv"), rows)


def plot(results: Results, draw: Callable[[Path], None]) -> None:
    """Draw the plot where matplotlib is there; say so where it is not."""
    if not plots.plots_are_there():
        print("no plot, matplotlib is missing: pip install 'domainbed-reasoning[plots]'")
        return
    draw(results.path(".png"))
    print(f"drawn: {results.path('.png')}")
