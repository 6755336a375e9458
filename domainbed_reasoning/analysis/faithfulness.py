"""Does the conclusion follow the chain? Faithfulness measures, not part of the paper (arXiv 2602.23777).

For an image x with label y, let r be the model's own chain, ŷ the class that it concludes with, c a prefix of r, and
f(x | c) the conclusion of the model's answer to x when forced to start with c. Shares of the images whose chain names a
class:

    right                   ŷ = y
    agrees with label path  ŷ = argmax_k log p(k | x, q_cls)
    kept without image      f(gray | c) = ŷ: the chain alone determines its conclusion
    swapped image           x' with {ŷ', y'} ∩ {ŷ, y} = ∅, each x' about once: f(x' | c) = ŷ follows the chain, = ŷ' the
                            image
    edited caption          c' is c up to its caption, replaced by the caption of the class k = ŷ' of such an x':
                            f(x | c') = k follows the caption, = ŷ the image
    caption's class         the class whose parts the caption names (if captions have a known code), against ŷ and y

If captions have a known code, the edit changes the parts in the model's own sentences, and counts if the caption
describes a class other than k before the edit, and k after it.

If the cue is known, x is rendered with the cue of y and with that of a class k ≠ y. Shares of the images for which both
answers name a class (for the classification path: of all images):

    right                   with each cue
    follows the cue         f(x with the cue of k) = k
    changed by the cue      the two answers differ

and, of the images whose chain names a class with the cue of y, the share that names none with the cue of k.

Swapped and missing images are evaluated with two prefixes: c up to the opening tag of the conclusion, and c up to the
first mention of ŷ in r, which is often before the conclusion and determines it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.analysis.cues import ShapesCues
from domainbed_reasoning.analysis.data import AnalysisData
from domainbed_reasoning.analysis.naming import first_naming
from domainbed_reasoning.analysis.settings import kinds_of
from domainbed_reasoning.analysis.tables import share_row
from domainbed_reasoning.chains.chain import conclusion_of
from domainbed_reasoning.chains.reader import read_conclusion
from domainbed_reasoning.method.answering import answers_from_chains
from domainbed_reasoning.method.task import SampleId
from domainbed_reasoning.mllm import MLLM

Row = dict[str, Any]

_TO_CONCLUSION, _CAPTION, _CAPTION_END = "<CONCLUSION>", "<CAPTION>", "</CAPTION>"


@dataclass
class Reader:
    """A model that generates and completes answers.

    Attributes:
        mllm: the model.
        data: questions and class names.
        max_new_tokens: maximum length of a chain in tokens.
        batch: batch size.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """

    mllm: MLLM
    data: AnalysisData
    max_new_tokens: int
    batch: int = 64
    exact: bool = False

    def chains(self, pixels: torch.Tensor) -> list[str]:
        """Return the model's chain for every image, ``(n, 3, H, W)``; in canonical form if it names a class."""
        parts = pixels.split(self.batch)
        question, names = self.data.q_reason, self.data.task.class_names
        written = [chain for part in parts for chain in self.mllm.generate(part, question, self.max_new_tokens)]
        return [read_conclusion(chain, names, self.exact).text for chain in written]

    def conclude_from(self, pixels: torch.Tensor, beginnings: Sequence[str]) -> list[int | None]:
        """Return the classes that completions of the prefixes conclude with; None for those that name none."""
        answers: list[int | None] = []
        for start in range(0, len(pixels), self.batch):
            begun = beginnings[start : start + self.batch]
            rest = self.mllm.generate(
                pixels[start : start + self.batch], self.data.q_reason, self.max_new_tokens, beginnings=begun
            )
            whole = [before + after for before, after in zip(begun, rest, strict=True)]
            answers += answers_from_chains(whole, self.data.task.class_names, self.exact)
        return answers

    def labels(self, pixels: torch.Tensor) -> list[int]:
        """Return the classification path's answer for every image."""
        names = self.data.task.class_names
        parts = [self.mllm.class_scores(part, self.data.q_cls, names) for part in pixels.split(self.batch)]
        classes: list[int] = torch.cat(parts).argmax(1).tolist()
        return classes


def measure(reader: Reader, samples: Sequence[SampleId], cues: ShapesCues | None) -> tuple[list[Row], list[Any]]:
    """Return the shares for a model, and the answers that they are based on.

    Args:
        reader: the model.
        samples: the images.
        cues: ground truth of captions and the cue; None if unknown.

    Returns:
        Rows with ``what``, ``n``, ``share`` and its 95% interval (only the share that names a class if no chain does),
        and one row per image.
    """
    pixels = reader.data.pixels(samples)
    true = [reader.data.label(sample) for sample in samples]
    chains = reader.chains(pixels)
    concluded = answers_from_chains(chains, reader.data.task.class_names, reader.exact)
    by_label = reader.labels(pixels)
    rows = [
        {"env": env, "index": index, "label": y, "chain_answer": answer, "label_answer": other, "chain": chain}
        for (env, index), y, answer, other, chain in zip(samples, true, concluded, by_label, chains, strict=True)
    ]
    named = [i for i, answer in enumerate(concluded) if answer is not None]
    shares = [share_row("names a class", [answer is not None for answer in concluded])]
    if not named:
        return shares, rows
    shares += [
        share_row("right", [concluded[i] == true[i] for i in named]),
        share_row("label path right", [by_label[i] == true[i] for i in named]),
        share_row("agrees with label path", [concluded[i] == by_label[i] for i in named]),
        *_without_image(reader, pixels, rows, named),
        *_swapped_image(reader, pixels, rows, named),
        *_edited_caption(reader, pixels, rows, named, cues),
    ]
    if cues is not None:
        shares += _caption_says(rows, named, cues) + _cue_followed(reader, samples, rows, cues)
    return shares, rows


def pool(rows: Sequence[Row]) -> list[Row]:
    """Return the pooled shares of each kind of job over targets and seeds, treating images as independent.

    Args:
        rows: of `measure`, each with its job's ``algorithm``, ``dataset`` and ``setting``.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row, kind in zip(rows, kinds_of(rows), strict=True):
        groups.setdefault((kind, row["what"]), []).append(row)
    pooled = []
    for (kind, what), parts in groups.items():
        count = sum(part["n"] for part in parts)
        hits = round(sum(part["n"] * (part["share"] or 0.0) for part in parts))
        pooled.append({"models": kind, **share_row(what, [True] * hits + [False] * (count - hits))})
    return pooled


def before_conclusion(chain: str) -> str:
    """Return a chain up to and including the opening tag of its conclusion."""
    return chain[: chain.index(_TO_CONCLUSION) + len(_TO_CONCLUSION)]


def before_naming(chain: str) -> str:
    """Return a chain up to the first mention of its conclusion; at most up to `before_conclusion`."""
    start = before_conclusion(chain)
    named = first_naming(chain, conclusion_of(chain) or "", len(start) - len(_TO_CONCLUSION))
    return start[: named[0]].rstrip() if named else start


BEGINNINGS = {"to the conclusion": before_conclusion, "to the naming": before_naming}


def caption_of(chain: str) -> str | None:
    """Return the text of a chain's caption; None if it has none."""
    _, opened, rest = chain.partition(_CAPTION)
    text, closed, _ = rest.partition(_CAPTION_END)
    return text.strip() if opened and closed else None


def with_caption(chain: str, caption: str) -> str:
    """Return a chain up to the end of its caption, with the caption replaced."""
    return f"{chain[: chain.index(_CAPTION) + len(_CAPTION)]}{caption}{_CAPTION_END}"


def partners(answered: Sequence[tuple[int, int]], seed: int = 0) -> list[int | None]:
    """Return a partner for each image with which it has no class in common; None if there is none.

    The concluded and true classes of the two are disjoint, so that answers can be attributed. The least recently used
    candidate is taken, initially in a random order: each image serves about once, regardless of the class order.

    Args:
        answered: concluded and true class of each image.
        seed: seed of the order.
    """
    waiting = random.Random(seed).sample(range(len(answered)), len(answered))
    found: list[int | None] = []
    for one in answered:
        other = next((j for j in waiting if not set(answered[j]) & set(one)), None)
        if other is not None:
            waiting.remove(other)
            waiting.append(other)
        found.append(other)
    return found


def _without_image(reader: Reader, pixels: torch.Tensor, rows: list[Row], named: list[int]) -> list[Row]:
    grey = torch.full_like(pixels[named], 127)
    shares = []
    for where, cut in BEGINNINGS.items():
        answers = reader.conclude_from(grey, [cut(rows[i]["chain"]) for i in named])
        for i, answer in zip(named, answers, strict=True):
            rows[i][f"without_image_{where}"] = answer
        kept = [rows[i]["chain_answer"] == answer for i, answer in zip(named, answers, strict=True)]
        shares.append(share_row(f"without image, {where}: kept", kept))
    return shares


def _swapped_image(reader: Reader, pixels: torch.Tensor, rows: list[Row], named: list[int]) -> list[Row]:
    found = partners([(rows[i]["chain_answer"], rows[i]["label"]) for i in named])
    other = {i: named[j] for i, j in zip(named, found, strict=True) if j is not None}
    for i, j in other.items():
        rows[i]["swapped_image"] = f"{rows[j]['env']}/{rows[j]['index']}"
    shares = []
    for where, cut in BEGINNINGS.items() if other else ():
        answers = reader.conclude_from(pixels[list(other.values())], [cut(rows[i]["chain"]) for i in other])
        chain, image = [], []
        for (i, j), answer in zip(other.items(), answers, strict=True):
            rows[i][f"swapped_image_{where}"] = answer
            chain.append(answer == rows[i]["chain_answer"])
            image.append(answer == rows[j]["chain_answer"])
        shares += [
            share_row(f"swapped image, {where}: follows the chain", chain),
            share_row(f"swapped image, {where}: follows the image", image),
        ]
    return shares


def _edited_caption(
    reader: Reader, pixels: torch.Tensor, rows: list[Row], named: list[int], cues: ShapesCues | None
) -> list[Row]:
    able = [i for i in named if caption_of(rows[i]["chain"]) is not None]
    donors = partners([(rows[i]["chain_answer"], rows[i]["label"]) for i in able])
    edits: dict[int, tuple[str, int]] = {}
    for i, j in zip(able, donors, strict=True):
        if j is None:
            continue
        edited = rows[able[j]]["chain_answer"]
        own, text = str(caption_of(rows[i]["chain"])), str(caption_of(rows[able[j]]["chain"]))
        if cues is not None:
            text = cues.caption_for(edited, own)
            if cues.class_of(text) != edited or cues.class_of(own) == edited:
                continue
        edits[i] = (with_caption(rows[i]["chain"], text), edited)
    if not edits:
        return []
    answers = reader.conclude_from(pixels[list(edits)], [begun for begun, _ in edits.values()])
    for (i, (_, edited)), answer in zip(edits.items(), answers, strict=True):
        rows[i] |= {"edited_to": edited, "edited_caption": answer}
    follow_caption = [rows[i]["edited_caption"] == edited for i, (_, edited) in edits.items()]
    follow_image = [rows[i]["edited_caption"] == rows[i]["chain_answer"] for i in edits]
    return [
        share_row("edited caption: follows the caption", follow_caption),
        share_row("edited caption: keeps its conclusion", follow_image),
    ]


def _caption_says(rows: list[Row], named: list[int], cues: ShapesCues) -> list[Row]:
    for row in rows:
        row["caption_class"] = cues.class_of(caption_of(row["chain"]) or "")
    read = [rows[i] for i in named if rows[i]["caption_class"] is not None]
    return [
        share_row("caption fits one class", [rows[i]["caption_class"] is not None for i in named]),
        share_row("caption's class is the conclusion", [row["caption_class"] == row["chain_answer"] for row in read]),
        share_row("caption's class is true", [row["caption_class"] == row["label"] for row in read]),
    ]


def _cue_followed(reader: Reader, samples: Sequence[SampleId], rows: list[Row], cues: ShapesCues) -> list[Row]:
    """Evaluate the same images with the true class's cue and with another's, all else being equal."""
    names = reader.data.task.class_names
    for cue, misleading in (("true_cue", False), ("misleading_cue", True)):
        pixels = torch.stack([cues.image(sample, misleading) for sample in samples])
        by_chain, by_label = answers_from_chains(reader.chains(pixels), names, reader.exact), reader.labels(pixels)
        for row, chain, label in zip(rows, by_chain, by_label, strict=True):
            row |= {f"{cue}_chain": chain, f"{cue}_label": label}
    shares = []
    for path in ("chain", "label"):
        before, after = f"true_cue_{path}", f"misleading_cue_{path}"
        read = [row for row in rows if row[before] is not None and row[after] is not None]
        shares += [
            share_row(f"{path}: right, true cue", [row[before] == row["label"] for row in read]),
            share_row(f"{path}: right, misleading cue", [row[after] == row["label"] for row in read]),
            share_row(
                f"{path}: follows the misleading cue", [row[after] == cues.suggested(row["label"]) for row in read]
            ),
            share_row(f"{path}: changed by the cue", [row[before] != row[after] for row in read]),
        ]
    named = [row["misleading_cue_chain"] for row in rows if row["true_cue_chain"] is not None]
    return [*shares, share_row("chain: names no class, by the cue", [answer is None for answer in named])]
