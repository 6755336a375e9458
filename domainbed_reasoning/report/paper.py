"""The paper's numbers and settings beside a sweep's (arXiv 2602.23777)."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from domainbed_reasoning import published
from domainbed_reasoning.collect.jobs import Job
from domainbed_reasoning.collect.tables import ABSENT, LACKING, Table
from domainbed_reasoning.registry import ALGORITHMS, TWINS

_DIFFERENCE = "Ours − paper"


def stock_name(dataset: str) -> str:
    """Return the name that the paper's tables know a dataset by."""
    return TWINS.get(dataset, dataset)


def reported(frame: pd.DataFrame) -> list[str]:
    """Return the datasets of a sweep that the paper reports on."""
    known = published.MAIN_RESULTS[0].accuracies
    return [name for name in frame["dataset"].unique() if stock_name(name) in known]


def beside(table: Table, dataset: str) -> Table:
    """Return an accuracy table with the paper's average and the difference as further columns.

    Args:
        table: whose last column is the average over target domains.
        dataset: DomainBed's name.
    """
    rows = []
    for row in table.rows:
        theirs = published.result_of(row[0].partition(" (")[0], stock_name(dataset))
        said = ABSENT if theirs is None else f"{theirs:.2f}"
        comparable = theirs is not None and row[-1] != LACKING
        rows.append((*row, said, f"{float(row[-1]) - (theirs or 0.0):+.1f}" if comparable else ABSENT))
    note = f"{table.note} The paper's accuracies are averages over target domains; it gives no errors."
    return Table(table.caption, (*table.head, "Paper", _DIFFERENCE), tuple(rows), note)


def main_results() -> Table:
    """Return the paper's main table."""
    return _results("The paper's main table", published.MAIN_RESULTS)


def ablation() -> Table:
    """Return the paper's ablation."""
    return _results("The paper's ablation", published.ABLATION)


def _results(caption: str, results: Sequence[published.Result]) -> Table:
    head = ("Method", "Here", "Backbone", *results[0].accuracies, "Avg")
    rows = [
        (
            result.method,
            result.algorithm or ABSENT,
            result.backbone,
            *(f"{value:.2f}" for value in result.accuracies.values()),
            f"{result.average:.2f}",
        )
        for result in results
    ]
    return Table(
        caption, head, tuple(rows), "Percent, arXiv 2602.23777. “Here” is the name that DomainBed knows it by."
    )


def differing_settings(jobs: Sequence[Job]) -> Table | None:
    """Return the settings of the MLLM algorithms' jobs that are not the paper's; None where all are.

    Args:
        jobs: that count.
    """
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for job in jobs:
        for difference in _differences(job):
            found[difference].add(job.args["algorithm"])
    if not found:
        return None
    rows = [(name, theirs, here, ", ".join(sorted(who))) for (name, theirs, here), who in sorted(found.items())]
    return Table(
        "Settings that differ from the paper's",
        ("Setting", "Paper", "Here", "Algorithms"),
        tuple(rows),
        "Of the settings that the paper gives. LoRA's alpha and dropout, schedule, warm-up, tiles and decoding are not "
        "published; the table of hyper-parameters has ours.",
    )


def _differences(job: Job) -> Iterator[tuple[str, str, str]]:
    args, hparams = job.args, job.hparams
    if stock_name(args["dataset"]) not in published.MAIN_RESULTS[0].accuracies:
        yield "dataset", ", ".join(published.MAIN_RESULTS[0].accuracies), args["dataset"]
    if args["algorithm"] not in ALGORITHMS or "model" not in hparams:
        return
    for name, theirs in published.PAPER_HPARAMS.items():
        if name in hparams and not _same(hparams[name], theirs):
            yield name, json.dumps(theirs), json.dumps(hparams[name])
    if args.get("steps"):
        yield "length of training", "epochs", f"--steps {args['steps']}, shared among the stages"
    sources = _sources(job)
    if sources and "lr" in hparams and abs(sources * hparams["batch_size"] - published.PAPER_BATCH) > sources:
        here = f"{sources * hparams['batch_size']} ({hparams['batch_size']} from each of {sources} sources)"
        yield "images a step", str(published.PAPER_BATCH), here
    if hparams.get("data_augmentation"):
        yield "data_augmentation", "not mentioned", "DomainBed's"


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, float) and isinstance(ours, (int, float)):
        return math.isclose(ours, theirs)
    if isinstance(ours, str) and isinstance(theirs, str) and "/" in theirs:  # a local copy of a hub id
        return ours.rstrip("/").rpartition("/")[2] == theirs.rpartition("/")[2]
    return bool(ours == theirs)


def _sources(job: Job) -> int:
    """Return the number of source domains of a job."""
    record: Mapping[str, Any] = job.records[-1]
    domains = sum(key.startswith("env") and key.endswith("_in_acc") for key in record)
    return domains - len(job.args["test_envs"])
