"""Self-labeling 500 images: SARR's labeller against plain `generate`, unmerged, in dataset order.

The embedded model on the images of ShapesReasoning, tuned beforehand to write chains of 40 to 110 tokens, longer for
some classes than for others: its own are all alike, the paper's are not. Adapters that are not zero on top. Both write
greedily in batches of 64 and encode their images themselves; ours includes the merged copy that a round begins with.
"""

from __future__ import annotations

import pathlib

import torch

from benchmarks.measure import REPEATS, BenchmarkRow, interleaved, medians, ratio_of
from domainbed_reasoning.chains.chain import END_OF_CHAIN, Chain
from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.mllm import MLLM, LoraSettings, load_mllm
from domainbed_reasoning.mllm.adapters import add_lora
from domainbed_reasoning.mllm.generation_cache import AnswerCache
from domainbed_reasoning.mllm.pixels import from_picture

IMAGES, BATCH, TOKENS = 500, 64, 160
LESSONS, LESSON_BATCH = 60, 14
COUNTED = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()


def lesson(label: int) -> str:
    """Return a chain that is the longer, the higher the class."""
    name = shapes.CLASS_NAMES[label]
    details = ", ".join(f"{name} {count}" for count in COUNTED[: 2 + 2 * label])
    return Chain("compare parts", f"a {name}", details, "nothing odd", name).render()


def tuned(images: torch.Tensor, labels: list[int], question: str) -> MLLM:
    """Return the embedded model after a few lessons, with adapters."""
    mllm = load_mllm("tiny", device="cpu").train()
    mllm.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(mllm.network.parameters(), lr=1e-3)
    dice = torch.Generator().manual_seed(0)
    for _ in range(LESSONS):
        rows = torch.randint(len(images), (LESSON_BATCH,), generator=dice)
        answers = [lesson(labels[row]) for row in rows.tolist()]
        values, mask = mllm.log_likelihoods(mllm.encode(images[rows]), question, answers)
        (-(values * mask).sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    mllm.network.requires_grad_(False)
    network = add_lora(mllm.network, LoraSettings(8, 16))
    return MLLM(network, mllm.processor, mllm.family).eval()


class Labellers:
    """One model, asked two ways."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.question = q_reason(shapes.CLASS_NAMES, "creature")
        transform = from_picture(shapes.IMAGE_SIZE)
        keys = [(d, i) for d in range(len(shapes.DOMAINS)) for i in range(shapes.SIZE_OF_DOMAIN)][:IMAGES]
        self.images = torch.stack([transform(shapes.render(*key, misleading=False)) for key in keys])
        self.mllm = tuned(self.images, [shapes.label(*key) for key in keys], self.question)
        with torch.no_grad():
            for name, weight in self.mllm.adapters().items():
                if "lora_B" in name:
                    weight.normal_(std=0.005)

    def ours(self) -> list[str]:
        self.mllm.answer_cache = AnswerCache()  # every repeat writes anew
        frozen = self.mllm.copy_for_inference()
        return [chain for part in self.images.split(BATCH) for chain in frozen.generate(part, self.question, TOKENS)]

    @torch.no_grad()
    def plain(self) -> list[str]:
        mllm, chains = self.mllm, []
        for part in self.images.split(BATCH):
            pixels = mllm.processor.image_processor(images=list(part), crop_to_patches=False, return_tensors="pt")[
                "pixel_values"
            ]
            ids = mllm.prompt(self.question)["input_ids"].expand(len(part), -1)
            out = mllm.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=TOKENS,
                stop_strings=[END_OF_CHAIN],
                tokenizer=mllm.tokenizer,
            )
            texts = mllm.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            chains += [text.strip() for text in texts]
        return chains


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the row of self-labeling."""
    labellers = Labellers()
    ours, plain = labellers.ours(), labellers.plain()
    same = sum(a == b for a, b in zip(ours, plain, strict=True))
    assert same >= 0.99 * IMAGES, f"{same} of {IMAGES} chains are the same"
    tokens = [len(labellers.mllm.tokenizer(text)["input_ids"]) for text in ours]
    batches = [tokens[start : start + BATCH] for start in range(0, IMAGES, BATCH)]
    padding = sum(len(batch) * max(batch) for batch in batches) / sum(tokens)
    layers = [m for m in labellers.mllm.network.modules() if hasattr(m, "lora_A")]
    plain_work = sum(layer.in_features * layer.out_features for layer in layers)
    adapters = sum(8 * (layer.in_features + layer.out_features) for layer in layers)
    limit = padding * (1 + adapters / plain_work)
    seconds = interleaved({"ours": labellers.ours, "plain": labellers.plain}, repeats)
    middle, ratio = medians(seconds), ratio_of(seconds, "plain", "ours")
    return [
        BenchmarkRow(
            f"self-labeling {IMAGES} images, {min(tokens)}-{max(tokens)} tokens",
            "plain `generate`, unmerged adapters, dataset order",
            middle["ours"],
            middle["plain"],
            "s",
            limit,
            "1.5",
            ratio >= 1.5,
            f"{same} of {IMAGES} chains the same",
        )
    ]
