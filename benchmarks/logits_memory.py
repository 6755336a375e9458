"""What logits over 151,674 tokens cost: a step with the head on supervised positions against all positions.

The model is next to nothing, so that what a step takes is its logits: the most memory that the process held during the
step, less what it held before (Linux counts it). One sample, both paths of equation 1 in one backward pass.
"""

from __future__ import annotations

import gc
import multiprocessing
import pathlib
import re
import statistics

import torch

from benchmarks import small_internvl
from benchmarks.measure import REPEATS, BenchmarkRow
from benchmarks.mtct_step import BenchmarkSamples, PlainStep

VOCABULARY = 151_674  # InternVL3's
SIZE = small_internvl.Size(width=64, inner=128, layers=1, vision_width=64, vision_layers=1, vocabulary=VOCABULARY)


def peak_bytes(step: object) -> int:
    """Return how much the process grew at most while ``step`` ran."""
    gc.collect()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()  # type: ignore[operator]
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(work: pathlib.Path, repeats: int) -> tuple[list[int], list[int], float, float]:
    """Return our peaks, the plain peer's, the limit of their ratio, and how far the losses are apart."""
    torch.set_num_threads(1)
    samples = BenchmarkSamples(small_internvl.build(work / "vocabulary", SIZE), lengths=(250,))
    plain = PlainStep(samples.folder, samples, together=True)
    loss, theirs = samples.update()["loss"], plain()
    gap = abs(loss - theirs) / abs(theirs)
    assert gap < 1e-5, (loss, theirs)
    ours, peer = [], []
    for _ in range(repeats):
        ours.append(peak_bytes(samples.update))
        peer.append(peak_bytes(plain))
    everywhere = sum(rows["input_ids"].shape[1] for rows in plain.rows.values())
    supervised = sum(int((rows["labels"] != -100).sum()) for rows in plain.rows.values())
    return ours, peer, everywhere / supervised, gap


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the row of the logits' memory, from a process of its own: one that has freed memory hides its growth."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ours, peer, limit, gap = pool.apply(measure, (work, repeats))
    mine, theirs = statistics.median(ours) / 1e6, statistics.median(peer) / 1e6
    what = "logits at all positions of both sequences"
    passed = theirs >= 3 * mine
    return [
        BenchmarkRow(
            "logits' memory, 151k vocabulary", what, mine, theirs, "MB", limit, "3", passed, f"loss to {gap:.0e}"
        )
    ]
