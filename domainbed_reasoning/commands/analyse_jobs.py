"""`analyse sarr-rounds` and `analyse faithfulness`: what jobs did, and what their models do with a chain."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from domainbed_reasoning.analysis import faithfulness, plots, rounds
from domainbed_reasoning.analysis.checkpoints import Checkpoint, open_checkpoint, words_of_file
from domainbed_reasoning.analysis.cues import cues_of
from domainbed_reasoning.analysis.settings import settings_of
from domainbed_reasoning.analysis.tables import write_csv
from domainbed_reasoning.commands.analyse_results import data_for, job_of, leave, plot, results_for, write

_NOT_IN_PAPER = "paper: no such analysis"


def run_rounds(given: argparse.Namespace) -> None:
    """Tell SARR's rounds, as recorded and, of images, as the saved checkpoints answer."""
    checkpoints, told = _jobs_of(given)
    results = results_for(given, f"sarr_rounds_{_about(checkpoints)}", *checkpoints)
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    asked = ("images", "words", "parsed", "agreement", "chain", "label")
    recorded = [rounds.from_records(job_of(one).folder, job_of(one).test_envs) for one in checkpoints]
    title = f"SARR by round, {_count(checkpoints)}"
    for checkpoint, about, found in zip(checkpoints, told, recorded, strict=True):
        answers: dict[int, Any] = {}
        if given.images:
            material = data_for(given, checkpoint, False)
            samples = material.draw(material.domains(given.domains), given.images)
            steps = [row["step"] for row in found]
            folder = job_of(checkpoint).folder
            answers = rounds.from_checkpoints(folder, steps, material, samples, given.model)
            missing += filter(None, [rounds.without_checkpoint(folder, steps, answers)])
        for row in found:
            more = {key: answers.get(row["step"], {}).get(key) for key in asked} if given.images else {}
            rows.append({**about, **row, **more})
        leave(results, title, rows, "\n".join([*missing, rounds.PAPER]))
    shown = [{key: value for key, value in row.items() if key not in ("dataset", "setting")} for row in rows]
    write(results, title, rows, missing, rounds.PAPER, shown=shown)
    plot(results, lambda path: plots.rounds(rows, title, path))


def run_faithfulness(given: argparse.Namespace) -> None:
    """Measure what conclusions follow; what is measured of a job is written before the next one, which may fail."""
    checkpoints, told = _jobs_of(given)
    results = results_for(given, f"faithfulness_{_about(checkpoints)}", *checkpoints)
    shares: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, (name, about) in enumerate(zip(given.jobs, told, strict=True), 1):
        try:
            found, rows = _faithfulness_of(given, name)
        except (ValueError, OSError) as error:
            faults.append(f"{name}: {error}")
            print(faults[-1], file=sys.stderr, flush=True)
            continue
        shares += [{**about, **row} for row in found]
        answers += [{**about, **row} for row in rows]
        leave(results, f"Faithfulness, {number - len(faults)} of {_count(checkpoints)}", shares, _NOT_IN_PAPER)
        write_csv(results.path("_answers.csv"), answers)
    if shares:
        title = f"Faithfulness, {len(given.jobs) - len(faults)} of {_count(checkpoints)}"
        pooled = faithfulness.pool(shares)
        write(results, title, shares, [f"left out: {fault}" for fault in faults], _NOT_IN_PAPER, shown=pooled)
        print(f"written: {results.path('_answers.csv')}")
        plot(results, lambda path: plots.faithfulness(pooled, title, path))
    if faults:
        raise ValueError("\n".join(["not analysed:", *faults]))


def _faithfulness_of(given: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a job's shares and answers; its model is gone before the next one loads."""
    checkpoint = open_checkpoint(name)
    job = job_of(checkpoint)
    material = data_for(given, checkpoint, False)
    samples = material.draw(material.domains(given.domains), given.images)
    print(f"{name}: {checkpoint.said}, {len(samples)} images", flush=True)
    mllm = checkpoint.load(given.model)
    max_new_tokens, batch = job.hparams["max_new_tokens"], job.hparams["eval_batch"]
    reader = faithfulness.Reader(mllm, material, max_new_tokens, batch, job.exact_answers)
    return faithfulness.measure(reader, samples, cues_of(job.dataset))


def _jobs_of(given: argparse.Namespace) -> tuple[list[Checkpoint], list[dict[str, str]]]:
    """Return all jobs, opened before the first is looked at and without their adapters, and what tells rows of each.

    Raises:
        ValueError: naming the first that is none.
    """
    checkpoints = []
    for name in given.jobs:
        opened = open_checkpoint(name)
        checkpoints.append(dataclasses.replace(opened, job=dataclasses.replace(job_of(opened), adapters={})))
    told = [
        {
            "job": one.where,
            "algorithm": job_of(one).algorithm,
            "dataset": job_of(one).dataset,
            "held_out": one.held_out,
            "setting": setting,
        }
        for one, setting in zip(checkpoints, settings_of(checkpoints), strict=True)
    ]
    return checkpoints, told


def _about(checkpoints: Sequence[Checkpoint]) -> str:
    """Return what names of files call some jobs."""
    if len(checkpoints) == 1:
        return checkpoints[0].tag
    jobs = [job_of(one) for one in checkpoints]
    words = [*dict.fromkeys(job.dataset for job in jobs), *dict.fromkeys(job.algorithm for job in jobs)]
    return words_of_file("_".join(words))[:80]


def _count(checkpoints: Sequence[Checkpoint]) -> str:
    return f"{len(checkpoints)} job{'s' if len(checkpoints) > 1 else ''}"
