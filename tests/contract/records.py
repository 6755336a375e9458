"""Folders of DomainBed-like records, written from a seed, for both implementations to read."""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import random
import sys
from dataclasses import dataclass

ENVIRONMENTS = {"Debug28": 3, "Debug224": 3, "VLCS": 4, "PACS": 4, "OfficeHome": 4, "DomainNet": 6}


@dataclass(frozen=True)
class Plan:
    """What a folder of records holds.

    Attributes:
        algorithms: names, known to the library or not.
        datasets: keys of ``ENVIRONMENTS``.
        trials: number of trial seeds.
        hparams_seeds: number of hparams seeds.
        steps: the steps of each job's records.
        pairs: also write the jobs with two test environments.
        missing: probability in [0, 1] that a job left no record.
        short: probability in [0, 1] that a job stopped before its last records.
        levels: accuracies are multiples of 1/levels, so that a small number makes ties.
    """

    algorithms: tuple[str, ...] = ("ERM", "IRM")
    datasets: tuple[str, ...] = ("Debug28",)
    trials: int = 2
    hparams_seeds: int = 2
    steps: tuple[int, ...] = (0, 100, 200)
    pairs: bool = True
    missing: float = 0.0
    short: float = 0.0
    levels: int = 10_000


def jobs(plan: Plan) -> list[dict]:
    """Return the arguments of every job of the plan, in a fixed order."""
    found = []
    for trial, dataset, algorithm in itertools.product(range(plan.trials), plan.datasets, plan.algorithms):
        everything = range(ENVIRONMENTS[dataset])
        test_sets = [[i] for i in everything] + [list(p) for p in itertools.combinations(everything, 2) if plan.pairs]
        for test_envs, hparams_seed in itertools.product(test_sets, range(plan.hparams_seeds)):
            found.append(
                {
                    "algorithm": algorithm,
                    "dataset": dataset,
                    "test_envs": test_envs,
                    "hparams_seed": hparams_seed,
                    "trial_seed": trial,
                    "seed": 0,
                    "data_dir": "data",
                    "output_dir": "out",
                    "holdout_fraction": 0.2,
                    "task": "domain_generalization",
                    "steps": plan.steps[-1] + 1,
                    "hparams": None,
                }
            )
    return found


def write_records(folder: pathlib.Path, plan: Plan, seed: int) -> int:
    """Write one sub-folder a job, as ``train`` leaves them, and return the number of records written."""
    draw = random.Random(seed)
    total = 0
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs(plan):
        name = hashlib.sha1(f"{seed} {json.dumps(job, sort_keys=True)}".encode()).hexdigest()[:32]
        (folder / name).mkdir()
        if draw.random() < plan.missing:
            continue
        steps = plan.steps[: draw.randint(1, len(plan.steps))] if draw.random() < plan.short else plan.steps
        lines = []
        for step in steps:
            record = {"step": step, "epoch": step / 7, "loss": draw.random(), "step_time": 0.1, "mem_gb": 0.0}
            for env in range(ENVIRONMENTS[job["dataset"]]):
                for split in ("in", "out"):
                    record[f"env{env}_{split}_acc"] = draw.randint(0, plan.levels) / plan.levels
            record["args"], record["hparams"] = job, {"lr": 0.001 * (1 + job["hparams_seed"]), "batch_size": 32}
            lines.append(json.dumps(record, sort_keys=True))
        total += len(lines)
        (folder / name / "results.jsonl").write_text("".join(line + "\n" for line in lines))
    return total


def random_plan(seed: int) -> tuple[Plan, int]:
    """Return a plan that the seed draws, with everything that can be missing missing somewhere."""
    draw = random.Random(f"plan {seed}")
    plan = Plan(
        algorithms=tuple(
            draw.sample(["ERM", "IRM", "GroupDRO", "Mixup", "CORAL", "Zeta", "Alpha"], draw.randint(1, 3))
        ),
        datasets=tuple(draw.sample(sorted(ENVIRONMENTS), draw.randint(1, 2))),
        trials=draw.randint(1, 3),
        hparams_seeds=draw.choice([1, 2, 3]),
        steps=tuple(range(0, 100 * draw.randint(1, 4), 100)),
        pairs=draw.random() < 0.7,
        missing=draw.choice([0.0, 0.1, 0.5]),
        short=draw.choice([0.0, 0.5]),
        levels=draw.choice([1, 3, 10_000]),
    )
    return plan, seed


SETS: dict[str, tuple[Plan, int]] = {
    "full": (Plan(("CORAL", "ERM", "NewThing", "AnotherThing"), ("PACS", "Debug28")), 1),
    "gaps": (Plan(("IRM", "ERM"), ("PACS", "Debug28"), trials=1, missing=0.3, short=0.2), 2),
    "ties": (
        Plan(("Mixup", "ERM"), ("OfficeHome", "Debug28"), trials=3, hparams_seeds=3, levels=3, missing=0.05, short=0.2),
        3,
    ),
    "many_seeds": (Plan(("ERM",), ("Debug28",), trials=2, hparams_seeds=12, levels=2, steps=(5, 20, 100, 1000)), 4),
    "no_pairs": (Plan(("ERM",), ("VLCS",), trials=1, hparams_seeds=1, pairs=False), 5),
    "one_step": (Plan(("GroupDRO",), ("DomainNet",), trials=1, hparams_seeds=1, steps=(0,)), 6),
    "nothing": (Plan((), ()), 7),
    **{f"random{seed}": random_plan(seed) for seed in range(8)},
}

if __name__ == "__main__":
    for set_name, (set_plan, set_seed) in SETS.items():
        write_records(pathlib.Path(sys.argv[1], set_name), set_plan, set_seed)
