"""From the start of the process to the end of the first update: RD-MLDG with the embedded model, and DomainBed's ERM.

Both run DomainBed's train script on ShapesReasoning. Ours imports transformers and PEFT, loads a model with its
adapters, and opens the files from which a killed job resumes; ERM builds its small ConvNet.
"""

from __future__ import annotations

import pathlib
import statistics
import sys

from benchmarks.measure import REPEATS, BenchmarkRow, use_domainbed
from benchmarks.parts import shares
from benchmarks.whole_job import EPOCHS, train


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the rows of the start, by wall and by processor time; the first of each is not counted."""
    use_domainbed()
    found = {}
    jobs = {"RDMLDG": EPOCHS, "ERM": None}
    for number in range(repeats + 1):
        for algorithm, hparams in jobs.items():
            job = train(algorithm, work, f"{algorithm}{number}", "--first-update", hparams=hparams)
            found.setdefault(algorithm, []).append(job)
    for algorithm, runs in found.items():
        last = runs[-1]
        print(
            f"{algorithm}, {last['first_update']:.1f} s: {shares(last['parts'], last['first_update'])}", file=sys.stderr
        )
    rows = []
    for what, key in (("wall time", "first_update"), ("processor time of the process", "processor")):
        ours, stock = (statistics.median(job[key] for job in found[name][1:]) for name in jobs)
        row = BenchmarkRow(
            f"start to the first update, {what}", "DomainBed's ERM", ours, stock, "s", float("nan"), "none", True, "–"
        )
        rows.append(row)
    return rows
