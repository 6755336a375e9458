"""Accuracy of every class in the target domains, and which classes are confused, from the jobs' predictions.jsonl."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from domainbed_reasoning.results.job_folders import JobFolder
from domainbed_reasoning.results.report.blocks import Block, Details
from domainbed_reasoning.results.report.examples import predictions_of
from domainbed_reasoning.results.tables import ABSENT, Table, chosen_runs, labeled_rows

_NO_CLASS = "no class"
_MATRIX = 12  # classes that a whole matrix has room for
_PAIRS = 15  # confusions that are listed where there are more classes

# For each domain, (true class, answer) → number of images.
Counts = Mapping[str, Counter[tuple[str, str]]]


def class_blocks(frame: pd.DataFrame, counted: Sequence[JobFolder]) -> Iterator[Block]:
    """Yield, for each dataset, the accuracy per class of every algorithm with predictions, and its confusions.

    Args:
        frame: as `collect` returns it.
        counted: its jobs.
    """
    jobs = {job.path: job for job in counted}
    chosen = chosen_runs(frame)
    for dataset in chosen["dataset"].unique():
        own = chosen[chosen["dataset"] == dataset]
        by_label = {label: _count(cells, jobs) for label, cells in labeled_rows(own)}
        by_label = {label: counts for label, counts in by_label.items() if counts}
        if by_label:
            yield _accuracies(dataset, by_label)
            for label, counts in by_label.items():
                yield Details(f"{label} on {dataset}: by domain, and confusions", (*_of_one(label, counts),))


def judged_answer(row: Mapping[str, Any], hparams: Mapping[str, Any]) -> str:
    """Return the class that DomainBed's accuracy counts as the answer, or ``no class``.

    Args:
        row: a line of predictions.jsonl.
        hparams: of the job.
    """
    by_chain, by_label = row["chain_answer"], row["label_answer"]
    if hparams.get("answer") == "label":
        return str(by_label or _NO_CLASS)
    strict = hparams.get("on_parse_failure") == "wrong" and row["chain"] is not None  # CLIP writes no chains
    return str(by_chain or (None if strict else by_label) or _NO_CLASS)


def _count(cells: pd.DataFrame, jobs: Mapping[str, JobFolder]) -> Counts:
    """Return the answers at the last step of the chosen jobs, of the images that DomainBed's accuracy is over."""
    counts: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for target, domain, folder in cells[["target", "domain", "folder"]].drop_duplicates().itertuples(index=False):
        job = jobs.get(folder)
        if job is None or len(job.args["test_envs"]) != 1:
            continue
        for row in predictions_of(job, target, []):
            if row.get("split", "in") == "in" and (row["chain_answer"] or row["label_answer"] or row["chain"]):
                counts[domain][row["label"], judged_answer(row, job.hparams)] += 1
    return counts


def _accuracies(dataset: str, by_label: Mapping[str, Counts]) -> Table:
    """Return the accuracy per class over all target domains, one column per algorithm."""
    pooled = {label: sum(counts.values(), Counter()) for label, counts in by_label.items()}
    rows = [
        (
            true,
            *(_accuracy(counts, true) for counts in pooled.values()),
            str(max(_size(c, true) for c in pooled.values())),
        )
        for true in _classes(*pooled.values())
    ]
    return Table(
        f"{dataset}: accuracy per class, over all target domains",
        ("Class", *pooled, "Images"),
        tuple(rows),
        "Percent at the last step, pooled over target domains and trials; “Images” counts answers. Baselines record no "
        "answers to single images.",
    )


def _of_one(label: str, counts: Counts) -> Iterator[Table]:
    pooled = sum(counts.values(), Counter())
    classes = _classes(pooled)
    if len(counts) > 1:
        rows = [(true, *(_accuracy(own, true) for own in counts.values()), _accuracy(pooled, true)) for true in classes]
        head = ("Class", *counts, "All")
        yield Table(f"{label}: accuracy per class and target domain", head, tuple(rows), "Percent.")
    answers = sorted({answer for _, answer in pooled} - {*classes, _NO_CLASS})
    if len(classes) <= _MATRIX and len(answers) <= _MATRIX:
        columns = [*classes, *answers, *([_NO_CLASS] if any(a == _NO_CLASS for _, a in pooled) else [])]
        rows = [(true, *(_share(pooled, true, answer) for answer in columns)) for true in classes]
        note = "Percent of a class's images (rows) that were answered with each class (columns)."
        yield Table(f"{label}: confusion", ("True class", *columns), tuple(rows), note)
        return
    wrong = [(pair, count) for pair, count in pooled.most_common() if pair[0] != pair[1]][:_PAIRS]
    rows = [(true, answer, str(count), _share(pooled, true, answer)) for (true, answer), count in wrong]
    if rows:
        head = ("True class", "Answer", "Images", "% of the class")
        yield Table(f"{label}: the most frequent confusions", head, tuple(rows))


def _classes(*counts: Counter[tuple[str, str]]) -> list[str]:
    return sorted({true for own in counts for true, _ in own})


def _size(counts: Counter[tuple[str, str]], true: str) -> int:
    return sum(count for (label, _), count in counts.items() if label == true)


def _accuracy(counts: Counter[tuple[str, str]], true: str) -> str:
    return f"{100 * counts[true, true] / size:.1f}" if (size := _size(counts, true)) else ABSENT


def _share(counts: Counter[tuple[str, str]], true: str, answer: str) -> str:
    count = counts[true, answer]
    return f"{100 * count / _size(counts, true):.1f}" if count else ABSENT
