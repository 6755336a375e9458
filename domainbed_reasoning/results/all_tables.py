"""The tables of a sweep in the order in which `collect` prints them."""

from __future__ import annotations

import pandas as pd

from domainbed_reasoning.results.base_to_new import base_to_new_tables
from domainbed_reasoning.results.tables import (
    Table,
    accuracy_tables,
    answers_table,
    costs_table,
    hparams_table,
    one_source_tables,
    problems_table,
    rounds_table,
    versions_table,
)


def all_tables(frame: pd.DataFrame) -> list[Table]:
    """Return every table of a sweep; without valid jobs only those of problems."""
    problems = problems_table(frame.attrs.get("problems", []))
    about: list[Table | None] = [costs_table(frame), hparams_table(frame)] if len(frame) else []
    about += [versions_table(frame), problems]
    return [*result_tables(frame), *(table for table in about if table is not None)]


def result_tables(frame: pd.DataFrame) -> list[Table]:
    """Return the tables of accuracies, answers and self-labeling; [] without valid jobs."""
    found: list[Table | None] = [*one_source_tables(frame), *base_to_new_tables(frame)]
    if len(frame):
        found += [*accuracy_tables(frame), answers_table(frame), rounds_table(frame)]
    return [table for table in found if table is not None]
