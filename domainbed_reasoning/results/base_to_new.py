"""Base-to-new generalization: accuracies on base and new classes, and their harmonic mean.

The accuracy on base classes is DomainBed's training-domain validation accuracy, which also selects the step; that on
new classes is its target accuracy. As in base-to-new papers, H is the harmonic mean of both averages over trials.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from domainbed_reasoning.results import published
from domainbed_reasoning.results.frame import mean_and_error
from domainbed_reasoning.results.selection import order_of_datasets, order_of_rows
from domainbed_reasoning.results.tables import ABSENT, Table, row_label, with_error

_ANSWERS = {"": "", "label_": " by class name", "chain_": " by chain"}  # beginnings of keys, ends of column heads


def harmonic_mean(base: float, new: float) -> float:
    """Return the harmonic mean of two accuracies in [0, 1]; 0 if one is 0."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def base_to_new_tables(frame: pd.DataFrame) -> list[Table]:
    """Return one table per base-to-new dataset; [] without any.

    Args:
        frame: as `collect` returns it.
    """
    jobs = frame.attrs.get("base_to_new", [])
    return [
        _table(dataset, [job for job in jobs if job["dataset"] == dataset])
        for dataset in order_of_datasets([job["dataset"] for job in jobs])
    ]


def _table(dataset: str, jobs: list[dict[str, Any]]) -> Table:
    rows = []
    for algorithm, sweep in order_of_rows(jobs):
        own = [job for job in jobs if (job["algorithm"], job["sweep"]) == (algorithm, sweep)]
        cells = [cell for answer in _ANSWERS for cell in _cells(own, answer)]
        rows.append((row_label(algorithm, sweep, dataset), *cells))
    head = [f"{name}{how}" for how in _ANSWERS.values() for name in ("Base classes", "New classes", "H")]
    error = "Mean ± standard error over trials." if len({job["trial"] for job in jobs}) > 1 else "One trial."
    before, ours = published.BASE_TO_NEW["before"], published.BASE_TO_NEW["RDMLDG"]
    note = (
        "Percent. H: harmonic mean of both averages. Base classes: the validation split, which also selects the step. "
        f"By class name and by chain: both answers at the last step, a chain that names no class being wrong. {error} "
        f"The paper reports on {published.BASE_TO_NEW_DATASET} H {before[1]:.2f} → {ours[1]:.2f} and new classes "
        f"{before[0]:.2f} → {ours[0]:.2f} through RD-MLDG."
    )
    return Table(f"{dataset}: trained on base classes, tested on new ones", ("Algorithm", *head), tuple(rows), note)


def _cells(jobs: list[dict[str, Any]], answer: str) -> tuple[str, str, str]:
    """Return the texts of base accuracy, new accuracy and H by one answer."""
    pairs = [(job[f"{answer}base"], job[f"{answer}new"]) for job in jobs]
    known = [(base, new) for base, new in pairs if base is not None and new is not None]
    if not known:
        return ABSENT, ABSENT, ABSENT
    base, new = (mean_and_error(values) for values in zip(*known, strict=True))
    harmonic = harmonic_mean(base[0], new[0])
    return with_error(*base, len(known)), with_error(*new, len(known)), f"{100 * harmonic:.1f}"
