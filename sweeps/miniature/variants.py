"""The search for a variant that beats the paper's RD-MLDG in both regimes of `regimes`.

    python -m domainbed_reasoning.sweeps.miniature --study regimes --search    pick a variant by source validation
    python -m domainbed_reasoning.sweeps.miniature --study regimes --test      run the picked variant on held-out seeds

Every candidate takes RD-MLDG's 244 updates at RD-MLDG's learning rate of the regime; balanced ones at that of "RDMLDG
balanced". ``--search`` runs them as the learning-rate grid does, with trial seed 0 and two target domains; jobs of the
grid are shared. It picks the candidate whose gain over RD-MLDG in source validation, in the regime where that gain is
smaller, is the largest, and writes ``variant.json`` into the output folder. ``--test`` runs it with seeds 1 to 3 and
all targets, and ``--table`` compares these jobs with those of the main table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.sweeps.miniature import regimes
from domainbed_reasoning.sweeps.miniature.claims import Claims, chain, label
from domainbed_reasoning.sweeps.miniature.regimes import (
    CHOICE_SEED,
    CHOICE_TARGETS,
    MOST_UNPARSED,
    REGIMES,
    ROUNDS,
    TARGET_PER_CLASS,
    TARGETS,
    at_rate,
    rate_of,
    variant,
)
from domainbed_reasoning.sweeps.miniature.study import StudyRow
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob

VARIANT_FILE = "variant.json"
LATE: dict[str, Any] = {"mtct_epochs": 2, "sarr_epochs": 1, "sarr_rounds": 2}  # stages of 123, 61 and 60 updates
ONE_LATE: dict[str, Any] = {"mtct_epochs": 3, "sarr_epochs": 1, "sarr_rounds": 1}  # 184 and 60

BASELINE = next(row for row in regimes.MAIN if row.name == "RDMLDG")
# One change each, then two; ties go to the earlier.
CANDIDATES = (
    *regimes.FILTERS,
    *(row for row in regimes.BALANCED if row.algorithm == "RDMLDG"),
    variant("RDMLDG falling loss", "RDMLDG", chain_weighting="falling_loss", **ROUNDS),
    variant("RDMLDG late rounds", "RDMLDG", **LATE),
    variant("RDMLDG one late round", "RDMLDG", **ONE_LATE),
    variant("RDMLDG balanced consistent", "RDMLDG", gradient_balance="norm", sarr_filter="consistent", **ROUNDS),
    variant("RDMLDG falling loss consistent", "RDMLDG", chain_weighting="falling_loss", sarr_filter="consistent",
            **ROUNDS),
    variant("RDMLDG balanced late rounds", "RDMLDG", gradient_balance="norm", **LATE),
)  # fmt: skip


def rate(row: StudyRow, regime: str, output: Path) -> float:
    """Return the learning rate of the baseline or a candidate in a regime."""
    own = "RDMLDG balanced" if "gradient_balance" in row.hparams else BASELINE.name
    return rate_of(own, row.algorithm, regime, output)


def _search(output: Path) -> list[tuple[StudyRow, str, TrainJob]]:
    return [
        (row, regime, regimes.choice_job(at_rate(row, rate(row, regime, output)), regime, target, output))
        for row in (BASELINE, *CANDIDATES)
        for regime in REGIMES
        for target in CHOICE_TARGETS
    ]


def search_jobs(output: Path) -> list[TrainJob]:
    """Return the jobs of the search: the baseline's and the candidates'."""
    return [job for _, _, job in _search(output)]


def search_rows(output: Path) -> list[dict[str, Any]]:
    """Return the lines of the search's completed jobs, with the columns of ``choice.csv``."""
    return regimes.lines_of(_search(output), output)


def pick(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the candidate that the lines of a complete search select, and every candidate's scores.

    A candidate is rejected if more than `MOST_UNPARSED` of a job's validation chains name no class. Among the others,
    the largest gain in the worse regime wins; the earlier candidate on a tie.

    Returns:
        the contents of ``variant.json``; accuracies and shares in [0, 1]. ``picked`` is None if all are rejected;
        ``beats_baseline`` says whether the picked candidate gains in both regimes.
    """

    def means(name: str) -> dict[str, float]:
        own = {regime: [one for one in lines if (one["row"], one["regime"]) == (name, regime)] for regime in REGIMES}
        return {regime: statistics.fmean(float(one["source_validation"]) for one in own[regime]) for regime in REGIMES}

    baseline = means(BASELINE.name)
    candidates: dict[str, dict[str, Any]] = {}
    for row in CANDIDATES:
        found = means(row.name)
        gains = {regime: round(found[regime] - baseline[regime], 6) for regime in REGIMES}  # a tie stays one
        worst = max(float(one["unparsed"]) for one in lines if one["row"] == row.name)
        candidates[row.name] = {
            "source_validation": found,
            "gains": gains,
            "worst_gain": min(gains.values()),
            "unparsed": worst,
            "rejected": worst > MOST_UNPARSED,
        }
    allowed = [name for name, its in candidates.items() if not its["rejected"]]
    picked = max(allowed, key=lambda name: candidates[name]["worst_gain"], default=None)
    return {
        "picked": picked,
        "beats_baseline": picked is not None and candidates[picked]["worst_gain"] > 0,
        "seed": CHOICE_SEED,
        "targets": list(CHOICE_TARGETS),
        "baseline": {"row": BASELINE.name, "source_validation": baseline},
        "candidates": candidates,
    }


def report(output: Path) -> None:
    """Print the gains of the candidates and write ``variant.json``, if the search is complete."""
    lines = search_rows(output)
    if missing := len(search_jobs(output)) - len(lines):
        print(f"{missing} jobs of the search have not completed: no variant is picked. Rerun `--search` to resume.")
        return
    found = pick(lines)
    print(f"{'gain in source validation':<34}" + "".join(f"{regime:>13}" for regime in REGIMES))
    for name, its in found["candidates"].items():
        gains = "".join(f"{its['gains'][regime]:>+13.3f}" for regime in REGIMES)
        print(f"{name:<34}{gains}   unparsed {its['unparsed']:.3f}{'  rejected' if its['rejected'] else ''}")
    if found["picked"] is None:
        print("All candidates are rejected: too many of their chains name no class. No variant is picked.")
        return
    row = _by_name(found["picked"])
    found["learning_rates"] = {regime: rate(row, regime, output) for regime in REGIMES}
    replace_text(output / VARIANT_FILE, json.dumps(found, indent=1) + "\n")
    beats = "gains in both regimes" if found["beats_baseline"] else "no candidate gains in both regimes"
    print(f"Wrote {output / VARIANT_FILE}: {row.name} ({beats})")


def _by_name(name: str) -> StudyRow:
    return next(row for row in CANDIDATES if row.name == name)


def picked(output: Path) -> StudyRow | None:
    """Return the row that ``variant.json`` of an output folder names; None before ``--search`` has written it."""
    path = output / VARIANT_FILE
    return _by_name(json.loads(path.read_text())["picked"]) if path.exists() else None


def cells(row: StudyRow) -> list[tuple[StudyRow, str, int, int]]:
    """Return every (row, regime, target, seed) of the test of a picked row in run order."""
    return [(row, regime, target, seed) for seed in row.seeds for target in TARGETS for regime in REGIMES]


def job_of(
    row: StudyRow, regime: str, target: int, seed: int, output: Path, target_per_class: int = TARGET_PER_CLASS
) -> TrainJob:
    """Return the job of a cell of the study or of the test; a candidate of the study has one job in both."""
    if row in CANDIDATES:
        row = replace(row, hparams=row.hparams | {"lr": rate(row, regime, output)})
    return regimes.job_of(row, regime, target, seed, output, target_per_class)


def test_jobs(output: Path) -> list[TrainJob]:
    """Return the picked row's jobs, on held-out seeds, for all targets, in both regimes; none before a pick."""
    row = picked(output)
    return [job_of(*cell, output) for cell in cells(row)] if row is not None else []


def family(name: str) -> Claims:
    """Return the comparisons of the picked row with those of the main table."""
    return (
        ("picked variant against RD-MLDG, chain", chain(name), chain("RDMLDG")),
        ("picked variant against RD-MLDG, label", label(name), label("RDMLDG")),
        ("picked variant against MTCT for as many steps, chain", chain(name), chain("MTCT")),
        ("picked variant's chain against label only", chain(name), label("LabelSFT")),
    )


def with_picked(output: Path) -> Any:
    """Return the study `regimes`, with the rows, cells and comparisons of the picked variant if there is one."""
    row = picked(output)
    if row is None:
        return regimes
    is_new = row not in regimes.ROWS
    more = {
        "ROWS": (*regimes.ROWS, *([row] if is_new else [])),
        "FAMILIES": {**regimes.FAMILIES, f"The picked variant, {row.name}": family(row.name)},
        "cells": lambda: regimes.cells() + (cells(row) if is_new else []),
        "job_of": job_of,
        "choice_rows": lambda output: regimes.choice_rows(output) + search_rows(output),
    }
    return SimpleNamespace(**(vars(regimes) | more))
