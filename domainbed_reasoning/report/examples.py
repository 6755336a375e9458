"""Example chains with their images: right and wrong ones, drawn by a hash and not by hand, for every target domain."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from domainbed_reasoning import custom, registry
from domainbed_reasoning.chains import STAGES, ChainError, parse_chain
from domainbed_reasoning.collect.jobs import Job
from domainbed_reasoning.collect.selection import domains_of
from domainbed_reasoning.plain_files import plain_lines
from domainbed_reasoning.report.blocks import Example, Examples

PREDICTIONS = "predictions.jsonl"
_EDGE, _QUALITY = 192, 75  # of thumbnails: pixels, WebP's quality
_LONGEST_CHAIN = 6000  # characters
_LONGEST_LINE, _LARGEST_FILE = 1 << 20, 1 << 30  # bytes of predictions.jsonl
_KEYS = ("env", "image", "label", "label_answer", "chain_answer", "chain")

OpenPicture = Callable[[int, int, str], Image.Image]  # of (environment, index, name)


def examples_of(jobs: Sequence[Job], count: int, data_dir: str | None = None) -> Iterator[Examples]:
    """Yield the examples of one algorithm on one dataset, a group a target domain.

    Args:
        jobs: of that algorithm and dataset, with one target domain each; of each domain the lowest trial is shown.
        count: how many right, and how many wrong ones of each domain.
        data_dir: where the images are, if not where the jobs found them.
    """
    shown = set()
    for job in sorted(jobs, key=lambda job: (job.args["test_envs"], job.args["trial_seed"], job.args["hparams_seed"])):
        (target,) = job.args["test_envs"]
        rows = _answers(job, target)
        if target in shown or not rows:
            continue
        shown.add(target)
        domain = domains_of(job.args["dataset"], [job])[target]
        verdicts = [_verdict(row) for row in rows]
        right, unparsed = verdicts.count("right"), verdicts.count("no class")
        caption = f"{domain}: {right} of {len(rows)} chains conclude rightly ({right / len(rows):.0%})"
        caption += f", {unparsed} name no class" if unparsed else ""
        open_picture = _pictures(job, data_dir)
        yield Examples(caption, tuple(_example(row, open_picture) for row in _drawn(rows, count)))


def _answers(job: Job, target: int) -> list[Mapping[str, Any]]:
    """Return the target domain's images with a chain, of predictions.jsonl; none where there is no such file."""
    rows: list[Mapping[str, Any]] = []
    with contextlib.suppress(FileNotFoundError):
        for line in plain_lines(job.folder / PREDICTIONS, _LONGEST_LINE, _LARGEST_FILE):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the file is written at once; a damaged one shows what it has
            if isinstance(row, dict) and row.get("env") == target and row.get("chain") and set(_KEYS) <= row.keys():
                rows.append(row)
    return rows


def _verdict(row: Mapping[str, Any]) -> str:
    if row["chain_answer"] is None:
        return "no class"
    return "right" if row["chain_answer"] == row["label"] else "wrong"


def _drawn(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Return ``count`` right ones, ``count`` wrong ones and one that names no class, by the hash of their names."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(str(row["image"]).encode("utf-8", "replace")).digest())
    wanted = {"right": count, "wrong": count, "no class": min(count, 1)}
    return [
        row for verdict, number in wanted.items() for row in [r for r in ordered if _verdict(r) == verdict][:number]
    ]


def _example(row: Mapping[str, Any], open_picture: OpenPicture) -> Example:
    chain = str(row["chain"])
    try:
        parsed = parse_chain(chain)
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
        small = open_picture(row["env"], row.get("index", -1), str(row["image"])).convert("RGB")
    except (OSError, ValueError, IndexError, SyntaxError, Image.DecompressionBombError):
        return None  # the page says that it is not there
    out = io.BytesIO()
    lossless = max(small.size) <= _EDGE // 2
    small.thumbnail((_EDGE, _EDGE))
    small.save(out, "WEBP", quality=_QUALITY, lossless=lossless, method=3)
    return out.getvalue()


def _pictures(job: Job, data_dir: str | None) -> OpenPicture:
    """Return what opens the images that a job saw: files below its dataset's folder, or what it rendered."""
    dataset = job.args["dataset"]
    if dataset in registry.EMBEDDED_DATASETS:
        return _rendered(dataset, tuple(job.args["test_envs"]), json.dumps(dict(job.hparams)))
    place = Path(data_dir or str(job.args.get("data_dir", ""))).expanduser()

    def open_file(env: int, index: int, name: str) -> Image.Image:
        root = (place / custom.find(dataset).folder).resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"{name} is not below {root}")
        return Image.open(path)

    return open_file


@functools.lru_cache(maxsize=16)
def _rendered(dataset: str, test_envs: tuple[int, ...], hparams: str) -> OpenPicture:
    """Return what renders an image of an embedded dataset, as the job's own dataset object does."""
    cls = registry.load(registry.DATASETS[dataset])
    defaults = {name: hparam.default_on(dataset) for name, hparam in cls.HPARAMS.items()}  # newer than the job's
    with contextlib.redirect_stdout(io.StringIO()):  # it tells the job's log how many chains there are
        made = cls(None, list(test_envs), defaults | json.loads(hparams))

    def render(env: int, index: int, name: str) -> Image.Image:
        picture: Image.Image = made.datasets[env].open_image(index)
        return picture

    return render
