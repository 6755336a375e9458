"""The table of the real run, from its job folders: complete or not.

``numbers.json`` has every number, ``table.md`` the tables, ``chains.md`` chains to read, and ``sample.json`` and
``learning_rates.json`` are copies of the run's.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge import versions
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.sweeps.miniature.paired import Estimate, compare, estimate
from domainbed_reasoning.sweeps.miniature.study import TARGETS, StudyRow
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob
from examples.real_small.rows import RATES_FILE, ROWS, TEST_SEED, ZERO_SHOT, Settings, cells
from examples.real_small.sample import RECORD

Numbers = dict[str, Any]
ANSWERS = ("domainbed", "label", "chain")
COMPARISONS = (
    ("LabelSFT", "MLLMZeroShot"), ("ReasoningSFT", "LabelSFT"), ("MTCT", "LabelSFT"), ("MTCT", "ReasoningSFT"),
    ("RDMLDG", "MTCT"), ("RDMLDG balanced", "RDMLDG"),
)  # fmt: skip
SHOWN = 2  # chains of each class, right and wrong each
Z = 1.96


def wilson(right: float, images: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share: ``right`` of ``images``."""
    share, square = right / images, Z * Z / images
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / images + square / (4 * images)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def cell_of(job: TrainJob, target: int) -> Numbers:
    """Return the numbers of a completed job on the images of a domain, both splits; shares are in [0, 1]."""
    last = _records(job)[-1]
    lines = [line for line in predictions(job) if line["env"] == target]
    sizes = {split: sum(line["split"] == split for line in lines) for split in ("in", "out")}
    found: Numbers = {
        "images": len(lines),
        "domainbed": sum(sizes[split] * last[f"env{target}_{split}_acc"] for split in sizes) / len(lines),
    }
    if any(line["label_answer"] is not None for line in lines):
        found["label"] = statistics.fmean(line["label_answer"] == line["label"] for line in lines)
    if chains := [line for line in lines if line["chain"] is not None]:
        found["chain"] = statistics.fmean(line["chain_answer"] == line["label"] for line in lines)
        found["well_formed"] = statistics.fmean(bool(line["well_formed"]) for line in chains)
        found["unparsed"] = statistics.fmean(line["chain_answer"] is None for line in chains)
    found["intervals"] = {kind: wilson(found[kind] * len(lines), len(lines)) for kind in ANSWERS if kind in found}
    return found


def training_of(job: TrainJob, output: Path) -> Numbers:
    """Return what a completed job recorded of its training, and its terms where they have been measured."""
    records = _records(job)
    found: Numbers = {"kept": [records[-1][key] for k in (1, 2, 3) if (key := f"sarr{k}_accepted") in records[-1]]}
    for name in ("label_loss", "chain_loss", "label_scale"):
        if values := [record[name] for record in records if name in record]:
            found[name] = {"first": values[0], "last": values[-1]}
    target = "_".join(map(str, job.arguments["test_envs"]))
    for name, stem in (("before", f"before_target{target}"), ("after", job.folder.name)):
        path = output / "terms" / f"{stem}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    return found


def predictions(job: TrainJob) -> list[Numbers]:
    """Return the lines of a job's predictions.jsonl."""
    return [json.loads(line) for line in (job.folder / "predictions.jsonl").read_text().splitlines()]


def _records(job: TrainJob) -> list[Numbers]:
    return [json.loads(line) for line in (job.folder / "results.jsonl").read_text().splitlines()]


def numbers_of(settings: Settings) -> Numbers:
    """Return all numbers of the completed jobs and how many jobs are missing."""
    jobs = cells(settings)
    rows: dict[str, Numbers] = {row.name: {"targets": {}, "training": {}} for row in ROWS}
    for row, target, job in jobs:
        if job.done:
            for env in TARGETS if row is ZERO_SHOT else (target,):
                rows[row.name]["targets"][env] = cell_of(job, env)
            if row is not ZERO_SHOT:
                rows[row.name]["training"][target] = training_of(job, settings.output)
    for row in ROWS:
        rows[row.name]["average"] = {
            kind: _average(rows[row.name]["targets"], kind)
            for kind in ANSWERS
            if any(kind in cell for cell in rows[row.name]["targets"].values())
        }
    return {
        "per_class": settings.per_class,
        "steps": settings.steps,
        "trial_seed": TEST_SEED,
        "jobs": len(jobs),
        "missing": sum(not job.done for _, _, job in jobs),
        "versions": next((_versions(job) for _, _, job in jobs if job.done), None),
        "environments": _environments(jobs),
        "rows": rows,
        "comparisons": [
            found for pair in COMPARISONS if (found := _comparison(rows, *pair)) is not None
        ],
        "commands": [job.command.replace(str(settings.output), "OUTPUT").replace(settings.model, "MODEL")
                     for _, _, job in jobs],
    }  # fmt: skip


def _average(targets: Mapping[int, Numbers], kind: str) -> Numbers:
    """Return the mean over domains: its interval for another domain (t), and for other images of these domains."""
    own = {env: cell for env, cell in targets.items() if kind in cell}
    found = estimate({(env, TEST_SEED): cell[kind] for env, cell in own.items()})
    variance = sum(cell[kind] * (1 - cell[kind]) / cell["images"] for cell in own.values())
    return _finite(found) | {"half_images": Z * math.sqrt(variance) / len(own)}


def _finite(found: Estimate) -> Numbers:
    return {"mean": found.mean, "domains": found.domains, "half": found.half if math.isfinite(found.half) else None}


def _comparison(rows: Mapping[str, Numbers], first: str, second: str) -> Numbers | None:
    values = [{(env, TEST_SEED): cell["domainbed"] for env, cell in rows[name]["targets"].items()}
              for name in (first, second)]  # fmt: skip
    found = compare(*values)
    if found is None:
        return None
    return {"first": first, "second": second, "p": found.estimate.p, **_finite(found.estimate)}


def _versions(job: TrainJob) -> Any:
    path = job.folder / versions.FILE
    return json.loads(path.read_text()) if path.exists() else None


def _environments(jobs: Sequence[tuple[StudyRow, int, TrainJob]]) -> list[str]:
    for _, _, job in jobs:
        if job.done:
            return list(json.loads((job.folder / "task.json").read_text())["environments"])
    return [f"domain {target}" for target in TARGETS]


def write(settings: Settings, results: Path) -> None:
    """Write the results folder.

    Args:
        settings: of the run.
        results: folder to write.

    Raises:
        ValueError: no learning rates have been chosen.
    """
    found = numbers_of(settings)
    results.mkdir(parents=True, exist_ok=True)
    replace_text(results / "numbers.json", json.dumps(found, indent=1) + "\n")
    replace_text(results / "table.md", render(found))
    replace_text(results / "chains.md", chains_to_read(settings))
    for name in (RECORD, RATES_FILE):
        shutil.copyfile(settings.output / name, results / name)
    print(f"{found['jobs'] - found['missing']} of {found['jobs']} jobs completed. Wrote {results}.")


def render(found: Numbers) -> str:
    """Return the tables as Markdown."""
    names = found["environments"]
    text = [
        "<!-- written by `python -m examples.real_small.run --table` -->",
        f"{found['per_class']} images a class and domain, {found['steps']} updates, trial seed {found['trial_seed']}.",
    ]
    if found["missing"]:
        text.append(f"**Unfinished: {found['missing']} of {found['jobs']} jobs are missing.**")
    text += [
        "Percent of the target's images. By domain: Wilson's 95% interval. Average: `±` for another domain (t over the",
        "domains), `[±]` for other images of these domains. One training seed: its variance is in neither.",
    ]
    for kind, title in zip(ANSWERS, ("DomainBed's answer", "By label", "By chain"), strict=True):
        text += ["", f"## {title}", "", f"| row | {' | '.join(names)} | average |", "|---" * (len(names) + 2) + "|"]
        for name, row in found["rows"].items():
            if kind in row["average"]:
                shown = [_share(row["targets"].get(env), kind) for env in range(len(names))]
                text.append(f"| {name} | {' | '.join([*shown, _written(row['average'][kind])])} |")
    text += ["", "## Differences in points, DomainBed's answer", "", "| comparison | domains | difference | p |"]
    text.append("|---|---|---|---|")
    for one in found["comparisons"]:
        shown = f"{100 * one['mean']:+.1f} ± {_width(one['half'])}"
        text.append(f"| {one['first']} against {one['second']} | {one['domains']} | {shown} | {one['p']:.2f} |")
    return "\n".join([*text, *_chain_table(found), *_term_table(found)]) + "\n"


def _chain_table(found: Numbers) -> list[str]:
    text = ["", "## Chains of the target, percent", "", "| row | well formed | no class | kept in rounds 1, 2, 3 |"]
    text.append("|---|---|---|---|")
    for name, row in found["rows"].items():
        shares = [[cell[key] for cell in row["targets"].values() if key in cell] for key in ("well_formed", "unparsed")]
        if shares[0]:
            kept = zip(*(one["kept"] for one in row["training"].values()), strict=True)
            rounds = ", ".join(f"{100 * statistics.fmean(values):.0f}" for values in kept) or "–"
            text.append(f"| {name} | {' | '.join(f'{100 * statistics.fmean(x):.0f}' for x in shares)} | {rounds} |")
    return text


def _term_table(found: Numbers) -> list[str]:
    text = [
        "", "## Both terms on the sources' validation images, before → after training, means over the targets", "",
        "| row | label nats | chain nats | label tokens < .25 | chain tokens < .25 | label gradient | chain gradient |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in found["rows"].items():
        pairs = [(one["before"], one["after"]) for one in row["training"].values() if {"before", "after"} <= one.keys()]
        if pairs:
            shown = [
                " → ".join(f"{statistics.fmean(pair[at][term][key] for pair in pairs):.3f}" for at in (0, 1))
                for key in ("nats", "low", "gradient_norm")
                for term in ("label", "chain")
            ]
            text.append(f"| {name} | {' | '.join(shown)} |")
    return text


def _share(cell: Numbers | None, kind: str) -> str:
    if cell is None or kind not in cell:
        return "–"
    low, high = cell["intervals"][kind]
    return f"{100 * cell[kind]:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _written(average: Numbers) -> str:
    mean, images = f"{100 * average['mean']:.1f}", f"[± {100 * average['half_images']:.1f}]"
    domains = f" ({average['domains']} domains)" if average["domains"] < len(TARGETS) else ""
    return f"{mean} ± {_width(average['half'])} {images}{domains}"


def _width(half: float | None) -> str:
    return "?" if half is None else f"{100 * half:.1f}"


def chains_to_read(settings: Settings) -> str:
    """Return chains of the completed jobs' targets as Markdown: the first right and wrong ones of each class."""
    text = [
        f"The first {SHOWN} right and {SHOWN} wrong chains of each class and row, in the order of domains and files."
    ]
    shown: dict[tuple[str, str, bool], int] = {}
    for row, target, job in sorted(cells(settings), key=lambda cell: (ROWS.index(cell[0]), cell[1])):
        for line in predictions(job) if job.done else ():
            right = line["chain_answer"] == line["label"]
            key = (row.name, line["label"], right)
            if line["chain"] is None or (row is not ZERO_SHOT and line["env"] != target) or shown.get(key, 0) == SHOWN:
                continue
            shown[key] = shown.get(key, 0) + 1
            text += [
                "", f"## {row.name}: `{line['image']}`, {'right' if right else 'wrong'}", "",
                f"Label: {line['label']}. Conclusion: {line['chain_answer'] or 'no class'}.", "",
                *(f"    {part}" for part in line["chain"].splitlines()),
            ]  # fmt: skip
    return "\n".join(text) + "\n"
