"""What `update` adds to a bare step of transformers and peft: the same rows, everything prepared beforehand.

ReasoningSFT, one sequence an image. The bare step gets finished tensors (token ids, mask, normalized pixels) and asks
for logits of the chain alone; `update` starts from DomainBed's minibatches of bytes.
"""

from __future__ import annotations

import pathlib

import torch

from benchmarks import small_internvl
from benchmarks.measure import REPEATS, BenchmarkRow, interleaved, medians, ratio_of
from benchmarks.mtct_step import BenchmarkSamples, PlainStep


class BareStep(PlainStep):
    """A step that does nothing but compute."""

    def __init__(self, folder: str, samples: BenchmarkSamples):
        super().__init__(folder, samples, paths=("chain",))
        self.pixels = self.image_pixels()
        labels = self.rows["chain"]["labels"]
        first = int((labels != -100).any(0).nonzero()[0])
        self.kept = labels.shape[1] - first + 1  # from the position that predicts the first token of a chain
        self.inputs = {name: self.rows["chain"][name] for name in ("input_ids", "attention_mask")}
        self.target = labels[:, first:]
        self.counts = (self.target != -100).sum(1)

    def losses(self) -> torch.Tensor:
        out = self.model(**self.inputs, pixel_values=self.pixels, use_cache=False, logits_to_keep=self.kept)
        nll = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), self.target.flatten(), reduction="none", ignore_index=-100
        ).view_as(self.target)
        loss = (nll.sum(1) / self.counts).mean()
        loss.backward()
        return loss.detach()


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the row of the overhead."""
    folder = small_internvl.build(work / "training", small_internvl.TRAINING)
    samples = BenchmarkSamples(folder, "ReasoningSFT")
    bare = BareStep(folder, samples)
    loss, theirs = samples.update()["loss"], bare()
    gap = abs(loss - theirs) / abs(theirs)
    assert gap < 1e-5, (loss, theirs)
    seconds = interleaved({"ours": samples.update, "bare": bare}, repeats)
    middle = medians(seconds)
    ratio = ratio_of(seconds, "ours", "bare")
    return [
        BenchmarkRow(
            "`update()`, one path",
            "bare transformers + peft step",
            middle["ours"],
            middle["bare"],
            "s",
            1.0,
            "at most 1.05 times: 0.95",
            ratio <= 1.05,
            f"loss to {gap:.0e}",
        )
    ]
