"""The DataFrame of a sweep: one row per trial of every cell, and its summary over trials."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from domainbed_reasoning.bridge import versions
from domainbed_reasoning.results import selection
from domainbed_reasoning.results.job_folders import JobFolder, read_jobs, versions_of
from domainbed_reasoning.results.problems import Problem, count_as_stock, validate_jobs
from domainbed_reasoning.results.selection import Choice

CELL = ["sweep", "dataset", "algorithm", "target", "domain", "selection"]
_ONE_SOURCE = ("sweep", "dataset", "algorithm", "source", "target", "trial", "accuracy", "step", "folder")
_HEAD = [*CELL, "trial", "accuracy", "validation", "hparams_seed", "step", "last_step"]
# Column → its name in answers.json.
_ANSWERS = {
    "label_accuracy": "label",
    "chain_accuracy": "chain",
    "chain_or_label_accuracy": "chain_or_label",
    "unparsed": "unparsed",
    "well_formed": "well_formed",
}
_COSTS = ["train_seconds", "wall_seconds", "memory_gib"]


def collect(folder: str | os.PathLike[str], *, as_stock: bool = False) -> pd.DataFrame:
    """Return a sweep's results, one row per trial and selection method of every cell.

    Columns:
        sweep: name of the sweep's folder; empty if ``folder`` is a sweep itself.
        dataset, algorithm, target, domain: the cell; ``target`` is the number, ``domain`` the name.
        selection: DomainBed's name of the selection method.
        trial: trial seed.
        accuracy: of the selected step in the target domain, in [0, 1]; by the algorithm's answer.
        validation: the accuracy by which it was selected, in [0, 1].
        hparams_seed, step: the selected run and step.
        last_step: of the selected run, at which the next five columns were measured.
        label_accuracy, chain_accuracy: of both answers in the target domain, in [0, 1]; missing if not computed.
        chain_or_label_accuracy: of the chain, or of the class name if the chain names no class, in [0, 1].
        unparsed: share of chains that name no class, in [0, 1]; wrong answers in ``chain_accuracy``.
        well_formed: share of chains with all five stages in order, each closed, in [0, 1].
        sarr1_accepted, …: share of self-generated chains that the round kept, in [0, 1].
        sarr1_well_formed, …: share of these that are well formed, in [0, 1].
        train_seconds: of all updates of the selected run.
        wall_seconds: of its job, by file times from the oldest file to `done`; missing if less than
            ``train_seconds``, e.g. after a copy that did not preserve times.
        memory_gib: peak GPU memory; missing on a CPU.
        hparams: of the selected run, as JSON.
        version: of domainbed-reasoning when the job ran, with the commit of a checkout; missing if not recorded.
        folder: of its job.

    Rows are in the order of DomainBed's tables; the index is the order in which DomainBed reads them.
    ``attrs["problems"]`` lists excluded and repaired jobs as dictionaries (see `problems.Problem`);
    ``attrs["domains"]`` maps each dataset to the names of its domains; ``attrs["versions"]`` maps each software to the
    number of jobs per version. ``attrs["one_source"]`` lists the jobs with a single source domain as dictionaries, as
    no selection method of DomainBed supports them; ``attrs["base_to_new"]`` those on base-to-new datasets, with their
    accuracies on base and new classes. ``attrs["as_stock"]`` is ``as_stock``.

    Args:
        folder: of a sweep, or of several sweeps.
        as_stock: count incomplete jobs, repeated records and repeated jobs like DomainBed's collect_results; only
            lines of results.jsonl on which it fails, and jobs with impossible values there, are left out.

    Raises:
        ValueError: if the folder contains no jobs, or DomainBed cannot be imported.
    """
    selection.require_domainbed()
    jobs = read_jobs(folder)
    counted, problems = validate_jobs(jobs)
    if as_stock:
        counted, problems = count_as_stock(jobs, problems)
    frame = tabulate(counted, problems)
    frame.attrs["as_stock"] = as_stock
    return frame


def tabulate(jobs: Sequence[JobFolder], problems: Sequence[Problem] = ()) -> pd.DataFrame:
    """Return the rows of `collect` for valid jobs.

    Args:
        jobs: valid jobs.
        problems: for ``attrs``.
    """
    domains = {name: selection.domains_of(name, jobs) for name in {job.args["dataset"] for job in jobs}}
    sweeps = dict.fromkeys(job.sweep for job in jobs)
    choices = [one for sweep in sweeps for one in selection.choose([job for job in jobs if job.sweep == sweep])]
    rows = [_row(choice, domains[choice.dataset]) for choice in choices]
    rounds = sorted({key for row in rows for key in row if is_of_round(key)}, key=_place_of_round)
    columns = [*_HEAD, *_ANSWERS, *rounds, *_COSTS, "hparams", "version", "folder"]
    frame = pd.DataFrame(rows, columns=columns)
    if rows:
        frame = _sorted(frame)
    frame.attrs["domains"] = domains
    frame.attrs["one_source"] = [
        {
            "sweep": one.job.sweep,
            "dataset": one.job.args["dataset"],
            "algorithm": one.job.args["algorithm"],
            "source": one.source,
            "trial": one.job.args["trial_seed"],
            "hparams_seed": one.job.args["hparams_seed"],
            "accuracy": one.accuracy,
            "accuracies": dict(one.accuracies),
            "step": one.step,
            "folder": str(one.job.folder),
        }
        for one in selection.one_source(jobs)
    ]
    by_validation = selection.methods()[0].name
    frame.attrs["base_to_new"] = list(selection.base_to_new(one for one in choices if one.method == by_validation))
    frame.attrs["problems"] = [vars(problem) for problem in problems]
    frame.attrs["versions"] = {name: dict(counts) for name, counts in versions_of(jobs).items()}
    return frame


def _row(choice: Choice, domains: Sequence[str]) -> dict[str, Any]:
    job = choice.job
    answers = ((job.answers or {}).get(f"env{choice.target}") or {}).get("in") or {}
    wall, train = job.wall_seconds, job.train_seconds
    return {
        "sweep": job.sweep,
        "dataset": choice.dataset,
        "algorithm": choice.algorithm,
        "target": choice.target,
        "domain": domains[choice.target],
        "selection": choice.method,
        "trial": choice.trial,
        "accuracy": choice.accuracy,
        "validation": choice.validation,
        "hparams_seed": choice.record["args"]["hparams_seed"],
        "step": choice.record["step"],
        "last_step": max(record["step"] for record in job.records),
        **{column: _number(answers.get(name)) for column, name in _ANSWERS.items()},
        **{key: float(value) for key, value in job.records[-1].items() if is_of_round(key)},
        "train_seconds": _number(train),
        "wall_seconds": _number(None if wall is None or wall < (train or 0.0) else wall),
        "memory_gib": _number(job.memory_gib),
        "hparams": json.dumps(choice.record.get("hparams") or {}, sort_keys=True),
        "version": job.versions.get(versions.OURS),
        "folder": job.path,
    }


def is_of_round(column: object, what: str = "accepted|well_formed") -> bool:
    """Return whether a column is ``accepted`` or ``well_formed`` of a SARR round."""
    return re.fullmatch(rf"sarr[0-9]+_({what})", str(column)) is not None


def _place_of_round(column: str) -> tuple[str, int]:
    number, _, what = column.removeprefix("sarr").partition("_")
    return what, int(number)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in the order of DomainBed's tables; the index keeps the order in which DomainBed reads them."""
    place = {
        "dataset": selection.order_of_datasets(list(frame["dataset"])),
        "algorithm": selection.order_of_algorithms(list(frame["algorithm"])),
        "selection": [method.name for method in selection.methods()],
    }

    def key(column: pd.Series[Any]) -> pd.Series[Any]:
        return column.map(place[str(column.name)].index) if column.name in place else column

    by = ["selection", "dataset", "algorithm", "sweep", "target", "trial"]
    return frame.sort_values(by, key=key, kind="stable")


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard error over the trials of every cell, in the units of ``frame``.

    Each numeric column of ``frame`` becomes two, the second with the suffix ``_error``; ``trials`` counts trials. The
    error is DomainBed's: the standard deviation (dividing by n, not n - 1) over √n. With one trial it is missing, or 0
    as in DomainBed if ``frame`` was collected ``as_stock``.

    Args:
        frame: from `collect`.
    """
    numbers = ["accuracy", "validation", *_ANSWERS, *(name for name in frame if is_of_round(name)), *_COSTS]
    rows = []
    for key, cell in frame.groupby(CELL, sort=False):
        row: dict[str, Any] = {**dict(zip(CELL, key, strict=True)), "trials": len(cell)}
        for name in numbers:
            values = in_reading_order(cell)[name]
            row[name], error = mean_and_error(values)
            row[f"{name}_error"] = error if values.count() > 1 or frame.attrs.get("as_stock") else math.nan
        rows.append(row)
    errors = [column for name in numbers for column in (name, f"{name}_error")]
    table = pd.DataFrame(rows, columns=[*CELL, "trials", *errors])
    table.attrs["problems"] = frame.attrs.get("problems", [])
    return table


def in_reading_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a frame's rows in the order in which DomainBed reads them, as it affects the last digit of sums."""
    return rows.sort_index()


def mean_and_error(values: Sequence[float] | pd.Series[Any]) -> tuple[float, float]:
    """Return mean and standard error as in DomainBed's collect_results; missing values are ignored."""
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=float)
    if not len(known):
        return math.nan, math.nan
    return float(np.mean(known)), float(np.std(known / np.sqrt(len(known))))


def one_source_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the jobs trained on a single domain, one row per job and other domain.

    Args:
        frame: as `collect` returns it.

    Returns:
        Columns: sweep, dataset, algorithm, source and target (names of domains), trial, accuracy (in [0, 1], at the
        step that is best on the source's validation split), step, folder.
    """
    rows = []
    for job in frame.attrs["one_source"]:
        names = frame.attrs["domains"][job["dataset"]]
        cell = {name: job[name] for name in ("sweep", "dataset", "algorithm")} | {"source": names[job["source"]]}
        for target, accuracy in job["accuracies"].items():
            found = {"target": names[target], "trial": job["trial"], "accuracy": accuracy}
            rows.append({**cell, **found, "step": job["step"], "folder": job["folder"]})
    return pd.DataFrame(rows, columns=_ONE_SOURCE)
