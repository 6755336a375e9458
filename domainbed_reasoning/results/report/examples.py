"""Example chains with their images: right and wrong ones, sampled by hash, for every target domain."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from domainbed_reasoning.chains.chain import STAGES, ChainError
from domainbed_reasoning.chains.reader import read_chain
from domainbed_reasoning.images import creatures, shapes
from domainbed_reasoning.images import user_datasets as custom
from domainbed_reasoning.images.decode import file_below, read_rgb
from domainbed_reasoning.jobs.job_files import numbered_lines
from domainbed_reasoning.jobs.values import prediction_problem
from domainbed_reasoning.results.job_folders import JobFolder
from domainbed_reasoning.results.report.blocks import Example, Examples, verdict
from domainbed_reasoning.results.selection import domains_of

PREDICTIONS = "predictions.jsonl"
_EDGE, _QUALITY = 192, 75  # of thumbnails: pixels, WebP's quality
_LONGEST_CHAIN = 6000  # characters

OpenPicture = Callable[[int, int, str], Image.Image]  # of (environment, index, name)


def examples_of(
    jobs: Sequence[JobFolder], count: int, data_dir: str | None = None, left_out: list[str] | None = None
) -> Iterator[Examples]:
    """Yield the examples of one algorithm on one dataset, one group per target domain.

    Args:
        jobs: of that algorithm and dataset, with one target domain each; the lowest trial of each domain is shown.
        count: number of correct and of wrong examples per domain.
        data_dir: folder of the images, if not that of the jobs.
        left_out: receives the problems of invalid lines of predictions.
    """
    left_out = [] if left_out is None else left_out
    shown = set()
    for job in sorted(jobs, key=lambda job: (job.args["test_envs"], job.args["trial_seed"], job.args["hparams_seed"])):
        (target,) = job.args["test_envs"]
        rows = [] if target in shown else [row for row in predictions_of(job, target, left_out) if row["chain"]]
        if not rows:
            continue
        shown.add(target)
        domain = domains_of(job.args["dataset"], [job])[target]
        verdicts = [_verdict(row) for row in rows]
        right, unparsed = verdicts.count("right"), verdicts.count("no class")
        caption = f"{domain}: {right} of {len(rows)} chains conclude correctly ({right / len(rows):.0%})"
        caption += f", {unparsed} name no class" if unparsed else ""
        open_picture = _pictures(job, data_dir)
        yield Examples(caption, tuple(_example(row, open_picture) for row in _sample(rows, count)))


def predictions_of(job: JobFolder, target: int, left_out: list[str]) -> list[Mapping[str, Any]]:
    """Return the target domain's lines of predictions.jsonl; empty without that file.

    Args:
        job: the job.
        target: number of the domain.
        left_out: receives the problems of invalid lines.
    """
    rows: list[Mapping[str, Any]] = []
    damage: list[str] = []
    for number, line in numbered_lines(job.folder / PREDICTIONS, damage):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            damage.append(f"{PREDICTIONS}, line {number}: {str(error):.60}")
            continue
        if problem := prediction_problem(row):
            damage.append(f"{PREDICTIONS}, line {number}: {problem}")
        elif row["env"] == target:
            rows.append(row)
    if damage:
        more = f"; and {len(damage) - 3} more" if len(damage) > 3 else ""
        left_out.append(f"{job.path}: {'; '.join(damage[:3])}{more}")
    return rows


def _verdict(row: Mapping[str, Any]) -> str:
    return verdict(row["chain_answer"], row["label"])


def _sample(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return ``count`` correct examples, ``count`` wrong ones and one that names no class, sampled by name hash."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(str(row["image"]).encode("utf-8", "replace")).digest())
    numbers = {"right": count, "wrong": count, "no class": min(count, 1)}
    return [
        row for verdict, number in numbers.items() for row in [r for r in ordered if _verdict(r) == verdict][:number]
    ]


def _example(row: Mapping[str, Any], open_picture: OpenPicture) -> Example:
    chain = str(row["chain"])
    try:
        parsed, _ = read_chain(chain)
        stages = {stage: getattr(parsed, stage.lower()) for stage in STAGES}
    except ChainError:
        stages = {}
    return Example(
        image=str(row["image"]),
        picture=_thumbnail(row, open_picture),
        label=str(row["label"]),
        label_answer=None if row["label_answer"] is None else str(row["label_answer"]),
        chain_answer=None if row["chain_answer"] is None else str(row["chain_answer"]),
        stages={stage: text[:_LONGEST_CHAIN] for stage, text in stages.items()},
        chain=chain[:_LONGEST_CHAIN],
    )


def _thumbnail(row: Mapping[str, Any], open_picture: OpenPicture) -> bytes | None:
    try:
        small = open_picture(row["env"], row.get("index", -1), row["image"])
    except (OSError, ValueError, IndexError):
        return None  # the page shows "image not found"
    out = io.BytesIO()
    lossless = max(small.size) <= _EDGE // 2
    small.thumbnail((_EDGE, _EDGE))
    small.save(out, "WEBP", quality=_QUALITY, lossless=lossless, method=3)
    return out.getvalue()


def _pictures(job: JobFolder, data_dir: str | None) -> OpenPicture:
    """Return a function that opens the job's images: files below its dataset's folder, or rendered ones.

    The job's files are untrusted; only images are made from them.
    """
    dataset, targets = job.args["dataset"], job.args["test_envs"]

    def render(env: int, index: int, name: str) -> Image.Image:
        rho = job.hparams.get("rho", shapes.RHO)
        known = rho if isinstance(rho, int | float) else shapes.RHO
        return shapes.render(env, index, misleading=env in targets, rho=known)

    def open_file(env: int, index: int, name: str) -> Image.Image:
        folder = custom.find(dataset).folder
        place = Path(data_dir or str(job.args.get("data_dir", ""))).expanduser()
        sweep = job.folder.resolve().parent
        if place.resolve().is_relative_to(sweep):  # links in a sweep's folder are untrusted
            file_below(sweep, place.resolve() / folder)
        picture: Image.Image = read_rgb(file_below(place / folder, name), draft=2 * _EDGE)
        return picture

    def creature(env: int, index: int, name: str) -> Image.Image:
        return creatures.render(creatures.REGIME_OF[dataset], env, index)

    return creature if dataset in creatures.REGIME_OF else render if dataset == "ShapesReasoning" else open_file
