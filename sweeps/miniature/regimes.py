"""The study in the paper's two regimes: every claim decided where names are known and the teacher writes otherwise.

    python -m domainbed_reasoning.sweeps.miniature --study regimes --design    what is compared with what
    python -m domainbed_reasoning.sweeps.miniature --study regimes --choose    learning rates on source validation
    python -m domainbed_reasoning.sweeps.miniature --study regimes --run       all remaining jobs; rerun to resume
    python -m domainbed_reasoning.sweeps.miniature --study regimes --table     rows, tables and tests of what is done

The premises of both regimes, measured on the base model, were written down before the first comparison
(``results/regimes/premises.json``). Every row takes 244 updates with the same batch: RD-MLDG 61 and three rounds of 61.
Each row's rate is the best of three on the validation splits of the source domains, by trial seed 0 and two target
domains, among those whose chains still parse; seeds 1 to 3 are compared. Rows at one common rate stand beside them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.images import creatures, shapes
from domainbed_reasoning.sweeps.miniature.claims import Claims, chain, label
from domainbed_reasoning.sweeps.miniature.study import StudyRow, source_validation
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob, make_job

NAME = "regimes"
DATASETS = {"clear": "ClearCreaturesReasoning", "camouflaged": "CamouflagedCreaturesReasoning"}
REGIME_TITLES = {
    "clear": "Clear creatures (as OfficeHome)",
    "camouflaged": "Camouflaged creatures (as TerraIncognita)",
}
REGIMES = tuple(DATASETS)
CLASS_NAMES, PER_CLASS = creatures.CLASS_NAMES, creatures.PER_CLASS
TARGETS = (0, 1, 2, 3)
TEST_SEEDS = (1, 2, 3)
CHOICE_SEED, CHOICE_TARGETS = 0, (0, 2)
STEPS, A_STAGE = 244, 61  # stages of 62, 61, 61 and 60 updates, evaluated at their ends
PAPER_MTCT, PAPER_RDMLDG = 145, 577  # 3 epochs of 48 steps, and with three rounds of 3 epochs; DomainBed adds one
TARGET_PER_CLASS = 30  # 360 test images a cell
RATES_TRIED = (7e-4, 2e-3, 6e-3)
COMMON_RATE = 2e-3
MOST_UNPARSED = 0.05  # share of validation chains that name no class, above which a rate is rejected
ERRORS = (0.1, 0.4)

# Chosen by --choose (results/regimes/choice.csv), by row and regime; rows that are not here have MTCT's or RD-MLDG's.
LEARNING_RATES: dict[tuple[str, str], float] = {}

OF_MLLMS = {"batch_size": 4, "teacher": "other"}
ROUNDS: dict[str, Any] = {"mtct_epochs": 1, "sarr_epochs": 1, "sarr_rounds": 3}
PAPERS_ROUNDS: dict[str, Any] = {"mtct_epochs": 3, "sarr_epochs": 3, "sarr_rounds": 3}


def mllm(name: str, algorithm: str, steps: int = STEPS, folder: str = "main", **hparams: Any) -> StudyRow:
    """Return the row of an MLLM method, which is evaluated at the end, with rounds at the end of every stage."""
    first = A_STAGE if "sarr_rounds" in hparams and steps == STEPS else steps
    if folder != "main":
        folder = name.replace(" ", "_").replace("=", "").replace("'", "").replace("%", "")
    return StudyRow(
        name, algorithm, OF_MLLMS | {"first_evaluation": first} | hparams, steps, TEST_SEEDS, REGIMES, folder
    )


def variant(name: str, algorithm: str, steps: int = STEPS, **hparams: Any) -> StudyRow:
    """Return a row in a folder of its own: DomainBed's tables tell algorithms apart, not their hyper-parameters."""
    return mllm(name, algorithm, steps, "own", **hparams)


MAIN = (
    replace(mllm("MLLMZeroShot", "MLLMZeroShot", 1, first_evaluation=0), seeds=TEST_SEEDS[:1]),
    mllm("LabelSFT", "LabelSFT", both_answers=False),
    mllm("ReasoningSFT", "ReasoningSFT", both_answers=False),
    mllm("MTCT", "MTCT"),
    mllm("SARR", "SARR", both_answers=False, **ROUNDS),
    mllm("RDMLDG", "RDMLDG", **ROUNDS),
    StudyRow("ERM", "ERM", {"batch_size": 4, "lr": 1e-3}, 601, TEST_SEEDS, REGIMES),
)
FILTERS = (
    variant("RDMLDG well_formed", "RDMLDG", sarr_filter="well_formed", **ROUNDS),
    variant("RDMLDG consistent", "RDMLDG", sarr_filter="consistent", **ROUNDS),
)
BALANCED = (
    variant("MTCT balanced", "MTCT", gradient_balance="norm"),
    variant("RDMLDG balanced", "RDMLDG", gradient_balance="norm", **ROUNDS),
)
STEPS_ROWS = (
    variant("MTCT before rounds", "MTCT", A_STAGE + 1),
    variant("LabelSFT paper's epochs", "LabelSFT", PAPER_MTCT, both_answers=False),
    variant("ReasoningSFT paper's epochs", "ReasoningSFT", PAPER_MTCT, both_answers=False),
    variant("MTCT paper's epochs", "MTCT", PAPER_MTCT),
    variant("MTCT as many steps", "MTCT", PAPER_RDMLDG),
    variant("RDMLDG paper's epochs", "RDMLDG", PAPER_RDMLDG, **PAPERS_ROUNDS),
)
TEACHERS = tuple(
    variant(f"MTCT {setting} {error:.0%} wrong", "MTCT", teacher_error=error, chain_verification=setting)
    for error in ERRORS
    for setting in ("verified", "unverified")
)
TUNED = (*MAIN[1:-1], *BALANCED)  # whose rates are chosen; the others take those of the algorithm's row
COMMON = tuple(
    replace(
        row,
        name=f"{row.name} at the common rate",
        folder=f"common_{row.name}",
        hparams=row.hparams | {"lr": COMMON_RATE},
    )
    for row in MAIN[1:-1]
)
ROWS = (*MAIN, *FILTERS, *BALANCED, *STEPS_ROWS, *TEACHERS, *COMMON)


def rate_of(row: StudyRow, regime: str) -> float:
    """Return the learning rate of a row in a regime: its own, or that of its algorithm."""
    name = row.name if (row.name, regime) in LEARNING_RATES else row.algorithm
    return LEARNING_RATES.get((name, regime), COMMON_RATE)


def cells() -> list[tuple[StudyRow, str, int, int]]:
    """Return every (row, regime, target, seed) in the order of the runs; common rates only where they differ."""
    return [
        (row, regime, target, seed)
        for seed in TEST_SEEDS
        for part in ((*MAIN, *BALANCED, *FILTERS), (*STEPS_ROWS, *TEACHERS, *COMMON))
        for target in TARGETS
        for row in part
        for regime in REGIMES
        if seed in row.seeds and (row not in COMMON or rate_of(replace(row, name=row.algorithm), regime) != COMMON_RATE)
    ]


def job_of(
    row: StudyRow, regime: str, target: int, seed: int, output: Path, target_per_class: int = TARGET_PER_CLASS
) -> TrainJob:
    """Return the job of a cell, as a stock sweep would start it, but for when to evaluate."""
    hparams: dict[str, Any] = {"target_per_class": target_per_class}
    if row.algorithm not in ("ERM", "MLLMZeroShot"):
        hparams["lr"] = rate_of(row, regime)
    hparams |= row.hparams
    return make_job(
        output / regime / row.folder,
        DATASETS[regime],
        row.algorithm,
        [target],
        data_dir=str(output),
        trial_seed=seed,
        hparams=dict(sorted(hparams.items())),
        steps=row.steps,
        checkpoint_freq=hparams.get("first_evaluation", row.steps),
    )


def choices() -> list[StudyRow]:
    """Return the grid that learning rates are chosen from."""
    return [
        replace(
            row, name=f"{row.name} lr {rate:g}", hparams=row.hparams | {"lr": rate}, folder=f"{row.folder}_lr{rate:g}"
        )
        for row in TUNED
        for rate in RATES_TRIED
    ]


def grid_jobs(output: Path) -> list[TrainJob]:
    """Return the jobs of the grid: few images of the target, which choose nothing."""
    return [
        job_of(row, regime, target, CHOICE_SEED, output / "choice", target_per_class=1)
        for row in choices()
        for regime in REGIMES
        for target in CHOICE_TARGETS
    ]


def unparsed(job: TrainJob) -> float:
    """Return the share of validation chains of the source domains that name no class; 0 without chains."""
    path = job.folder / "answers.json"
    if not path.exists():
        return 0.0
    answers = json.loads(path.read_text())
    target = job.arguments["test_envs"][0]
    shares = [answers[f"env{env}"]["out"]["unparsed"] for env in TARGETS if env != target]
    return statistics.fmean(share or 0.0 for share in shares)


def chosen_rates(output: Path) -> dict[tuple[str, str], float]:
    """Return the best rate of every tuned row and regime among those whose chains still parse, from finished jobs."""
    found = {}
    for row in TUNED:
        for regime in REGIMES:
            scores = {}
            for rate in RATES_TRIED:
                own = next(each for each in choices() if each.name == f"{row.name} lr {rate:g}")
                jobs = [job_of(own, regime, target, CHOICE_SEED, output / "choice", 1) for target in CHOICE_TARGETS]
                values = [value for job in jobs if (value := source_validation(job)) is not None]
                if len(values) == len(jobs) and max(map(unparsed, jobs)) <= MOST_UNPARSED:
                    scores[rate] = statistics.fmean(values)
            if scores:
                found[row.name, regime] = max(scores, key=lambda rate: scores[rate])
    return found


def print_choice(output: Path) -> None:
    """Print what the grid measured and what it chooses."""
    for row in choices():
        for regime in REGIMES:
            jobs = [job_of(row, regime, target, CHOICE_SEED, output / "choice", 1) for target in CHOICE_TARGETS]
            done = [job for job in jobs if job.done]
            values = [value for job in done if (value := source_validation(job)) is not None]
            mean = statistics.fmean(values) if values else math.nan
            worst = max(map(unparsed, done)) if done else math.nan
            print(f"{row.name:<28}{regime:<13}{mean:>7.3f}   unparsed {worst:.3f}   {len(done)} of {len(jobs)}")
    for (name, regime), rate in chosen_rates(output).items():
        print(f'    ("{name}", "{regime}"): {rate:g},')


def choice_rows(output: Path) -> list[dict[str, Any]]:
    """Return the lines of ``choice.csv``, of finished jobs."""
    return [
        {"row": row.name, "regime": regime, "target": target, "seed": CHOICE_SEED, "source_validation": found}
        for row in choices()
        for regime in REGIMES
        for target in CHOICE_TARGETS
        for job in [job_of(row, regime, target, CHOICE_SEED, output / "choice", 1)]
        if (found := source_validation(job)) is not None
    ]


def described_class(text: str) -> str | None:
    """Return the class whose four parts a chain's caption names; None if there is no such class."""
    try:
        words = set(parse_chain(text).caption.casefold().replace(",", " ").split())
    except ChainError:
        return None
    named = [[kind for kind, word in enumerate(of_part) if word in words] for of_part in shapes.KINDS]
    code = tuple(kinds[0] if len(kinds) == 1 else -1 for kinds in named)
    return creatures.CLASS_NAMES[creatures.CODES.index(code)] if code in creatures.CODES else None


def cue_of(name: str) -> str | None:
    """Return None: backgrounds are random, and no answer follows a cue."""
    return None


FAMILIES: Mapping[str, Claims] = {
    "Claims of the paper": (
        ("reasoning only against label only", chain("ReasoningSFT"), label("LabelSFT")),
        ("MTCT's chain against reasoning only", chain("MTCT"), chain("ReasoningSFT")),
        ("MTCT's chain against label only", chain("MTCT"), label("LabelSFT")),
        ("MTCT's label against label only", label("MTCT"), label("LabelSFT")),
        ("RD-MLDG against MTCT for as many steps, chain", chain("RDMLDG"), chain("MTCT")),
        ("RD-MLDG against MTCT for as many steps, label", label("RDMLDG"), label("MTCT")),
        ("RD-MLDG against MTCT before the rounds, chain", chain("RDMLDG"), chain("MTCT before rounds")),
        ("RD-MLDG's chain against label only", chain("RDMLDG"), label("LabelSFT")),
        ("SARR without the label path against reasoning only", chain("SARR"), chain("ReasoningSFT")),
        ("RD-MLDG against SARR without the label path", chain("RDMLDG"), chain("SARR")),
        ("RD-MLDG's chain against zero-shot's", chain("RDMLDG"), chain("MLLMZeroShot")),
        ("RD-MLDG's chain against ERM", chain("RDMLDG"), ("ERM", "accuracy")),
    ),
    "The filter of the rounds": (
        ("well formed against the paper's filter, chain", chain("RDMLDG well_formed"), chain("RDMLDG")),
        ("consistent against the paper's filter, chain", chain("RDMLDG consistent"), chain("RDMLDG")),
        ("well formed against MTCT for as many steps", chain("RDMLDG well_formed"), chain("MTCT")),
    ),
    "A teacher that errs": tuple(
        (f"verified against unverified, {error:.0%} wrong, chain",
         chain(f"MTCT verified {error:.0%} wrong"), chain(f"MTCT unverified {error:.0%} wrong"))
        for error in ERRORS
    ),
    "The paper's epochs": (
        ("reasoning only against label only", chain("ReasoningSFT paper's epochs"), label("LabelSFT paper's epochs")),
        ("MTCT's chain against label only", chain("MTCT paper's epochs"), label("LabelSFT paper's epochs")),
        ("RD-MLDG against MTCT, chain", chain("RDMLDG paper's epochs"), chain("MTCT paper's epochs")),
        ("RD-MLDG against MTCT for as many steps, chain", chain("RDMLDG paper's epochs"), chain("MTCT as many steps")),
    ),
    "Beyond the paper": (
        ("MTCT with balanced gradients, chain", chain("MTCT balanced"), chain("MTCT")),
        ("MTCT with balanced gradients against label only", chain("MTCT balanced"), label("LabelSFT")),
        ("RD-MLDG with balanced gradients, chain", chain("RDMLDG balanced"), chain("RDMLDG")),
        ("RD-MLDG with balanced gradients against label only", chain("RDMLDG balanced"), label("LabelSFT")),
        ("balanced: RD-MLDG against MTCT, chain", chain("RDMLDG balanced"), chain("MTCT balanced")),
    ),
}  # fmt: skip
