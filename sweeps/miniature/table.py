"""Rows, tables and significance tests of a miniature study, from its job folders; see `study` and `regimes`.

``rows.csv`` has one line per cell, which is a row's job on a target domain with a seed: numbers, seeds, commit,
command, hardware, date. ``table.md`` has the tables.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge import versions
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.images import shapes
from domainbed_reasoning.sweeps.miniature.paired import Cell, Comparison, Estimate, compare, estimate, holm
from domainbed_reasoning.sweeps.miniature.recorded import name_of, recorded
from domainbed_reasoning.sweeps.miniature.study import StudyRow, source_validation
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob

NUMBERS = (
    "accuracy", "label", "chain", "unparsed", "source_validation", "caption_right", "follows_caption", "follows_cue",
    "well_formed", "kept1", "kept2", "kept3", "after0", "after1", "after2", "after3",
)  # fmt: skip
ROW_FIELDS = (
    "regime", "row", "algorithm", "target", "seed", "images", *NUMBERS, "steps", "lr", "date", "commit", "hardware",
    "job", "command",
)  # fmt: skip

Line = dict[str, Any]


def write(output: Path, results: Path, study: Any) -> None:
    """Write ``rows.csv``, ``choice.csv`` and ``table.md`` from the completed jobs in ``output`` and those recorded.

    Args:
        output: folder of the jobs; see `recorded` for those that ran elsewhere.
        results: folder of the tables.
        study: the module of the study, `study` or `regimes`.
    """
    known, elsewhere = _known_rows(results / "rows.csv"), recorded(output, "rows.csv")
    rows = []
    for cell in study.cells():
        job = study.job_of(*cell, output)
        line = elsewhere.get(name_of(job, output))
        if not job.done and line is not None:
            rows.append(line | {"row": cell[0].name, "seed": int(line["seed"])})  # rows may share a job
        elif job.done:
            row = row_of(cell[0], cell[1], job, output, study)
            before = known.get(row["command"], {})
            # Keep the hardware recorded by an earlier table: another machine may run this later.
            row["hardware"] = before.get("hardware") or _hardware()
            row["commit"] = _commit_of_job(job.folder) or before.get("commit") or _commit(_ended(job.folder))
            rows.append(_as_written(row))  # so that the file's lines give the same table
    results.mkdir(parents=True, exist_ok=True)
    _write_csv(results / "rows.csv", ROW_FIELDS, rows)
    if choice := study.choice_rows(output):
        _write_csv(results / "choice.csv", tuple(choice[0]), choice)
    replace_text(results / "table.md", render(rows, study))
    print(f"{len(rows)} of {len(study.cells())} cells completed. Wrote {results}/rows.csv and table.md.")


def row_of(study_row: StudyRow, regime: str, job: TrainJob, output: Path, study: Any) -> Line:
    """Return the line of a completed job; accuracies are over both splits of the target domain, in [0, 1]."""
    folder = job.folder
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    last = records[-1]
    target = last["args"]["test_envs"][0]
    images = len(study.CLASS_NAMES) * last["hparams"].get("target_per_class", study.PER_CLASS)
    held_out = int(images * last["args"]["holdout_fraction"])
    shares = {"in": (images - held_out) / images, "out": held_out / images}
    row: Line = dict.fromkeys(ROW_FIELDS, "")
    row |= {
        "regime": regime,
        "row": study_row.name,
        "algorithm": study_row.algorithm,
        "target": shapes.DOMAINS[target],
        "seed": last["args"]["trial_seed"],
        "images": images,
        "accuracy": _accuracy(last, target, shares),
        "source_validation": source_validation(job),
        "steps": study_row.steps,
        "lr": last["hparams"].get("lr", ""),
        "well_formed": last.get("well_formed", ""),
        "date": _ended(folder).date().isoformat(),
        "job": name_of(job, output),
        "command": job.command.replace(str(output), "miniature_output"),
    }
    for k in (1, 2, 3):
        row[f"kept{k}"] = last.get(f"sarr{k}_accepted", "")
    if last["hparams"].get("sarr_rounds") == 3 and len(records) == 5:  # after the first step and after every stage
        for k, record in enumerate(records[1:]):
            row[f"after{k}"] = _accuracy(record, target, shares)
    if (folder / "answers.json").exists():
        answers = json.loads((folder / "answers.json").read_text())[f"env{target}"]
        for key in ("label", "chain", "unparsed"):
            if answers["in"][key] is not None:
                row[key] = sum(share * answers[split][key] for split, share in shares.items())
    if (folder / "predictions.jsonl").exists():
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        row |= faithfulness([line for line in lines if line["env"] == target], study)
    return row


def _accuracy(record: Mapping[str, Any], target: int, shares: Mapping[str, float]) -> float:
    return sum(share * float(record[f"env{target}_{split}_acc"]) for split, share in shares.items())


def faithfulness(lines: Sequence[Mapping[str, Any]], study: Any) -> Line:
    """Return how a target domain's chains relate to parts and cue, as shares in [0, 1]; empty without chains.

    ``caption_right``: the caption names the true class's parts. ``follows_caption``: the conclusion is the class whose
    parts the caption names; invalid chains and captions that match no class count for neither. ``follows_cue``: the
    answer is the class that the misleading background hue suggests, in studies with a cue.
    """
    answers = [line["chain_answer"] if line["chain"] is not None else line["label_answer"] for line in lines]
    cues = [study.cue_of(line["label"]) for line in lines]
    found: Line = {}
    if None not in cues:
        found["follows_cue"] = statistics.fmean(a == cue for a, cue in zip(answers, cues, strict=True))
    nearest = [(line, study.described_class(line["chain"])) for line in lines if line["chain"] is not None]
    if nearest:
        found["caption_right"] = statistics.fmean(name == line["label"] for line, name in nearest)
        found["follows_caption"] = statistics.fmean(
            name is not None and name == line["chain_answer"] for line, name in nearest
        )
    return found


def cells_of(rows: Sequence[Line], regime: str, name: str, number: str, study: Any) -> dict[Cell, float]:
    """Return a row's numbers by target domain and seed; zero-shot's single run is used for every seed."""
    own = [row for row in rows if row["regime"] == regime and row["row"] == name and row[number] not in ("", None)]
    seeds = study.TEST_SEEDS if name.startswith("MLLMZeroShot") else ()
    return {
        (shapes.DOMAINS.index(row["target"]), seed): float(row[number])
        for row in own
        for seed in (seeds or (row["seed"],))
    }


def render(rows: Sequence[Line], study: Any) -> str:
    """Return the tables as Markdown."""
    text = [
        f"<!-- written by `python -m domainbed_reasoning.sweeps.miniature --study {study.NAME} --table` -->",
        "Percent. `±`: 95% interval for another domain, clustered by domain (t, 3 degrees of freedom); `[±]`: 95%",
        "interval for these four domains (seeds as the sample). Cells: target domains x seeds. Paper: the accuracy and",
        "the difference that the paper reports, where it does.",
    ]
    for regime, title in study.REGIME_TITLES.items():
        text += ["", f"## {title}", "", *_main_table(rows, regime, study)]
        for family, claims in study.FAMILIES.items():
            text += _claim_table(rows, regime, claims, family, study)
    return "\n".join(text) + "\n"


def _main_table(rows: Sequence[Line], regime: str, study: Any) -> list[str]:
    lines = [
        "| row | cells | DomainBed's answer | label | chain | paper | source validation | caption right | conclusion "
        "follows caption | answer follows cue | well formed | kept in rounds 1, 2, 3 | before the rounds, after 1, 2, "
        "3 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for study_row in study.ROWS:
        cells = cells_of(rows, regime, study_row.name, "accuracy", study)
        if not cells:
            continue
        shown = [_plus_minus(rows, regime, study_row.name, number, study) for number in ("accuracy", "label", "chain")]
        means = [
            _mean(rows, regime, study_row.name, number, study)
            for number in ("source_validation", "caption_right", "follows_caption", "follows_cue", "well_formed")
        ]
        series = [[f"kept{k}" for k in (1, 2, 3)], [f"after{k}" for k in (0, 1, 2, 3)]]
        found = [[_mean(rows, regime, study_row.name, number, study) for number in numbers] for numbers in series]
        count = len({cell[0] for cell in cells}) if study_row.name.startswith("MLLMZeroShot") else len(cells)
        rounds = [", ".join(share for share in shares if share != "–") or "–" for shares in found]
        own = "label" if study_row.algorithm == "LabelSFT" else "chain"
        theirs = study.papers_accuracy(regime, (study_row.name, own))
        paper = "–" if theirs is None else f"{theirs:.1f}"
        lines.append(f"| {study_row.name} | {count} | {' | '.join([*shown, paper, *means, *rounds])} |")
    return lines


def _plus_minus(rows: Sequence[Line], regime: str, name: str, number: str, study: Any) -> str:
    cells = cells_of(rows, regime, name, number, study)
    if name.startswith("MLLMZeroShot"):  # its seeds are copies of one run
        cells = {cell: value for cell, value in cells.items() if cell[1] == study.TEST_SEEDS[0]}
    return _written(estimate(cells)) if cells else "–"


def _written(found: Estimate) -> str:
    mean = round(100 * found.mean, 1) + 0.0  # not -0.0
    return f"{mean:.1f} ± {_width(found.half)} [± {_width(found.half_here)}]"


def _width(half: float) -> str:
    return "?" if half == float("inf") else f"{100 * half:.1f}"


def _mean(rows: Sequence[Line], regime: str, name: str, number: str, study: Any) -> str:
    cells = cells_of(rows, regime, name, number, study)
    return f"{100 * estimate(cells).mean:.0f}" if cells else "–"


def _claim_table(rows: Sequence[Line], regime: str, claims: Sequence[Any], title: str, study: Any) -> list[str]:
    found: list[tuple[str, Comparison, str]] = []
    for claim, *answers in claims:
        comparison = compare(*(cells_of(rows, regime, name, number, study) for name, number in answers))
        if comparison is not None:
            theirs = [study.papers_accuracy(regime, answer) for answer in answers]
            paper = "–" if None in theirs else f"{theirs[0] - theirs[1]:+.1f}"
            found.append((claim, comparison, paper))
    if not found:
        return []
    adjusted = holm([comparison.estimate.p for _, comparison, _ in found])
    here = holm([comparison.estimate.p_here for _, comparison, _ in found])
    lines = [
        "",
        f"{title}: paired differences in points, wins and losses over the cells, p after Holm for another domain and "
        "for these domains",
        "",
        "| comparison | cells | difference | paper | wins : losses | p | p, these domains |",
        "|---|---|---|---|---|---|---|",
    ]
    for (claim, comparison, paper), p, p_here in zip(found, adjusted, here, strict=True):
        its = comparison.estimate
        lines.append(
            f"| {claim} | {its.cells} | {_written(its)} | {paper} | {comparison.wins} : {comparison.losses} | "
            f"{_p(p)} | {_p(p_here) if its.half_here < float('inf') else '?'} |"
        )
    return lines


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def _commit_of_job(folder: Path) -> str:
    """Return the commit that a job recorded; empty for jobs from before commits were recorded."""
    try:
        recorded = json.loads((folder / versions.FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    ours = recorded[versions.OURS]
    return str((ours["commit"] or "")[:7] or (f"digest {ours['digest'][:12]}" if ours.get("digest") else ""))


def _ended(folder: Path) -> datetime.datetime:
    return datetime.datetime.fromtimestamp((folder / "done").stat().st_mtime, datetime.UTC)


def _commit(ended: datetime.datetime) -> str:
    """Return the newest commit of this checkout when a job ended; empty outside of a repository."""
    command = ["git", "rev-list", "-1", "--abbrev-commit", f"--before={ended.isoformat()}", "HEAD"]
    here = Path(__file__).resolve().parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()


def _hardware() -> str:
    return f"{len(os.sched_getaffinity(0))} cores {platform.machine()}, shared; one thread a job"


def _known_rows(path: Path) -> dict[str, Line]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["command"]: dict(row) for row in csv.DictReader(file)}


def _as_written(row: Mapping[str, Any]) -> Line:
    """Return a line with its numbers as in the file, with four decimals."""
    return {key: f"{value:.4f}" if isinstance(value, float) and key in NUMBERS else value for key, value in row.items()}


def _write_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_as_written, rows))
    replace_text(path, text.getvalue())
