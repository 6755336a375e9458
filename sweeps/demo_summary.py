"""What the demo prints after its tables: the rows, both answers, kept self-labels, a chain, and the claims."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_reasoning.jobs.stage_log import MOSTLY_WELL_FORMED
from domainbed_reasoning.results import published
from domainbed_reasoning.sweeps.miniature.claims import Answer, Claims, chain, label
from domainbed_reasoning.sweeps.miniature.paired import Cell, compare

BALANCED = "RDMLDG balanced"
ROWS = {
    "ERM": "a vision network trained on the labels: DomainBed's baseline",
    "MLLMZeroShot": "the pretrained multimodal model, without training on this task",
    "LabelSFT": "the model fine-tuned on class names only",
    "ReasoningSFT": "the model fine-tuned on the teacher's reasoning chains only",
    "MTCT": "the model fine-tuned on both (the paper's equation 1)",
    "RDMLDG": "MTCT, then rounds on its own chains with correct conclusions: the paper's method",
    BALANCED: "RDMLDG with the label gradient scaled to the length of the chain gradient: not in the paper",
}
CLAIMS: Claims = (
    ("reasoning only against label only", chain("ReasoningSFT"), label("LabelSFT")),
    ("MTCT's chain against reasoning only", chain("MTCT"), chain("ReasoningSFT")),
    ("MTCT's chain against label only", chain("MTCT"), label("LabelSFT")),
    ("RD-MLDG's chain against MTCT's", chain("RDMLDG"), chain("MTCT")),
    ("RD-MLDG's chain against label only", chain("RDMLDG"), label("LabelSFT")),
    ("RD-MLDG with balanced gradients against RD-MLDG", chain(BALANCED), chain("RDMLDG")),
)


@dataclass(frozen=True)
class Run:
    """One completed job of the demo.

    Attributes:
        folder: its folder.
        row: its row in the tables: DomainBed's name of the algorithm, or a variant's.
        target: number of the target domain.
        last: its last record, as in results.jsonl.
    """

    folder: Path
    row: str
    target: int
    last: dict[str, Any]


def finished_runs(output: Path, row: str | None = None) -> Iterator[Run]:
    """Yield the completed jobs in the folder of a sweep, in the order of the tables' rows.

    Args:
        output: the folder.
        row: of all of these jobs; None for their algorithms.
    """
    runs = []
    for records in output.glob("*/results.jsonl"):
        if (records.parent / "done").exists():
            last = json.loads(records.read_text().splitlines()[-1])
            runs.append(Run(records.parent, row or last["args"]["algorithm"], last["args"]["test_envs"][0], last))
    yield from sorted(runs, key=lambda run: (list(ROWS).index(run.row), run.target))


def print_summary(runs: Sequence[Run], domains: Sequence[str], rows: Sequence[str]) -> None:
    """Print the rows' meaning, both answers, the kept self-labels, and one chain for a target-domain image."""
    print("\nThe rows")
    for name in rows:
        print(f"  {name:<17}{ROWS[name]}")
    print_answers(runs)
    print_accepted(runs, domains)
    print_chain(runs, domains)


def print_answers(runs: Sequence[Run]) -> None:
    """Print the accuracy of both answers on the target domains; the tables use one of them."""
    lines = []
    for name in ROWS:
        splits = [its for run in runs if run.row == name and (its := _target_answers(run))]
        if splits:
            cells = [_mean_share(splits, key) for key in ("label", "chain", "unparsed", "well_formed")]
            lines.append(f"  {name:<17}{cells[0]:>12}{cells[1]:>18}{cells[2]:>20}{cells[3]:>20}")
    if lines:
        print("\nAccuracy of both answers on the target domains, at the last step")
        print(f"  {'':<17}{'class name':>12}{'conclusion':>18}{'no class in chain':>20}{'well-formed chain':>20}")
        print("\n".join(lines))


def print_accepted(runs: Sequence[Run], domains: Sequence[str]) -> None:
    """Print the share of self-generated chains that each round kept, and the share of these that are well formed."""
    lines, broken = [], False
    for run in runs:
        accepted = sorted(key for key in run.last if key.startswith("sarr") and key.endswith("_accepted"))
        cells = ""
        for key in accepted:
            whole = run.last.get(key.replace("_accepted", "_well_formed"))  # None if the round kept nothing
            broken = broken or (whole is not None and whole < MOSTLY_WELL_FORMED)
            cells += f"{_share(run.last[key]) + ('' if whole is None else f' ({_share(whole)})'):>14}"
        if cells:
            lines.append(f"  {run.row:<17}{domains[run.target]:<10}{cells}")
    if lines:
        print("\nShare of self-generated chains that rounds 1, 2, … kept for training (of these: well formed)")
        print("\n".join(lines))
    if broken:
        print("  The paper keeps every chain that concludes the class, also one with a stage twice or unclosed.")
        print("  The hparam sarr_filter 'well_formed' asks for five closed stages in order, too.")


def print_chain(runs: Sequence[Run], domains: Sequence[str]) -> None:
    """Print one chain of the trained model for a target-domain image, a correct one if possible."""
    for run in reversed(runs):
        path = run.folder / "predictions.jsonl"
        if run.row != "RDMLDG" or not path.exists():
            continue
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        chains = [record for record in records if record["env"] == run.target and record["parsed"]]
        if chains:
            right = [record for record in chains if record["chain_answer"] == record["label"]]
            shown = (right or chains)[0]
            print(f"\nRDMLDG's chain for {shown['image']}, in the target domain {domains[run.target]}")
            print("\n".join(f"  {line}" for line in shown["chain"].splitlines()))
            print(f"  true class: {shown['label']}; {len(right)} of {len(chains)} chains in this domain are correct")
            return


def print_claims(runs: Sequence[Run], dataset: str) -> None:
    """Print the differences between rows on the target domains, each with its interval and what it shows.

    Args:
        runs: of the demo.
        dataset: of the paper's ablation, whose differences are printed beside them.
    """
    print(f"\nWhat these numbers say: differences in points, ± 95% for another domain; paper: {dataset}")
    for claim, first, second in CLAIMS:
        comparison = compare(_cells(runs, first), _cells(runs, second))
        if comparison is None:
            continue
        mean, half = 100 * comparison.estimate.mean, 100 * comparison.estimate.half
        if math.isinf(half):
            width, verdict = "   ?", "one domain: no interval"
        else:
            width = f"{half:4.1f}"
            verdict = "no difference shown" if abs(mean) <= half else "above" if mean > 0 else "below"
        theirs = [found for row, _ in (first, second) if (found := published.result_of(row, dataset)) is not None]
        paper = f"paper {theirs[0] - theirs[1]:+.1f}" if len(theirs) == 2 else ""
        print(f"  {claim:<49}{mean:+6.1f} ± {width}  {verdict:<25}{paper}".rstrip())


def _cells(runs: Sequence[Run], answer: Answer) -> Mapping[Cell, float]:
    row, column = answer
    found = {(run.target, 0): _target_answers(run) for run in runs if run.row == row}
    return {cell: its[column] for cell, its in found.items() if its and its[column] is not None}


def _target_answers(run: Run) -> dict[str, Any] | None:
    path = run.folder / "answers.json"
    if not path.exists():
        return None
    answers: dict[str, Any] = json.loads(path.read_text())[f"env{run.target}"]["in"]
    return answers


def _mean_share(splits: Sequence[dict[str, Any]], key: str) -> str:
    """Return the share over all images of the splits; a dash if that answer was not computed."""
    if any(split.get(key) is None for split in splits):
        return "-"
    return _share(sum(split[key] * split["n"] for split in splits) / sum(split["n"] for split in splits))


def _share(value: float) -> str:
    return f"{value:.0%}"
