"""The miniature study: all algorithms on the embedded benchmark, with equal steps, in two cue regimes.

    python -m domainbed_reasoning.sweeps.miniature --study miniature --design    list the rows and their jobs
    python -m domainbed_reasoning.sweeps.miniature --study miniature --choose    select rates on source validation
    python -m domainbed_reasoning.sweeps.miniature --study miniature --base      pretrain a second base, see `--help`
    python -m domainbed_reasoning.sweeps.miniature --study miniature --run       run remaining jobs; rerun to resume
    python -m domainbed_reasoning.sweeps.miniature --study miniature --table     write rows, tables and tests

Jobs run DomainBed's train script with the arguments of its sweeps, in folders that `collect_results` reads
(``OUTPUT/rho0/main`` and ``OUTPUT/rho8/main`` contain the main table). Every MLLM method takes the same number of
updates with the same batch size; only hyper-parameters selected on the validation splits of the **source** domains
differ. They are selected with trial seed 0 and compared with seeds 1 to 5. Seeds are the outermost loop, so an
interrupted study is balanced.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.images import shapes
from domainbed_reasoning.sweeps.launchers.forked import forked_launcher
from domainbed_reasoning.sweeps.launchers.restart import sole_launch
from domainbed_reasoning.sweeps.miniature.claims import FAMILIES as FAMILIES
from domainbed_reasoning.sweeps.miniature.claims import Answer
from domainbed_reasoning.sweeps.miniature.recorded import name_of, recorded
from domainbed_reasoning.sweeps.studies.train_jobs import Launcher, TrainJob, make_job, remove_dead, start

NAME = "miniature"
DATASET = "ShapesReasoning"
CLASS_NAMES, PER_CLASS = shapes.CLASS_NAMES, shapes.PER_CLASS
TARGETS = (0, 1, 2, 3)
REGIMES = {"rho0": 0.0, "rho8": 0.8}  # no cue; a cue that is valid in the sources and misleads in the target
REGIME_TITLES = {regime: f"Cue with probability {rho:g} ({regime})" for regime, rho in REGIMES.items()}
TEST_SEEDS = (1, 2, 3, 4, 5)
CHOICE_SEED = 0
CHOICE_CELLS = (("rho0", 0), ("rho8", 1), ("rho0", 2), ("rho8", 3))
STEPS = 121  # 1 + 120; methods with rounds use half of them for the supervised stage
BEFORE_ROUNDS = 61  # steps of the supervised stage
PAPER_MTCT, PAPER_RDMLDG = 85, 337  # 3 epochs of 28 steps; with three rounds of 3 epochs each
CNN_STEPS = 601  # networks without language fit the sources after this many steps, but not after 301
TARGET_PER_CLASS = 72  # 504 test images per cell
CNN_CHOICE_STEPS = 301  # for the grid search
CNNS = ("ERM", "IRM", "GroupDRO", "Mixup", "CORAL")

OF_CNNS = {"batch_size": 4}  # per domain
# As in the paper, the teacher is a different model than the student and has a different style.
OF_MLLMS = {"batch_size": 4, "first_evaluation": STEPS, "teacher": "other"}
ROUNDS = {1: (3, 3), 2: (2, 1), 3: (3, 1)}  # epochs of the supervised stage and of a round: half of the steps each

# Selected by --choose (results/miniature/choice.csv); ties go to the value nearest the embedded default.
LEARNING_RATES = {
    "LabelSFT": 4e-3,
    "ReasoningSFT": 8e-3,
    "MTCT": 8e-3,
    "SARR": 8e-3,
    "RDMLDG": 4e-3,
} | dict.fromkeys(CNNS, 1e-3)
OWN_WORDS_RATES = {"ReasoningSFT": 8e-3, "MTCT": 4e-3, "RDMLDG": 8e-3}
LABEL_WEIGHT = 0.1
BETTER_BASE = "better_base"  # below the output folder; written by --base
BETTER_BASE_NOISE = 0.5  # share of lessons that pair a class name with a random creature; 0.75 for the embedded model
RATES_TRIED = {True: (1e-3, 3e-3), False: (2e-3, 4e-3, 8e-3, 1.6e-2)}  # networks without language; MLLMs
WEIGHTS_TRIED = (0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class StudyRow:
    """One row of the study.

    Attributes:
        name: its name in the tables.
        algorithm: DomainBed's name of the algorithm.
        hparams: hyper-parameters that differ from the algorithm's defaults.
        steps: number of updates.
        seeds: trial seeds.
        regimes: cue regimes.
        folder: folder of its jobs, below the regime's.
    """

    name: str
    algorithm: str
    hparams: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    seeds: tuple[int, ...] = TEST_SEEDS
    regimes: tuple[str, ...] = tuple(REGIMES)
    folder: str = "main"


def papers_accuracy(regime: str, answer: Answer) -> None:
    """Return None: in these regimes the premises are not the paper's."""


def sarr(rounds: int) -> dict[str, int]:
    """Return the epochs for a number of rounds: half of the steps supervised, the rest split equally among rounds."""
    supervised, a_round = ROUNDS[rounds]
    return {"mtct_epochs": supervised, "sarr_epochs": a_round, "sarr_rounds": rounds}


def cnn(name: str) -> StudyRow:
    """Return the row of a network without language."""
    return StudyRow(name, name, OF_CNNS | {"lr": LEARNING_RATES[name]}, steps=CNN_STEPS)


def mllm(name: str, algorithm: str, steps: int = STEPS, **hparams: Any) -> StudyRow:
    """Return the row of an MLLM method."""
    of_steps = {"first_evaluation": steps, "lr": LEARNING_RATES[algorithm]}
    return StudyRow(name, algorithm, OF_MLLMS | of_steps | hparams, steps)


def variant(name: str, algorithm: str, steps: int = STEPS, **hparams: Any) -> StudyRow:
    """Return a row that differs from the main table's in one setting, with fewer seeds, in the regime with the cue."""
    row = mllm(name, algorithm, steps, **hparams)
    folder = name.replace(" ", "_").replace("=", "").replace("'", "")
    return replace(row, seeds=TEST_SEEDS[:3], regimes=("rho8",), folder=folder)


def everywhere(row: StudyRow) -> StudyRow:
    """Return a row with all seeds, in both regimes."""
    return replace(row, seeds=TEST_SEEDS, regimes=tuple(REGIMES))


def own_words(name: str, algorithm: str, **hparams: Any) -> StudyRow:
    """Return the row of a method whose teacher writes in the model's style, at its selected learning rate."""
    return variant(name, algorithm, teacher="own", lr=OWN_WORDS_RATES[algorithm], **hparams)


MAIN = (
    StudyRow("MLLMZeroShot", "MLLMZeroShot", OF_MLLMS | {"first_evaluation": 0}, steps=1, seeds=TEST_SEEDS[:1]),
    mllm("LabelSFT", "LabelSFT", both_answers=False),
    mllm("ReasoningSFT", "ReasoningSFT", both_answers=False),
    mllm("MTCT", "MTCT"),
    mllm("SARR", "SARR", both_answers=False, **sarr(3)),
    mllm("RDMLDG", "RDMLDG", **sarr(3)),
    *map(cnn, CNNS),
)
CLAIMS = (
    own_words("ReasoningSFT own words", "ReasoningSFT", both_answers=False),
    own_words("MTCT own words", "MTCT"),
    own_words("RDMLDG own words", "RDMLDG", **sarr(3)),
    variant("RDMLDG paper's epochs", "RDMLDG", PAPER_RDMLDG, mtct_epochs=3, sarr_epochs=3, sarr_rounds=3),
    variant("MTCT paper's epochs", "MTCT", PAPER_MTCT),
    variant("MTCT as many steps", "MTCT", PAPER_RDMLDG),
    everywhere(variant("MTCT at RDMLDG's rate", "MTCT", lr=LEARNING_RATES["RDMLDG"])),
    variant("MTCT paper's epochs at RDMLDG's rate", "MTCT", PAPER_MTCT, lr=LEARNING_RATES["RDMLDG"]),
    variant("MTCT as many steps at RDMLDG's rate", "MTCT", PAPER_RDMLDG, lr=LEARNING_RATES["RDMLDG"]),
    variant("MTCT before rounds", "MTCT", BEFORE_ROUNDS, lr=LEARNING_RATES["RDMLDG"]),
    variant("ReasoningSFT before rounds", "ReasoningSFT", BEFORE_ROUNDS, lr=LEARNING_RATES["SARR"], both_answers=False),
    variant("RDMLDG N=1", "RDMLDG", **sarr(1)),
    variant("RDMLDG N=2", "RDMLDG", **sarr(2)),
    variant("SARR bootstrap", "SARR", both_answers=False, mtct_epochs=0, sarr_epochs=1, sarr_rounds=3),
    variant("RDMLDG bootstrap", "RDMLDG", mtct_epochs=0, sarr_epochs=1, sarr_rounds=3),
)
BEYOND = (
    everywhere(variant("MTCT balanced", "MTCT", gradient_balance="norm")),
    everywhere(variant("RDMLDG balanced", "RDMLDG", gradient_balance="norm", **sarr(3))),
    variant("MTCT label_weight", "MTCT", label_weight=LABEL_WEIGHT),
    variant("RDMLDG label_weight", "RDMLDG", label_weight=LABEL_WEIGHT, **sarr(3)),
    variant("RDMLDG consistent", "RDMLDG", sarr_filter="consistent", **sarr(3)),
    variant("MTCT votes", "MTCT", votes=3, both_answers=False),
)
OTHER_BASE = (
    replace(MAIN[0], name="MLLMZeroShot better base", regimes=("rho8",), folder="MLLMZeroShot_better_base"),
    variant("LabelSFT better base", "LabelSFT", both_answers=False),
    variant("ReasoningSFT better base", "ReasoningSFT", both_answers=False),
    variant("MTCT better base", "MTCT"),
    variant("MTCT better base at RDMLDG's rate", "MTCT", lr=LEARNING_RATES["RDMLDG"]),
    variant("RDMLDG better base", "RDMLDG", **sarr(3)),
    variant("MTCT balanced better base", "MTCT", gradient_balance="norm"),
    variant("RDMLDG balanced better base", "RDMLDG", gradient_balance="norm", **sarr(3)),
)
ROWS = (*MAIN, *CLAIMS, *BEYOND, *OTHER_BASE)


def choices() -> list[StudyRow]:
    """Return the learning-rate grid; ERM's learning rate is used for all networks without language."""
    tuned = [row for row in (*MAIN, *CLAIMS[: len(OWN_WORDS_RATES)]) if row.algorithm != "MLLMZeroShot"]
    return [
        replace(
            row, name=f"{row.name} lr {rate:g}", hparams=row.hparams | {"lr": rate}, seeds=(CHOICE_SEED,),
            folder=f"lr{rate:g}", steps=CNN_CHOICE_STEPS if row.algorithm in CNNS else row.steps,
        )
        for row in tuned
        if row.algorithm == "ERM" or row.algorithm not in CNNS
        for rate in RATES_TRIED[row.algorithm in CNNS]
    ]  # fmt: skip


def weights() -> list[StudyRow]:
    """Return the grid of label weights (beyond the paper), at MTCT's learning rate."""
    row = next(row for row in MAIN if row.name == "MTCT")
    return [
        replace(
            row, name=f"MTCT weight {weight:g}", hparams=row.hparams | {"label_weight": weight}, seeds=(CHOICE_SEED,),
            folder=f"weight{weight:g}",
        )
        for weight in WEIGHTS_TRIED
        if weight != 1.0  # the paper's, included in the learning-rate grid
    ]  # fmt: skip


def cells() -> list[tuple[StudyRow, str, int, int]]:
    """Return every (row, regime, target, seed) of the study in run order."""
    mllms, cnns = MAIN[: -len(CNNS)], MAIN[-len(CNNS) :]
    variants, balanced = (*CLAIMS, *BEYOND), BEYOND[:2]
    first, second, *others = TEST_SEEDS
    phases = [(seed, rows) for seed in (first, second) for rows in (mllms, variants, cnns)]
    phases += [(first, OTHER_BASE), *((seed, (*mllms, *balanced)) for seed in others)]
    phases += [(seed, rows) for rows in (cnns, OTHER_BASE, variants) for seed in TEST_SEEDS]
    order = dict.fromkeys(
        (row.name, regime, target, seed)
        for seed, rows in phases
        for target in TARGETS
        for row in rows
        for regime in REGIMES
        if seed in row.seeds and regime in row.regimes
    )
    by_name = {row.name: row for row in ROWS}
    return [(by_name[name], regime, target, seed) for name, regime, target, seed in order]


def job_of(
    row: StudyRow, regime: str, target: int, seed: int, output: Path, target_per_class: int = TARGET_PER_CLASS
) -> TrainJob:
    """Return the job of a cell, as a stock sweep would start it except for the evaluation frequency."""
    hparams = {"rho": REGIMES[regime], "target_per_class": target_per_class} | row.hparams
    if row in OTHER_BASE:
        hparams["model"] = str(output / BETTER_BASE)
    return make_job(
        output / regime / row.folder,
        DATASET,
        row.algorithm,
        [target],
        data_dir=str(output),
        trial_seed=seed,
        hparams=dict(sorted(hparams.items())),
        steps=row.steps,
        checkpoint_freq=row.steps,  # DomainBed evaluates after the first step and after the last
    )


def run(jobs: Iterable[TrainJob], output: Path, launcher: Launcher = forked_launcher) -> int:
    """Run the remaining jobs in order; return the number of failed ones.

    Raises:
        ValueError: another process is running jobs of the folder ``output``.
    """
    jobs = list(jobs)
    with sole_launch(output):
        remove_dead(jobs)
        return len(start(jobs, launcher))


def grid_jobs(output: Path) -> list[TrainJob]:
    """Return the jobs of both grids, with few target images, as these are not used for selection."""
    return [
        job_of(row, regime, target, CHOICE_SEED, output / "choice", target_per_class=1)
        for row in (*choices(), *weights())
        for regime, target in CHOICE_CELLS
    ]


def source_validation(job: TrainJob) -> float | None:
    """Return the mean accuracy on the sources' validation splits after the last step; None for incomplete jobs."""
    if not job.done:
        return None
    last = json.loads((job.folder / "results.jsonl").read_text().splitlines()[-1])
    target = last["args"]["test_envs"][0]
    return statistics.fmean(last[f"env{env}_out_acc"] for env in TARGETS if env != target)


def report_choice(output: Path) -> None:
    """Print the grids' results and the study's settings."""
    for row in (*choices(), *weights()):
        found = [
            source_validation(job_of(row, regime, target, CHOICE_SEED, output / "choice", target_per_class=1))
            for regime, target in CHOICE_CELLS
        ]
        known = [value for value in found if value is not None]
        print(f"{row.name:<24}{statistics.fmean(known) if known else math.nan:>8.3f}   {found}")
    print(f"The study uses {LEARNING_RATES} and, beyond the paper, label weight {LABEL_WEIGHT}.")


def print_design(jobs: Sequence[tuple[StudyRow, TrainJob]], output: Path) -> None:
    """Print the rows of the study and how many of their jobs have completed, here or elsewhere."""
    elsewhere = recorded(output)
    rows = list({row.name: row for row, _ in jobs}.values())
    width = max(len(row.name) for row in rows) + 2
    print(f"{'row':<{width}}{'algorithm':<14}{'steps':>6}{'jobs':>6}{'done':>6}  hparams")
    for row in rows:
        own = [job for other, job in jobs if other.name == row.name]
        done = sum(job.done or name_of(job, output) in elsewhere for job in own)
        print(f"{row.name:<{width}}{row.algorithm:<14}{row.steps:>6}{len(own):>6}{done:>6}  {json.dumps(row.hparams)}")
    different = len({job.folder for _, job in jobs})  # rows may share jobs
    print(f"{len(jobs)} cells, {different} jobs. The first: {jobs[0][1].command}")


def choice_rows(output: Path) -> list[dict[str, Any]]:
    """Return the lines of ``choice.csv``, of finished jobs."""
    return [
        {"row": study_row.name, "regime": regime, "target": target, "seed": CHOICE_SEED, "source_validation": found}
        for study_row in (*choices(), *weights())
        for regime, target in CHOICE_CELLS
        for job in [job_of(study_row, regime, target, CHOICE_SEED, output / "choice", target_per_class=1)]
        if (found := source_validation(job)) is not None
    ]


def described_class(text: str) -> str | None:
    """Return the class whose parts a chain's caption names; None where it names those of none."""
    try:
        told = shapes.class_in_caption(parse_chain(text).caption)
    except ChainError:
        return None
    return None if told is None else shapes.CLASS_NAMES[told]


def cue_of(name: str) -> str | None:
    """Return the class whose hue is behind creatures of a class where the cue misleads."""
    return CLASS_NAMES[(CLASS_NAMES.index(name) + shapes.MISLEADING_SHIFT) % len(CLASS_NAMES)]
