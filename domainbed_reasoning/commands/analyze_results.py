"""Shared by all analyses: opening a job and its data, and writing tables, text and plot."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning import plot_styles
from domainbed_reasoning.analysis.checkpoints import Checkpoint
from domainbed_reasoning.analysis.data import AnalysisData, data_of_job
from domainbed_reasoning.analysis.results import Results, results_at
from domainbed_reasoning.analysis.tables import as_text, write_csv
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.jobs.trained import TrainedJob


def job_of(checkpoint: Checkpoint) -> TrainedJob:
    """Return the job that trained a checkpoint.

    Raises:
        ValueError: if it is a base model.
    """
    if checkpoint.job is None:
        raise ValueError(
            f"{checkpoint.name} is not a job folder. Pass an output folder of DomainBed's train or sweep with an MLLM "
            "algorithm, or a checkpoint in it."
        )
    return checkpoint.job


def data_for(args: argparse.Namespace, checkpoint: Checkpoint, chains: bool | str) -> AnalysisData:
    """Return a job's data, from --data-dir and --model if they have moved."""
    return data_of_job(job_of(checkpoint), args.data_dir, chains=chains, model=args.model)


def results_for(args: argparse.Namespace, name: str, *of: Checkpoint) -> Results:
    """Return the output folder: --output, or `analysis` beside the first of the jobs ``of``."""
    beside = job_of(of[0]).folder.resolve().parent / "analysis" if of else Path("analysis")
    command = args.command_line.replace(" --json", "")  # which writes the same files
    return dataclasses.replace(results_at(args.output or beside, name, command), as_json=args.json)


def write(
    results: Results,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    findings: Sequence[str],
    paper: str,
    shown: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Print the table, the findings and the paper's numbers; write the rows as CSV and the rest as text."""
    summary = "\n".join([*findings, paper])
    if results.as_json:
        found = {"title": title, "rows": list(map(dict, rows)), "findings": list(findings), "paper": paper}
        arguments.print_json(found | {"files": [results.path(suffix) for suffix in (".txt", ".csv")]})
    else:
        print(f"\n{title}\n\n{as_text(rows if shown is None else shown)}\n\n{summary}\n")
    leave(results, title, rows, summary)
    note(results, f"Wrote {results.path('.txt')}\nWrote {results.path('.csv')}")


def note(results: Results, text: str) -> None:
    """Print a message; to standard error if standard output is for JSON."""
    print(text, file=sys.stderr if results.as_json else sys.stdout, flush=True)


def leave(results: Results, title: str, rows: Sequence[Mapping[str, Any]], summary: str) -> None:
    """Write the rows as CSV and the rest as text."""
    arguments.write_text(results.path(".txt"), results.text(f"{title}\n{summary}"))
    write_csv(results.path(".csv"), rows)


def plot(results: Results, draw: Callable[[Path], None]) -> None:
    """Write the plot if matplotlib is installed; otherwise print how to install it."""
    if not plot_styles.has_matplotlib():
        note(results, "No plot: matplotlib is not installed. Run pip install 'domainbed-reasoning[plots]'.")
        return
    draw(results.path(".png"))
    note(results, f"Wrote {results.path('.png')}")
