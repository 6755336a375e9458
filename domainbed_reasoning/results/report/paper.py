"""Comparison of a sweep's results and settings with the paper's (arXiv 2602.23777)."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from domainbed_reasoning.registry import TWINS, rows_of
from domainbed_reasoning.results import published
from domainbed_reasoning.results.frame import mean_and_error
from domainbed_reasoning.results.job_folders import JobFolder
from domainbed_reasoning.results.tables import ABSENT, LACKING, Table, labeled_rows

_DIFFERENCE = "Ours − paper"
_EITHER = " The paper does not state which answer its zero-shot model uses: both are shown, the other at the last step."
_TRAINED_ON_CHAINS = ("ReasoningSFT", "MTCT", "SARR", "RDMLDG")
_OF_METHOD = frozenset(published.METHOD_HPARAMS)


def stock_name(dataset: str) -> str:
    """Return a dataset's name in the paper's tables."""
    return TWINS.get(dataset, dataset)


def datasets_in_paper(frame: pd.DataFrame) -> list[str]:
    """Return the datasets of a sweep that the paper reports on."""
    known = published.MAIN_RESULTS[0].accuracies
    return [name for name in frame["dataset"].unique() if stock_name(name) in known]


def accuracies(cells: pd.DataFrame, dataset: str) -> dict[str, float]:
    """Return the paper's accuracies in percent by the name of an accuracy table's row; rows without one are absent.

    Args:
        cells: rows of `collect`'s frame.
        dataset: DomainBed's name of the dataset.
    """
    found = {}
    for label, own in labeled_rows(cells):
        algorithm, ran_on = own["algorithm"].iloc[0], own["dataset"].iloc[0]
        settings = [json.loads(text) for text in own["hparams"]]
        theirs = {_accuracy(algorithm, hparams, stock_name(dataset), ran_on) for hparams in settings}
        if len(theirs) == 1 and (known := theirs.pop()) is not None:
            found[label] = known
    return found


def _accuracy(algorithm: str, hparams: Mapping[str, Any], dataset: str, ran_on: str) -> float | None:
    """Return the paper's accuracy of an algorithm with this schedule; None if it has no such row.

    RDMLDG with N rounds corresponds to the paper's N, without rounds to MTCT. The paper has neither RDMLDG nor SARR
    without the teacher stage, nor other epochs, nor any method with another objective, filter, vote or answer.

    Args:
        algorithm: DomainBed's or our name.
        hparams: of the jobs.
        dataset: of the paper's accuracy.
        ran_on: the jobs' dataset, for its default epochs.
    """
    paper = published.settings_of(algorithm)
    if any(not _same(hparams[name], paper[name]) for name in paper.keys() & hparams & _OF_METHOD):
        return None
    if hparams.get("chains") == "none" and algorithm in _TRAINED_ON_CHAINS:
        return None
    if any(_differs(name, hparams, ran_on) for name in ("mtct_epochs", "sarr_epochs")):
        return None
    rounds = hparams.get("sarr_rounds", published.PAPER_HPARAMS["sarr_rounds"])
    if algorithm in ("RDMLDG", "SARR"):
        if hparams.get("mtct_epochs") == 0:
            return None
        if algorithm == "RDMLDG" and rounds == 0:
            algorithm = "MTCT"
        elif rounds != published.PAPER_HPARAMS["sarr_rounds"]:
            of_rounds = algorithm == "RDMLDG" and dataset == "TerraIncognita"
            return published.SARR_ROUNDS.get(rounds) if of_rounds else None
    return published.result_of(algorithm, dataset)


def _differs(epochs: str, hparams: Mapping[str, Any], dataset: str) -> bool:
    """Return whether jobs have another number of epochs than by default on a dataset."""
    return epochs in hparams and hparams[epochs] != rows_of("RDMLDG")[epochs].default_on(dataset)


def add_paper_columns(table: Table, cells: pd.DataFrame, dataset: str) -> Table:
    """Return an accuracy table with the paper's average and the difference as further columns.

    Args:
        table: its last column must be the average over target domains.
        cells: the corresponding rows of `collect`'s frame.
        dataset: DomainBed's name.
    """
    published_rows = accuracies(cells, dataset)
    rows = []
    for row in table.rows:
        theirs = published_rows.get(row[0])
        published_average = ABSENT if theirs is None else f"{theirs:.2f}"
        comparable = theirs is not None and row[-1] != LACKING
        rows.append((*row, published_average, f"{float(row[-1]) - (theirs or 0.0):+.1f}" if comparable else ABSENT))
    note = f"{table.note} The paper's accuracies are averages over target domains; it reports no standard errors."
    for other in _zero_shot_otherwise(table, cells, dataset):
        theirs = published.result_of("MLLMZeroShot", stock_name(dataset))
        difference = ABSENT if theirs is None or other[-1] == LACKING else f"{float(other[-1]) - theirs:+.1f}"
        rows.append((*other, ABSENT if theirs is None else f"{theirs:.2f}", difference))
        note = f"{note.removesuffix(_EITHER)}{_EITHER}"
    return Table(table.caption, (*table.head, "Paper", _DIFFERENCE), tuple(rows), note)


def _zero_shot_otherwise(table: Table, cells: pd.DataFrame, dataset: str) -> Iterator[tuple[str, ...]]:
    """Yield the rows of zero-shot models by their other answer, if jobs recorded it."""
    domains = cells.attrs["domains"][dataset]
    for label, own in labeled_rows(cells[cells["algorithm"] == "MLLMZeroShot"]):
        judged = {json.loads(text).get("answer", "chain") for text in own["hparams"]}
        other = {"chain": "label", "label": "chain"}[judged.pop()] if len(judged) == 1 else "label"
        means = [mean_and_error(own[own["target"] == target][f"{other}_accuracy"])[0] for target in range(len(domains))]
        if not all(map(math.isnan, means)):
            texts = [LACKING if math.isnan(mean) else f"{100 * mean:.1f}" for mean in means]
            average = LACKING if LACKING in texts else f"{100 * sum(means) / len(means):.1f}"
            name = {"label": "class name", "chain": "chain"}[other]
            yield (f"{label}, by its {name}", *texts, average)


def ranking_table(table: Table, cells: pd.DataFrame, dataset: str) -> Table | None:
    """Return the ranks of the methods here and in the paper, for a dataset that the paper does not report on.

    Args:
        table: its last column must be the average over target domains.
        cells: the corresponding rows of `collect`'s frame.
        dataset: DomainBed's name.

    Returns:
        None if fewer than two rows have both an average here and an accuracy in the paper.
    """
    ours = {row[0]: float(row[-1]) for row in table.rows if row[-1] != LACKING}
    by_dataset = {name: accuracies(cells, name) for name in published.MAIN_RESULTS[0].accuracies}
    most = max(len(theirs.keys() & ours.keys()) for theirs in by_dataset.values())
    chosen = {name: theirs for name, theirs in by_dataset.items() if len(theirs.keys() & ours.keys()) == most}
    theirs = {
        label: sum(own[label] for own in chosen.values()) / len(chosen)
        for label in ours
        if all(label in own for own in chosen.values())
    }
    if len(theirs) < 2:
        return None
    both = {label: ours[label] for label in theirs}
    rows = []
    for label, average in ours.items():
        numbers = [f"{own[label]:.2f}" if label in own else ABSENT for own in chosen.values()]
        places = (_place(label, both), _place(label, theirs)) if label in both else (ABSENT, ABSENT)
        rows.append((label, f"{average:.1f}", *numbers, *places))
    head = ("Algorithm", f"{dataset}, Avg", *(f"Paper, {name}" for name in chosen), "Rank here", "Rank in the paper")
    note = "Percent; ranks among the common rows"
    several = f", in the paper by the mean over {' and '.join(chosen)}" if len(chosen) > 1 else ""
    return Table("Ranking of the methods, here and in the paper", head, tuple(rows), f"{note}{several}.")


def _place(label: str, accuracies: Mapping[str, float]) -> str:
    """Return a row's rank; rows with equal accuracies, such as those of one method in the paper, share a rank."""
    return str(1 + len({other for other in accuracies.values() if other > accuracies[label]}))


def main_results() -> Table:
    """Return the paper's main table."""
    return _results("The paper's main table", published.MAIN_RESULTS)


def ablation() -> Table:
    """Return the paper's ablation."""
    return _results("The paper's ablation", published.ABLATION, " The averages are ours: the paper reports none.")


def _results(caption: str, results: Sequence[published.Result], more: str = "") -> Table:
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
    note = "Percent, arXiv 2602.23777. “Here” is its name in DomainBed."
    return Table(caption, head, tuple(rows), f"{note}{more}")


def differing_settings(jobs: Sequence[JobFolder]) -> Table | str:
    """Return the settings of jobs that differ from the paper's; a sentence if none do, or it reports none.

    Args:
        jobs: the counted jobs.
    """
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    compared = [job for job in jobs if published.settings_of(job.args["algorithm"])]
    if not compared:
        return "The paper reports no settings for these algorithms."
    for job in compared:
        for difference in _differences(job):
            found[difference].add(job.args["algorithm"])
    if not found:
        names = ", ".join(sorted({job.args["algorithm"] for job in compared}))
        return f"These jobs use all settings that the paper reports ({names})."
    rows = [(name, theirs, here, ", ".join(sorted(who))) for (name, theirs, here), who in sorted(found.items())]
    return Table(
        "Settings that differ from the paper's",
        ("Setting", "Paper", "Here", "Algorithms"),
        tuple(rows),
        "Among the settings the paper reports. LoRA's alpha and dropout, schedule, warm-up, tiles and decoding are "
        "not published; the table of hyper-parameters has ours.",
    )


def _differences(job: JobFolder) -> Iterator[tuple[str, str, str]]:
    args, hparams = job.args, job.hparams
    if stock_name(args["dataset"]) not in published.MAIN_RESULTS[0].accuracies:
        yield "dataset", ", ".join(published.MAIN_RESULTS[0].accuracies), args["dataset"]
    settings = published.settings_of(args["algorithm"])
    for name, theirs in settings.items():
        if name in hparams and not _same(hparams[name], theirs):
            yield name, json.dumps(theirs), json.dumps(hparams[name])
    if "model" not in settings:
        if args.get("steps"):
            yield "length of training", "DomainBed's, or not reported", f"--steps {args['steps']}"
        return
    if args.get("steps"):
        yield "length of training", "epochs", f"--steps {args['steps']}, shared among the stages"
    sources, batch = _sources(job), hparams.get("batch_size", 0)
    if (
        "lr" in hparams
        and isinstance(batch, int)
        and batch
        and abs(sources * batch - published.PAPER_BATCH) > sources > 0
    ):
        here = f"{sources * batch} ({batch} from each of {sources} sources)"
        yield "images per step", str(published.PAPER_BATCH), here
    if hparams.get("data_augmentation"):
        yield "data_augmentation", "not mentioned", "DomainBed's"


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, float) and isinstance(ours, (int, float)):
        return math.isclose(ours, theirs)
    if isinstance(ours, str) and isinstance(theirs, str) and "/" in theirs:  # a local copy of a hub id
        return ours.rstrip("/").rpartition("/")[2] == theirs.rpartition("/")[2]
    return bool(ours == theirs)


def _sources(job: JobFolder) -> int:
    """Return the number of source domains of a job."""
    record: Mapping[str, Any] = job.records[-1]
    domains = sum(key.startswith("env") and key.endswith("_in_acc") for key in record)
    return domains - len(job.args["test_envs"])
