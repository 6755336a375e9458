"""`analyze sarr-rounds` and `analyze faithfulness`: SARR's rounds, and whether conclusions follow chains."""

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
from domainbed_reasoning.commands.analyze_results import data_for, job_of, leave, note, plot, results_for, write
from domainbed_reasoning.terminal import counted

_NOT_IN_PAPER = "paper: not reported"


def run_rounds(args: argparse.Namespace) -> None:
    """Summarize SARR's rounds from the records and, on images, from the answers of the saved checkpoints."""
    checkpoints, columns = _jobs_of(args)
    results = results_for(args, f"sarr_rounds_{_about(checkpoints)}", *checkpoints)
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    answered = ("images", "words", "parsed", "agreement", "chain", "label")
    recorded = [rounds.from_records(job_of(one).folder, job_of(one).test_envs) for one in checkpoints]
    title = f"SARR by round, {_count(checkpoints)}"
    for checkpoint, about, found in zip(checkpoints, columns, recorded, strict=True):
        answers: dict[int, Any] = {}
        if args.images:
            material = data_for(args, checkpoint, False)
            samples = material.draw(material.domains(args.domains), args.images)
            steps = [row["step"] for row in found]
            folder = job_of(checkpoint).folder
            answers = rounds.from_checkpoints(folder, steps, material, samples, args.model, args.trust_remote_code)
            missing += filter(None, [rounds.without_checkpoint(folder, steps, answers)])
        for row in found:
            more = {key: answers.get(row["step"], {}).get(key) for key in answered} if args.images else {}
            rows.append({**about, **row, **more})
        leave(results, title, rows, "\n".join([*missing, rounds.PAPER]))
    shown = [{key: value for key, value in row.items() if key not in ("dataset", "setting")} for row in rows]
    write(results, title, rows, missing, rounds.PAPER, shown=shown)
    plot(results, lambda path: plots.rounds(rows, title, path))


def run_faithfulness(args: argparse.Namespace) -> None:
    """Measure what conclusions depend on. Results are written after each job, in case a later one fails."""
    checkpoints, columns = _jobs_of(args)
    results = results_for(args, f"faithfulness_{_about(checkpoints)}", *checkpoints)
    shares: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    failures: list[str] = []
    for number, (name, about) in enumerate(zip(args.jobs, columns, strict=True), 1):
        try:
            found, rows = _faithfulness_of(args, name)
        except (ValueError, OSError) as error:
            failures.append(f"{name}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        shares += [{**about, **row} for row in found]
        answers += [{**about, **row} for row in rows]
        leave(results, f"Faithfulness, {number - len(failures)} of {_count(checkpoints)}", shares, _NOT_IN_PAPER)
        write_csv(results.path("_answers.csv"), answers)
    if shares:
        title = f"Faithfulness, {len(args.jobs) - len(failures)} of {_count(checkpoints)}"
        pooled = faithfulness.pool(shares)
        write(results, title, shares, [f"excluded: {failure}" for failure in failures], _NOT_IN_PAPER, shown=pooled)
        note(results, f"Wrote {results.path('_answers.csv')}")
        plot(results, lambda path: plots.faithfulness(pooled, title, path))
    if failures:
        raise ValueError(f"{len(failures)} of {_count(checkpoints)} could not be analyzed: {'; '.join(failures)}")


def _faithfulness_of(args: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a job's shares and answers; its model is freed before the next one loads."""
    checkpoint = open_checkpoint(name, args.trust_remote_code)
    job = job_of(checkpoint)
    material = data_for(args, checkpoint, False)
    samples = material.draw(material.domains(args.domains), args.images)
    print(
        f"{name}: {checkpoint.title}, {len(samples)} images", file=sys.stderr if args.json else sys.stdout, flush=True
    )
    mllm = checkpoint.load(args.model)
    max_new_tokens, batch = job.hparams["max_new_tokens"], job.hparams["eval_batch"]
    reader = faithfulness.Reader(mllm, material, max_new_tokens, batch, job.exact_answers)
    return faithfulness.measure(reader, samples, cues_of(job.dataset))


def _jobs_of(args: argparse.Namespace) -> tuple[list[Checkpoint], list[dict[str, str]]]:
    """Return all jobs, validated without loading adapters before the first analysis, and columns that identify each.

    Raises:
        ValueError: if one is not a job; the message names it.
    """
    checkpoints = []
    for name in args.jobs:
        opened = open_checkpoint(name, args.trust_remote_code)
        checkpoints.append(dataclasses.replace(opened, job=dataclasses.replace(job_of(opened), adapters={})))
    columns = [
        {
            "job": name,
            "algorithm": job_of(one).algorithm,
            "dataset": job_of(one).dataset,
            "held_out": one.held_out,
            "setting": setting,
        }
        for name, one, setting in zip(_distinct(checkpoints), checkpoints, settings_of(checkpoints), strict=True)
    ]
    return checkpoints, columns


def _distinct(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the jobs' names in tables, those that several have with as much of their paths as tells them apart."""
    names = [one.where for one in checkpoints]
    above = [job_of(one).folder.resolve().parts[:-1] for one in checkpoints]
    for depth in range(1, max(map(len, above))):
        if not any(names.count(name) > 1 for name in names):
            break
        names = [
            "/".join((*path[-depth:], one.where)) if names.count(name) > 1 else name
            for name, path, one in zip(names, above, checkpoints, strict=True)
        ]
    return names


def _about(checkpoints: Sequence[Checkpoint]) -> str:
    """Return the part of file names that identifies a list of jobs."""
    if len(checkpoints) == 1:
        return checkpoints[0].tag
    jobs = [job_of(one) for one in checkpoints]
    words = [*dict.fromkeys(job.dataset for job in jobs), *dict.fromkeys(job.algorithm for job in jobs)]
    return words_of_file("_".join(words))[:80]


def _count(checkpoints: Sequence[Checkpoint]) -> str:
    return counted(len(checkpoints), "job")
