"""One sentence about what a sweep found, and accuracy tables as the report prints them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pandas as pd

from domainbed_reasoning.results.tables import AVERAGE, LACKING, Table, dataset_table

_NUMBER = re.compile(r"\d+(\.\d+)?")
_FEWER_TRIALS = re.compile(r" \((\d+ of \d+ trials)\)")
FOOTNOTES = "ᵃᵇᶜᵈᵉᶠᵍʰ"


def findings(frame: pd.DataFrame) -> str:
    """Return, for each dataset, which method is best on average over the target domains and by how much.

    Args:
        frame: as `collect` returns it; empty without valid jobs.
    """
    return " ".join(_findings(frame)) if len(frame) else ""


def _findings(frame: pd.DataFrame) -> Iterator[str]:
    method = frame["selection"].iloc[0]
    first = frame[frame["selection"] == method]
    for dataset in first["dataset"].unique():
        cells = first[first["dataset"] == dataset]
        rows = dataset_table(cells, method, dataset).rows
        ranked = sorted(((float(row[-1]), row[0]) for row in rows if row[-1] != LACKING), key=lambda row: -row[0])
        if not ranked:
            yield f"On {dataset}, no method has results for all target domains yet."
            continue
        (best, name), *others = ranked
        one = " (one trial)" if cells["trial"].nunique() == 1 else ""
        if not others:
            yield f"On {dataset}, {name} has {best:.1f}% on average over the target domains{one}."
            continue
        second, runner_up = others[0]
        lead = f"{best - second:.1f} points above {runner_up}" if best > second else f"as {runner_up} has"
        erm = next((value for value, label in others[1:] if label == "ERM"), None)
        above = "" if erm is None else f" and {best - erm:.1f} above ERM"
        what = f"has the highest average over the target domains, {best:.1f}%"
        yield f"On {dataset}, {name} {what}, {lead}{above}{one}."


def for_report(table: Table, columns: int | None = None) -> Table:
    """Return an accuracy table with the best of each column in bold and numbers of trials as footnotes.

    Args:
        table: whose first column names the rows.
        columns: number of columns that are compared, the first included; None: all.
    """
    marks: dict[str, str] = {}

    def footnoted(text: str) -> str:
        if not (found := _FEWER_TRIALS.search(text)):
            return text
        if found[1] not in marks:
            if len(marks) == len(FOOTNOTES):
                return text
            marks[found[1]] = FOOTNOTES[len(marks)]
        return text.replace(found[0], marks[found[1]])

    rows = tuple((row[0], *map(footnoted, row[1:])) for row in table.rows)
    note = " ".join(filter(None, [table.note, *(f"{mark} {trials}." for trials, mark in marks.items())]))
    best = set()
    for column in range(1, columns or len(table.head)):
        values = {place: float(found[0]) for place, row in enumerate(rows) if (found := _NUMBER.match(row[column]))}
        if len(values) > 1:
            best |= {(place, column) for place, value in values.items() if value == max(values.values())}
    first = table.head.index(AVERAGE) if AVERAGE in table.head else None
    return dataclasses.replace(table, rows=rows, note=note, best=frozenset(best), first=first)
