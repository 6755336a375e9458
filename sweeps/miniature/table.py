"""The miniature study's rows, tables and significance tests, from its job folders.

``rows.csv`` has one line per job: numbers, seeds, commit, command, hardware, date. ``table.md`` has the tables.
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
from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.images import shapes
from domainbed_reasoning.sweeps.miniature import study as miniature
from domainbed_reasoning.sweeps.miniature.paired import Cell, Comparison, Estimate, compare, estimate, holm
from domainbed_reasoning.sweeps.miniature.study import CHOICE_CELLS, CHOICE_SEED, StudyRow, job_of, source_validation
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob

Answer = tuple[str, str]  # a row and one of its columns


def chain(row: str) -> Answer:
    """Return a row's chain answer."""
    return row, "chain"


def label(row: str) -> Answer:
    """Return a row's class-name answer."""
    return row, "label"


# Comparison, first row, second row: the main table, and three families of rows that differ in one setting (and in the
# learning rate if each has its own). Holm's adjustment is over one family in one regime.
CLAIMS = (
    ("reasoning only against label only", chain("ReasoningSFT"), label("LabelSFT")),
    ("MTCT's chain against reasoning only", chain("MTCT"), chain("ReasoningSFT")),
    ("MTCT's chain against label only", chain("MTCT"), label("LabelSFT")),
    ("MTCT's label against label only", label("MTCT"), label("LabelSFT")),
    ("RD-MLDG (N=3) against MTCT, chain", chain("RDMLDG"), chain("MTCT")),
    ("RD-MLDG (N=3) against MTCT, label", label("RDMLDG"), label("MTCT")),
    ("RD-MLDG (N=3) against MTCT at one learning rate, chain", chain("RDMLDG"), chain("MTCT at RDMLDG's rate")),
    ("RD-MLDG (N=3) against MTCT at one learning rate, label", label("RDMLDG"), label("MTCT at RDMLDG's rate")),
    ("RD-MLDG's chain against label only", chain("RDMLDG"), label("LabelSFT")),
    ("SARR without the label path against reasoning only", chain("SARR"), chain("ReasoningSFT")),
    ("RD-MLDG against SARR without the label path", chain("RDMLDG"), chain("SARR")),
    ("RD-MLDG's chain against zero-shot's", chain("RDMLDG"), chain("MLLMZeroShot")),
    ("RD-MLDG's chain against ERM", chain("RDMLDG"), ("ERM", "accuracy")),
)
VARIANTS = (
    ("teacher in the model's own words, reasoning only", chain("ReasoningSFT own words"), chain("ReasoningSFT")),
    ("teacher in the model's own words, MTCT", chain("MTCT own words"), chain("MTCT")),
    ("... at one learning rate", chain("MTCT own words"), chain("MTCT at RDMLDG's rate")),
    ("own words: RD-MLDG against MTCT, chain", chain("RDMLDG own words"), chain("MTCT own words")),
    ("the paper's epochs: RD-MLDG against MTCT, chain", chain("RDMLDG paper's epochs"), chain("MTCT paper's epochs")),
    ("... against MTCT for as many steps, chain", chain("RDMLDG paper's epochs"), chain("MTCT as many steps")),
    ("the paper's epochs at one learning rate: RD-MLDG against MTCT, chain",
     chain("RDMLDG paper's epochs"), chain("MTCT paper's epochs at RDMLDG's rate")),
    ("... against MTCT for as many steps at that rate, chain",
     chain("RDMLDG paper's epochs"), chain("MTCT as many steps at RDMLDG's rate")),
    ("the paper's epochs: RD-MLDG against MTCT, label", label("RDMLDG paper's epochs"), label("MTCT paper's epochs")),
    ("... against MTCT for as many steps, label", label("RDMLDG paper's epochs"), label("MTCT as many steps")),
    ("one round against none (MTCT)", chain("RDMLDG N=1"), chain("MTCT")),
    ("two rounds against one", chain("RDMLDG N=2"), chain("RDMLDG N=1")),
    ("three rounds against two", chain("RDMLDG"), chain("RDMLDG N=2")),
    ("three rounds against the state before them", chain("RDMLDG"), chain("MTCT before rounds")),
    ("the same, label", label("RDMLDG"), label("MTCT before rounds")),
    ("SARR against the state before its rounds", chain("SARR"), chain("ReasoningSFT before rounds")),
    ("bootstrap without a teacher against SARR", chain("SARR bootstrap"), chain("SARR")),
    ("bootstrap without a teacher against zero-shot", chain("SARR bootstrap"), chain("MLLMZeroShot")),
    ("RD-MLDG bootstrap against RD-MLDG, chain", chain("RDMLDG bootstrap"), chain("RDMLDG")),
    ("RD-MLDG bootstrap against RD-MLDG, label", label("RDMLDG bootstrap"), label("RDMLDG")),
)  # fmt: skip
BEYOND = (
    ("MTCT with balanced gradients, chain", chain("MTCT balanced"), chain("MTCT")),
    ("MTCT with balanced gradients, label", label("MTCT balanced"), label("MTCT")),
    ("MTCT with balanced gradients against reasoning only", chain("MTCT balanced"), chain("ReasoningSFT")),
    ("MTCT with balanced gradients against label only", chain("MTCT balanced"), label("LabelSFT")),
    ("RD-MLDG with balanced gradients, chain", chain("RDMLDG balanced"), chain("RDMLDG")),
    ("RD-MLDG with balanced gradients, label", label("RDMLDG balanced"), label("RDMLDG")),
    ("balanced gradients: RD-MLDG against MTCT, chain", chain("RDMLDG balanced"), chain("MTCT balanced")),
    ("RD-MLDG with balanced gradients against reasoning only", chain("RDMLDG balanced"), chain("ReasoningSFT")),
    ("RD-MLDG with balanced gradients against label only", chain("RDMLDG balanced"), label("LabelSFT")),
    ("MTCT with the chosen label weight, chain", chain("MTCT label_weight"), chain("MTCT")),
    ("MTCT with the chosen label weight, label", label("MTCT label_weight"), label("MTCT")),
    ("RD-MLDG with the chosen label weight, chain", chain("RDMLDG label_weight"), chain("RDMLDG")),
    ("RD-MLDG with the consistency filter, chain", chain("RDMLDG consistent"), chain("RDMLDG")),
    ("MTCT with three votes, chain", chain("MTCT votes"), chain("MTCT")),
)  # fmt: skip
OTHER_BASE = (
    ("reasoning only against label only", chain("ReasoningSFT better base"), label("LabelSFT better base")),
    ("MTCT's chain against reasoning only", chain("MTCT better base"), chain("ReasoningSFT better base")),
    ("MTCT's label against label only", label("MTCT better base"), label("LabelSFT better base")),
    ("RD-MLDG against MTCT, chain", chain("RDMLDG better base"), chain("MTCT better base")),
    ("RD-MLDG against MTCT at one learning rate, chain",
     chain("RDMLDG better base"), chain("MTCT better base at RDMLDG's rate")),
    ("RD-MLDG's chain against label only", chain("RDMLDG better base"), label("LabelSFT better base")),
    ("RD-MLDG's chain against zero-shot's", chain("RDMLDG better base"), chain("MLLMZeroShot better base")),
    ("MTCT with balanced gradients, chain", chain("MTCT balanced better base"), chain("MTCT better base")),
    ("... against reasoning only", chain("MTCT balanced better base"), chain("ReasoningSFT better base")),
    ("... against label only", chain("MTCT balanced better base"), label("LabelSFT better base")),
    ("RD-MLDG with balanced gradients, chain", chain("RDMLDG balanced better base"), chain("RDMLDG better base")),
    ("... against MTCT balanced", chain("RDMLDG balanced better base"), chain("MTCT balanced better base")),
    ("... against label only, too", chain("RDMLDG balanced better base"), label("LabelSFT better base")),
)  # fmt: skip
NUMBERS = (
    "accuracy", "label", "chain", "unparsed", "source_validation", "caption_right", "follows_caption", "follows_cue",
    "kept1", "kept2", "kept3",
)  # fmt: skip
ROW_FIELDS = (
    "regime", "row", "algorithm", "target", "seed", "images", *NUMBERS, "steps", "lr", "date", "commit", "hardware",
    "command",
)  # fmt: skip

Line = dict[str, Any]


def write(output: Path, results: Path) -> None:
    """Write ``rows.csv``, ``choice.csv`` and ``table.md`` from the completed jobs in ``output``."""
    known = _known_rows(results / "rows.csv")
    rows = []
    for cell in miniature.cells():
        job = job_of(*cell, output)
        if job.done:
            row = row_of(cell[0], cell[1], job, output)
            before = known.get(row["command"], {})
            # Keep the hardware recorded by an earlier table: another machine may run this later.
            row["hardware"] = before.get("hardware") or _hardware()
            row["commit"] = _commit_of_job(job.folder) or before.get("commit") or _commit(_ended(job.folder))
            rows.append(row)
    results.mkdir(parents=True, exist_ok=True)
    _write_csv(results / "rows.csv", ROW_FIELDS, rows)
    if choice := _choice(output):
        _write_csv(results / "choice.csv", ("row", "regime", "target", "seed", "source_validation"), choice)
    replace_text(results / "table.md", render(rows))
    print(f"{len(rows)} of {len(miniature.cells())} jobs completed. Wrote {results}/rows.csv and table.md.")


def row_of(study_row: StudyRow, regime: str, job: TrainJob, output: Path) -> Line:
    """Return the line of a completed job; accuracies are over both splits of the target domain, in [0, 1]."""
    folder = job.folder
    last = json.loads((folder / "results.jsonl").read_text().splitlines()[-1])
    target = last["args"]["test_envs"][0]
    images = len(shapes.CLASS_NAMES) * last["hparams"].get("target_per_class", shapes.PER_CLASS)
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
        "accuracy": sum(share * last[f"env{target}_{split}_acc"] for split, share in shares.items()),
        "source_validation": source_validation(job),
        "steps": study_row.steps,
        "lr": last["hparams"].get("lr", ""),
        "date": _ended(folder).date().isoformat(),
        "command": job.command.replace(str(output), "miniature_output"),
    }
    for k in (1, 2, 3):
        row[f"kept{k}"] = last.get(f"sarr{k}_accepted", "")
    if (folder / "answers.json").exists():
        answers = json.loads((folder / "answers.json").read_text())[f"env{target}"]
        for key in ("label", "chain", "unparsed"):
            if answers["in"][key] is not None:
                row[key] = sum(share * answers[split][key] for split, share in shares.items())
    if (folder / "predictions.jsonl").exists():
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        row |= faithfulness([line for line in lines if line["env"] == target])
    return row


def faithfulness(lines: Sequence[Mapping[str, Any]]) -> Line:
    """Return how a target domain's chains relate to parts and cue, as shares in [0, 1]; empty without chains.

    ``caption_right``: the caption names the true class's parts. ``follows_caption``: the conclusion is the class whose
    parts the caption names; invalid chains and captions that match no class count for neither. ``follows_cue``: the
    answer is the class that the misleading background hue suggests.
    """
    names = list(shapes.CLASS_NAMES)
    answers = [line["chain_answer"] if line["chain"] is not None else line["label_answer"] for line in lines]
    cues = [names[(names.index(line["label"]) + shapes.MISLEADING_SHIFT) % len(names)] for line in lines]
    found: Line = {"follows_cue": statistics.fmean(a == cue for a, cue in zip(answers, cues, strict=True))}
    nearest = [(line, described_class(line["chain"])) for line in lines if line["chain"] is not None]
    if nearest:
        found["caption_right"] = statistics.fmean(name == line["label"] for line, name in nearest)
        found["follows_caption"] = statistics.fmean(
            name is not None and name == line["chain_answer"] for line, name in nearest
        )
    return found


def described_class(text: str) -> str | None:
    """Return the class whose parts a chain's caption names; None if no class matches."""
    try:
        told = shapes.class_in_caption(parse_chain(text).caption)
    except ChainError:
        return None
    return None if told is None else shapes.CLASS_NAMES[told]


def cells_of(rows: Sequence[Line], regime: str, name: str, number: str) -> dict[Cell, float]:
    """Return a row's numbers by target domain and seed; zero-shot's single run is used for every seed."""
    own = [row for row in rows if row["regime"] == regime and row["row"] == name and row[number] not in ("", None)]
    seeds = miniature.TEST_SEEDS if name.startswith("MLLMZeroShot") else ()
    return {
        (shapes.DOMAINS.index(row["target"]), seed): float(row[number])
        for row in own
        for seed in (seeds or (row["seed"],))
    }


def render(rows: Sequence[Line]) -> str:
    """Return the tables as Markdown."""
    text = [
        "<!-- written by `python -m domainbed_reasoning.sweeps.miniature --table` -->",
        "Percent. `±`: 95% interval for another domain, clustered by domain (t, 3 degrees of freedom); `[±]`: 95%",
        "interval for these four domains (seeds as the sample). Cells: target domains x seeds.",
    ]
    for regime, rho in miniature.REGIMES.items():
        text += ["", f"## Cue with probability {rho:g} ({regime})", "", *_main_table(rows, regime)]
        text += ["", *_claim_table(rows, regime, CLAIMS, "Claims")]
        for title, family in (
            ("One thing changed, each at its chosen learning rate", VARIANTS),
            ("Beyond the paper", BEYOND),
            ("A base that knows the classes better", OTHER_BASE),
        ):
            text += ["", *_claim_table(rows, regime, family, title)]
    return "\n".join(text) + "\n"


def _main_table(rows: Sequence[Line], regime: str) -> list[str]:
    lines = [
        "| row | cells | DomainBed's answer | label | chain | source validation | caption right | conclusion follows "
        "caption | answer follows cue | kept in rounds 1, 2, 3 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for study_row in miniature.ROWS:
        cells = cells_of(rows, regime, study_row.name, "accuracy")
        if not cells:
            continue
        shown = [_plus_minus(rows, regime, study_row.name, number) for number in ("accuracy", "label", "chain")]
        means = [
            _mean(rows, regime, study_row.name, number)
            for number in ("source_validation", "caption_right", "follows_caption", "follows_cue")
        ]
        kept = [_mean(rows, regime, study_row.name, f"kept{k}") for k in (1, 2, 3)]
        count = len({cell[0] for cell in cells}) if study_row.name.startswith("MLLMZeroShot") else len(cells)
        rounds = ", ".join(share for share in kept if share != "–") or "–"
        lines.append(f"| {study_row.name} | {count} | {' | '.join(shown)} | {' | '.join(means)} | {rounds} |")
    return lines


def _plus_minus(rows: Sequence[Line], regime: str, name: str, number: str) -> str:
    cells = cells_of(rows, regime, name, number)
    if name.startswith("MLLMZeroShot"):  # its seeds are copies of one run
        cells = {cell: value for cell, value in cells.items() if cell[1] == miniature.TEST_SEEDS[0]}
    return _written(estimate(cells)) if cells else "–"


def _written(found: Estimate) -> str:
    return f"{100 * found.mean:.1f} ± {_width(found.half)} [± {_width(found.half_here)}]"


def _width(half: float) -> str:
    return "?" if half == float("inf") else f"{100 * half:.1f}"


def _mean(rows: Sequence[Line], regime: str, name: str, number: str) -> str:
    cells = cells_of(rows, regime, name, number)
    return f"{100 * estimate(cells).mean:.0f}" if cells else "–"


def _claim_table(rows: Sequence[Line], regime: str, claims: Sequence[Any], title: str) -> list[str]:
    found: list[tuple[str, Comparison]] = []
    for claim, (first, its), (second, other) in claims:
        comparison = compare(cells_of(rows, regime, first, its), cells_of(rows, regime, second, other))
        if comparison is not None:
            found.append((claim, comparison))
    if not found:
        return []
    adjusted = holm([comparison.estimate.p for _, comparison in found])
    here = holm([comparison.estimate.p_here for _, comparison in found])
    lines = [
        f"{title}: paired differences in points, wins and losses over the cells, p after Holm for another domain and "
        "for these domains",
        "",
        "| comparison | cells | difference | wins : losses | p | p, these domains |",
        "|---|---|---|---|---|---|",
    ]
    for (claim, comparison), p, p_here in zip(found, adjusted, here, strict=True):
        its = comparison.estimate
        lines.append(
            f"| {claim} | {its.cells} | {_written(its)} | {comparison.wins} : {comparison.losses} | {_p(p)} | "
            f"{_p(p_here) if its.half_here < float('inf') else '?'} |"
        )
    return lines


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def _choice(output: Path) -> list[Line]:
    return [
        {"row": study_row.name, "regime": regime, "target": target, "seed": CHOICE_SEED, "source_validation": found}
        for study_row in (*miniature.choices(), *miniature.weights())
        for regime, target in CHOICE_CELLS
        for job in [job_of(study_row, regime, target, CHOICE_SEED, output / "choice", target_per_class=1)]
        if (found := source_validation(job)) is not None
    ]


def _commit_of_job(folder: Path) -> str:
    """Return the commit that a job recorded; empty for jobs from before commits were recorded."""
    try:
        recorded = json.loads((folder / versions.FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    commit = recorded[versions.OURS]["commit"] or ""
    return str(commit[:7])


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


def _write_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.4f}" if isinstance(value, float) and key in NUMBERS else value
                         for key, value in row.items()})  # fmt: skip
    replace_text(path, text.getvalue())
