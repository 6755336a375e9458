"""The rows of the real run, their jobs and their learning rates.

Every trained row takes the same number of updates with the same batch, RD-MLDG a quarter of them as MTCT and the rest
in three rounds. The learning rates of LabelSFT, ReasoningSFT and MTCT are the best of three by accuracy on the
validation splits of the source domains, with trial seed 0 and the first domain held out; RD-MLDG takes MTCT's. The run
itself has trial seed 1. No accuracy on a target domain chooses anything.

ERM has no row: at PACS's 224 pixels DomainBed's only network is a ResNet from ImageNet weights, which stock DomainBed
downloads. Its small CNN takes images of 28 pixels alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.sweeps.miniature.study import TARGETS, StudyRow, source_validation
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob, make_job

DATASET = "PACSReasoning"
CHOICE_SEED, CHOICE_TARGET, TEST_SEED = 0, 0, 1
RATES_TRIED = (1.5e-4, 5e-4, 1.5e-3)  # the paper's, and a factor of about 3 to either side
RATES_FILE = "learning_rates.json"
BATCH = 3  # of each source domain: 9 images an update

# The longest bundled chain has 250 of this model's tokens. On a CPU, bfloat16 is 2.5 times as fast as float32.
OF_ALL = {"batch_size": BATCH, "dtype": "bfloat16", "eval_batch": 56, "max_new_tokens": 288}
OF_TRAINED = OF_ALL | {"micro_batch": 9}
ROUNDS = {"mtct_epochs": 1, "sarr_epochs": 1, "sarr_rounds": 3}  # stages of equal length in a fixed number of steps


@dataclass(frozen=True)
class Settings:
    """What determines the jobs.

    Attributes:
        model: folder or name of the base model.
        output: folder of the run.
        per_class: images of each class and domain.
        steps: updates of every trained row.
    """

    model: str
    output: Path
    per_class: int
    steps: int


def trained(name: str, algorithm: str, folder: str = "main", **hparams: Any) -> StudyRow:
    """Return a row that is trained; its steps are the run's."""
    return StudyRow(name, algorithm, OF_TRAINED | hparams, seeds=(TEST_SEED,), folder=folder)


ZERO_SHOT = StudyRow("MLLMZeroShot", "MLLMZeroShot", OF_ALL, steps=1, seeds=(TEST_SEED,))
TUNED = (
    trained("LabelSFT", "LabelSFT", both_answers=False),
    trained("ReasoningSFT", "ReasoningSFT", both_answers=False),
    trained("MTCT", "MTCT"),
)
ROWS = (
    ZERO_SHOT,
    *TUNED,
    trained("RDMLDG", "RDMLDG", **ROUNDS),
    trained("RDMLDG balanced", "RDMLDG", folder="RDMLDG_balanced", gradient_balance="norm", **ROUNDS),
)


def job_of(row: StudyRow, target: int, seed: int, settings: Settings, sweep: Path, **hparams: Any) -> TrainJob:
    """Return the job of a row, evaluated after its last step."""
    steps = row.steps if row is ZERO_SHOT else settings.steps
    own = {"model": settings.model, **row.hparams, **hparams}
    if row is not ZERO_SHOT:
        own["first_evaluation"] = steps
    return make_job(
        sweep, DATASET, row.algorithm, [target], data_dir=str(settings.output / "data"), trial_seed=seed,
        hparams=dict(sorted(own.items())), steps=steps, checkpoint_freq=steps,
    )  # fmt: skip


def grid(settings: Settings) -> list[tuple[StudyRow, float, TrainJob]]:
    """Return the jobs of the learning-rate grid, each with its row and rate."""
    return [
        (row, rate, job_of(row, CHOICE_TARGET, CHOICE_SEED, settings, settings.output / f"choice/lr{rate:g}", lr=rate))
        for row in TUNED
        for rate in RATES_TRIED
    ]


def best_rates(scores: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """Return each row's rate with the highest source validation; the lower rate on a tie.

    Means of the same accuracies in another order of domains are a tie, though their last digits may differ.
    """
    return {name: min(of_row, key=lambda rate: (-round(of_row[rate], 6), rate)) for name, of_row in scores.items()}


def choose(settings: Settings) -> dict[str, float] | None:
    """Write the rates that the grid selects, with all its scores; return None while jobs of the grid are missing."""
    scores: dict[str, dict[float, float]] = {row.name: {} for row in TUNED}
    for row, rate, job in grid(settings):
        if (found := source_validation(job)) is not None:
            scores[row.name][rate] = found
            print(f"{row.name:<14} lr {rate:<8g} source validation {found:.3f}")
    if missing := len(grid(settings)) - sum(map(len, scores.values())):
        print(f"{missing} jobs of the grid have not completed: no rates are selected. Rerun --choose to resume.")
        return None
    rates = best_rates(scores)
    content = {"rates": rates, "source_validation": scores, "trial_seed": CHOICE_SEED, "target": CHOICE_TARGET}
    replace_text(settings.output / RATES_FILE, json.dumps(content, indent=1) + "\n")
    print(f"Wrote {settings.output / RATES_FILE}: {json.dumps(rates)}")
    return rates


def chosen_rates(output: Path) -> dict[str, float]:
    """Return the rates that `choose` wrote; empty without any."""
    path = output / RATES_FILE
    return dict(json.loads(path.read_text())["rates"]) if path.exists() else {}


def cells(settings: Settings) -> list[tuple[StudyRow, int, TrainJob]]:
    """Return the jobs of the run with their row and target, domain by domain.

    Zero-shot does not depend on the target: its one job, first, answers all domains.

    Raises:
        ValueError: no rates have been chosen.
    """
    rates = chosen_rates(settings.output)
    if not rates:
        raise ValueError(f"no learning rates in {settings.output / RATES_FILE}. Run --choose first, which writes it.")
    found = [(ZERO_SHOT, 0, job_of(ZERO_SHOT, 0, TEST_SEED, settings, settings.output / "main"))]
    for target in TARGETS:
        for row in ROWS[1:]:
            rate = rates.get(row.name, rates["MTCT"])
            found.append((row, target, job_of(row, target, TEST_SEED, settings, settings.output / row.folder, lr=rate)))
    return found
