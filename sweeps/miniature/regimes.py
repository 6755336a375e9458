"""The study in the paper's two regimes: the model knows the names, and the teacher writes in another style.

    python -m domainbed_reasoning.sweeps.miniature --study regimes --design    list the rows and their jobs
    python -m domainbed_reasoning.sweeps.miniature --study regimes --choose    select rates by source validation
    python -m domainbed_reasoning.sweeps.miniature --study regimes --run       run the remaining jobs; rerun to resume
    python -m domainbed_reasoning.sweeps.miniature --study regimes --search    pick a variant, see `variants`
    python -m domainbed_reasoning.sweeps.miniature --study regimes --test      run the picked variant
    python -m domainbed_reasoning.sweeps.miniature --study regimes --table     write rows, tables and tests

The premises of both regimes, measured on the base model, were frozen before the first comparison
(``results/regimes/premises.json``). Every row takes 244 updates with the same batch size: RD-MLDG 62 and three rounds
of 61, 61 and 60. Each row's learning rate is the best of three by accuracy on the validation splits of the source
domains, with trial seed 0 and two target domains, among those whose chains still parse; seeds 1 to 3 are compared. Rows
at one common rate are included. The rates are in ``learning_rates.json``: the one in the output folder, which
``--choose`` writes, or else the one beside this file. Another machine continues the study from its tables; see
`recorded`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.images import creatures, shapes
from domainbed_reasoning.results import published
from domainbed_reasoning.sweeps.miniature.claims import Answer, Claims, chain, label
from domainbed_reasoning.sweeps.miniature.recorded import name_of, recorded
from domainbed_reasoning.sweeps.miniature.study import StudyRow, source_validation
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob, make_job

NAME = "regimes"
DATASETS = {"clear": "ClearCreaturesReasoning", "camouflaged": "CamouflagedCreaturesReasoning"}
REGIME_TITLES = {
    "clear": "Clear creatures (as OfficeHome)",
    "camouflaged": "Camouflaged creatures (as TerraIncognita)",
}
REGIMES = tuple(DATASETS)
PAPERS_DATASETS = {"clear": "OfficeHome", "camouflaged": "TerraIncognita"}  # of its ablation, beside these tables
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
RATES_FILE = "learning_rates.json"  # by regime and row; other rows have their algorithm's
PUBLISHED_RATES = Path(__file__).with_name(RATES_FILE)

OF_MLLMS = {"batch_size": 4, "teacher": "other"}
ROUNDS: dict[str, Any] = {"mtct_epochs": 1, "sarr_epochs": 1, "sarr_rounds": 3}
PAPERS_ROUNDS: dict[str, Any] = {"mtct_epochs": 3, "sarr_epochs": 3, "sarr_rounds": 3}


def mllm(name: str, algorithm: str, steps: int = STEPS, folder: str = "main", **hparams: Any) -> StudyRow:
    """Return the row of an MLLM method, evaluated after the last step, or with rounds after every stage."""
    first = A_STAGE if "sarr_rounds" in hparams and steps == STEPS else steps
    if folder != "main":
        folder = name.replace(" ", "_").replace("=", "").replace("'", "").replace("%", "")
    return StudyRow(
        name, algorithm, OF_MLLMS | {"first_evaluation": first} | hparams, steps, TEST_SEEDS, REGIMES, folder
    )


def variant(name: str, algorithm: str, steps: int = STEPS, **hparams: Any) -> StudyRow:
    """Return a row in its own folder: DomainBed's tables distinguish algorithms, not hyper-parameters."""
    return mllm(name, algorithm, steps, "own", **hparams)


MAIN = (
    replace(mllm("MLLMZeroShot", "MLLMZeroShot", 1, first_evaluation=0), seeds=TEST_SEEDS[:1]),
    mllm("LabelSFT", "LabelSFT", both_answers=False),
    mllm("ReasoningSFT", "ReasoningSFT", both_answers=False),
    mllm("MTCT", "MTCT"),
    mllm("SARR", "SARR", both_answers=False, **ROUNDS),
    mllm("RDMLDG", "RDMLDG", **ROUNDS),
    StudyRow("ERM", "ERM", {"batch_size": 4}, 601, TEST_SEEDS, REGIMES),
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
TUNED = (*MAIN[1:], *BALANCED)  # the rows with learning rates of their own
COMMON = tuple(replace(row, name=f"{row.name} at the common rate", folder=f"common_{row.name}") for row in MAIN[1:-1])
ROWS = (*MAIN, *FILTERS, *BALANCED, *STEPS_ROWS, *TEACHERS, *COMMON)


def learning_rates(output: Path | None = None) -> dict[str, dict[str, float]]:
    """Return the chosen rates by regime and row: those of an output folder, or else the published ones, or none."""
    for path in (*([output / RATES_FILE] if output else []), PUBLISHED_RATES):
        if path.exists():
            rates: dict[str, dict[str, float]] = json.loads(path.read_text())
            return rates
    return {}


def rate_of(name: str, algorithm: str, regime: str, output: Path | None = None) -> float:
    """Return a row's learning rate in a regime: its own, or its algorithm's; the grid's middle if both are unknown."""
    own = learning_rates(output).get(regime, {})
    return own.get(name, own.get(algorithm, COMMON_RATE))


def cells() -> list[tuple[StudyRow, str, int, int]]:
    """Return every (row, regime, target, seed) in run order: the rows that the paper's claims need come first."""
    return [
        (row, regime, target, seed)
        for part in ((*MAIN, *BALANCED, *FILTERS), (*STEPS_ROWS, *TEACHERS, *COMMON))
        for seed in TEST_SEEDS
        for target in TARGETS
        for row in part
        for regime in REGIMES
        if seed in row.seeds
    ]


def job_of(
    row: StudyRow, regime: str, target: int, seed: int, output: Path, target_per_class: int = TARGET_PER_CLASS
) -> TrainJob:
    """Return the job of a cell, as a stock sweep would start it except for the evaluation frequency.

    A row at the common rate has the jobs of the main table where that is the row's own rate. Embedded images need no
    data folder, so the arguments are the same on every machine.
    """
    hparams: dict[str, Any] = {"target_per_class": target_per_class}
    folder = row.folder
    if row.algorithm != "MLLMZeroShot":
        hparams["lr"] = rate_of(row.name, row.algorithm, regime, output)
    if row in COMMON:
        folder = "main" if hparams["lr"] == COMMON_RATE else folder
        hparams["lr"] = COMMON_RATE
    hparams |= row.hparams
    return make_job(
        output / regime / folder,
        DATASETS[regime],
        row.algorithm,
        [target],
        data_dir=".",
        trial_seed=seed,
        hparams=dict(sorted(hparams.items())),
        steps=row.steps,
        checkpoint_freq=hparams.get("first_evaluation", row.steps),
    )


def at_rate(row: StudyRow, rate: float) -> StudyRow:
    """Return a row at a learning rate, in a folder of its own."""
    return replace(
        row, name=f"{row.name} lr {rate:g}", hparams=row.hparams | {"lr": rate}, folder=f"{row.folder}_lr{rate:g}"
    )


def choices() -> list[StudyRow]:
    """Return the learning-rate grid."""
    return [at_rate(row, rate) for row in TUNED for rate in RATES_TRIED]


def choice_job(row: StudyRow, regime: str, target: int, output: Path) -> TrainJob:
    """Return a job for selection, with few target images, as these are not used for it."""
    return job_of(row, regime, target, CHOICE_SEED, output / "choice", target_per_class=1)


def _grid(output: Path) -> list[tuple[StudyRow, str, TrainJob]]:
    return [
        (row, regime, choice_job(row, regime, target, output))
        for row in choices()
        for regime in REGIMES
        for target in CHOICE_TARGETS
    ]


def grid_jobs(output: Path) -> list[TrainJob]:
    """Return the jobs of the grid."""
    return [job for _, _, job in _grid(output)]


def unparsed(job: TrainJob) -> float:
    """Return the share of the source domains' validation chains that name no class; 0 without chains."""
    path = job.folder / "answers.json"
    if not path.exists():
        return 0.0
    answers = json.loads(path.read_text())
    target = job.arguments["test_envs"][0]
    shares = [answers[f"env{env}"]["out"]["unparsed"] for env in TARGETS if env != target]
    return statistics.fmean(share or 0.0 for share in shares)


def lines_of(jobs: Iterable[tuple[StudyRow, str, TrainJob]], output: Path) -> list[dict[str, Any]]:
    """Return the lines of ``choice.csv`` of the completed and recorded ones among (row, regime, job).

    Accuracies and shares have four decimals, so that what the file selects is what was selected.
    """
    elsewhere, lines = recorded(output, "choice.csv"), []
    for row, regime, job in jobs:
        own = {
            "row": row.name,
            "regime": regime,
            "target": job.arguments["test_envs"][0],
            "seed": CHOICE_SEED,
            "job": name_of(job, output),
        }
        if (found := source_validation(job)) is not None:
            lines.append(own | {"source_validation": round(found, 4), "unparsed": round(unparsed(job), 4)})
        elif (line := elsewhere.get(own["job"])) is not None:
            lines.append(own | {key: float(line[key]) for key in ("source_validation", "unparsed")})
    return lines


def choice_rows(output: Path) -> list[dict[str, Any]]:
    """Return the lines of ``choice.csv``, of completed jobs."""
    return lines_of(_grid(output), output)


def best_rates(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the rates that the lines of ``choice.csv`` select, by regime and row.

    The best mean source validation wins among rates at which at most `MOST_UNPARSED` of the chains name no class, for
    every target; the lower rate on a tie. If no rate qualifies, that with the fewest such chains is taken. A row
    without all of its lines is left out.
    """
    found: dict[str, dict[str, float]] = {regime: {} for regime in REGIMES}
    for regime in REGIMES:
        for row in TUNED:
            scores = {}
            for rate in RATES_TRIED:
                own = [one for one in lines if (one["row"], one["regime"]) == (f"{row.name} lr {rate:g}", regime)]
                if len(own) == len(CHOICE_TARGETS):
                    worst = max(float(one["unparsed"]) for one in own)
                    mean = statistics.fmean(float(one["source_validation"]) for one in own)
                    scores[rate] = (0.0, mean) if worst <= MOST_UNPARSED else (-worst, mean)
            if len(scores) == len(RATES_TRIED):
                found[regime][row.name] = max(scores, key=lambda rate: scores[rate])
    return found


def report_choice(output: Path) -> None:
    """Print the grid's results; write the rates that they select into the output folder if the grid is complete."""
    lines = choice_rows(output)
    for row in choices():
        for regime in REGIMES:
            own = [one for one in lines if (one["row"], one["regime"]) == (row.name, regime)]
            if own:
                mean = statistics.fmean(one["source_validation"] for one in own)
                worst = max(one["unparsed"] for one in own)
                rejected = "  rejected" if worst > MOST_UNPARSED else ""
                print(f"{row.name:<28}{regime:<13}{mean:>7.3f}   unparsed {worst:.3f}{rejected}")
    missing = len(grid_jobs(output)) - len(lines)
    if missing:
        print(f"{missing} jobs of the grid have not completed: no rates are selected. Rerun `--choose` to resume.")
        return
    rates = best_rates(lines)
    replace_text(output / RATES_FILE, json.dumps(rates, indent=1) + "\n")
    print(f"Wrote {output / RATES_FILE}: {json.dumps(rates)}")


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
    """Return None: backgrounds are random, so there is no cue."""
    return None


def papers_accuracy(regime: str, answer: Answer) -> float | None:
    """Return the paper's accuracy of a row's answer, in percent; None if it reports none.

    Its answers are the conclusions of chains, and the class names of label-only fine-tuning. Its numbers of updates
    differ from row to row, so rows of equal length and those of its epochs stand beside the same number.

    Args:
        regime: whose premises are those of one of its datasets.
        answer: a row and one of its columns; "after1" is the accuracy after the first round.
    """
    row, its = answer
    name, dataset = row.removesuffix(" at the common rate").removesuffix(" paper's epochs"), PAPERS_DATASETS[regime]
    if its.startswith("after"):
        with_rounds = name == "RDMLDG" and dataset == "TerraIncognita"
        return published.SARR_ROUNDS[int(its.removeprefix("after"))] if with_rounds else None
    if its == "label" and name != "LabelSFT":
        return None
    return published.result_of(name, dataset)


_CLAIMS: Claims = (
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
)

_OF_COMMON = {row.name for row in COMMON}

FAMILIES: Mapping[str, Claims] = {
    "Claims of the paper": _CLAIMS,
    "At one common learning rate": tuple(
        (claim, (f"{first} at the common rate", its), (f"{second} at the common rate", other))
        for claim, (first, its), (second, other) in _CLAIMS
        if {f"{first} at the common rate", f"{second} at the common rate"} <= _OF_COMMON
    ),
    "Rounds of one job, DomainBed's answer": tuple(
        (f"{name}: {claim}", (name, f"after{rounds}"), (name, f"after{rounds - 1}"))
        for name in ("RDMLDG", "RDMLDG well_formed", "RDMLDG consistent", "RDMLDG balanced", "SARR")
        for rounds, claim in ((1, "one round against none"), (2, "two against one"), (3, "three against two"))
    ),
    "The filter of the rounds": (
        ("well formed against the paper's filter, chain", chain("RDMLDG well_formed"), chain("RDMLDG")),
        ("consistent against the paper's filter, chain", chain("RDMLDG consistent"), chain("RDMLDG")),
        ("consistent against well formed, chain", chain("RDMLDG consistent"), chain("RDMLDG well_formed")),
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
