"""65 class names for 16 images: one trie in one forward against a forward a name, and against a repeated cache.

*A forward each*: for every name the sequence of image, question and name, the image's features encoded once (which is
generous). *Repeated cache*: image and question once, keys and values repeated for every name, all names in one padded
batch. Both are what one writes with transformers.
"""

from __future__ import annotations

import pathlib
import sys

import torch
import transformers

from benchmarks import small_internvl
from benchmarks.counts import forward
from benchmarks.measure import REPEATS, BenchmarkRow, interleaved, medians, ratio_of
from domainbed_reasoning.chains.prompts import q_cls
from domainbed_reasoning.mllm import load_mllm
from domainbed_reasoning.mllm.rows import build_trie
from domainbed_reasoning.sweeps.costs import shape_of

BATCH = 16


# OfficeHome's.
NAMES = """alarm clock, backpack, batteries, bed, bike, bottle, bucket, calculator, calendar, candles, chair,
clipboards, computer, couch, curtains, desk lamp, drill, eraser, exit sign, fan, file cabinet, flip-flops, flowers,
folder, fork, glasses, hammer, helmet, kettle, keyboard, knives, lamp shade, laptop, marker, monitor, mop, mouse, mug,
notebook, oven, pan, paper clip, pen, pencil, post-it notes, printer, push pin, radio, refrigerator, ruler, scissors,
screwdriver, shelf, sink, sneakers, soda, speaker, spoon, TV, table, telephone, toothbrush, toys, trash can, webcam"""


class Peers:
    """The same scores, the usual ways."""

    def __init__(self, folder: str, names: list[str], images: torch.Tensor):
        self.mllm = load_mllm(folder).eval()
        self.question, self.names, self.images = q_cls(names), names, images
        self.network = self.mllm.base
        self.prompt = self.mllm.prompt(self.question)["input_ids"].expand(len(images), -1)
        self.targets = [self.mllm.target(name) for name in names]

    def ours(self) -> torch.Tensor:
        return self.mllm.class_scores(self.images, self.question, self.names)

    @torch.no_grad()
    def one_forward_each(self) -> torch.Tensor:
        features = self.mllm.encode(self.images)
        scores = []
        for target in self.targets:
            fed = torch.tensor(target[:-1]).expand(len(self.images), -1)
            out = self.network(
                input_ids=torch.cat([self.prompt, fed], dim=1),
                **{**features, "mm_encoder_outputs": dict(features["mm_encoder_outputs"])},
                use_cache=False,
                logits_to_keep=len(target),
            )
            found = out.logits.log_softmax(-1)[:, torch.arange(len(target)), list(target)]
            scores.append(found.sum(1))
        return torch.stack(scores, dim=1)

    @torch.no_grad()
    def repeated_cache(self) -> torch.Tensor:
        features = self.mllm.encode(self.images)
        cache = transformers.DynamicCache(config=self.network.config.get_text_config())
        out = self.network(
            input_ids=self.prompt,
            **{**features, "mm_encoder_outputs": dict(features["mm_encoder_outputs"])},
            **self.mllm.keeping(cache),
            logits_to_keep=1,
        )
        first = out.logits[:, -1].log_softmax(-1)
        longest = max(map(len, self.targets))
        fed = torch.tensor([list(target[:-1]) + [0] * (longest - len(target)) for target in self.targets])
        wanted = torch.tensor([list(target) + [0] * (longest - len(target)) for target in self.targets])
        real = torch.arange(longest) < torch.tensor([len(target) for target in self.targets])[:, None]
        n, classes, length = len(self.images), len(self.names), self.prompt.shape[1]
        cache.batch_repeat_interleave(classes)
        seen = torch.cat([torch.ones(classes, length, dtype=torch.long), real[:, :-1].long()], dim=1)
        more = self.network(
            input_ids=fed.repeat(n, 1),
            attention_mask=seen.repeat(n, 1),
            position_ids=(length + torch.arange(longest - 1)).expand(n * classes, -1),
            **self.mllm.keeping(cache),
        ).logits.log_softmax(-1)
        steps = torch.cat([first.repeat_interleave(classes, 0)[:, None], more], dim=1)
        found = steps.gather(2, wanted.repeat(n, 1)[..., None])[..., 0]
        return (found * real.repeat(n, 1)).sum(1).view(n, classes)


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the rows of class scores."""
    folder = small_internvl.build(work / "scoring", small_internvl.SCORING)
    edge = small_internvl.EDGE
    pixels = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, edge, edge), dtype=torch.uint8, generator=pixels)
    names = NAMES.replace("\n", " ").split(", ")
    peers = Peers(folder, names, images)
    expected = peers.one_forward_each()
    gaps = {name: float((getattr(peers, name)() - expected).abs().max()) for name in ("ours", "repeated_cache")}
    assert max(gaps.values()) < 1e-4, gaps
    seconds = interleaved(
        {name: getattr(peers, name) for name in ("ours", "one_forward_each", "repeated_cache")}, repeats
    )
    middle, shape, trie = medians(seconds), shape_of(folder), build_trie(peers.targets)
    prompt, nodes = peers.prompt.shape[1], len(trie.tokens)
    seen = int(trie.visible.sum())
    counted = forward(shape, BATCH, 1, [(0, prompt)], 1 + nodes).total
    counted += forward(shape, BATCH, 0, [(prompt, 1)] * nodes, 0).total
    counted += BATCH * 4 * shape.language.layers * shape.language.width * (seen - nodes)
    each = forward(shape, BATCH, 1, [], 0).total
    each += sum(forward(shape, BATCH, 0, [(0, prompt + len(t) - 1)], len(t)).total for t in peers.targets)
    longest = max(map(len, peers.targets)) - 1
    repeated = forward(shape, BATCH, 1, [(0, prompt)], 1).total
    repeated += len(names) * forward(shape, BATCH, 0, [(prompt, longest)], longest).total
    rows = []
    # A repeated cache computes the prefix once, as ours does: what is left to save is the counted limit.
    for peer, what, asked, flops in (
        ("one_forward_each", "one forward a name", 20, each),
        ("repeated_cache", "one batched forward, prefix cache repeated", None, repeated),
    ):
        ratio, limit = ratio_of(seconds, peer, "ours"), flops / counted
        print(f"class scores: {counted / 1e9:.2f} GFLOP, {what} {flops / 1e9:.2f}", file=sys.stderr)
        equal = f"log-likelihoods to {max(gaps['ours'], gaps[peer] if peer in gaps else 0):.0e}"
        rows.append(
            BenchmarkRow(
                f"{len(names)} class names, batch {BATCH}",
                what,
                middle["ours"],
                middle[peer],
                "s",
                limit,
                f"{asked}" if asked else f"the limit: {limit:.2f}",
                ratio >= (asked or limit),
                equal,
            )
        )
    return rows
