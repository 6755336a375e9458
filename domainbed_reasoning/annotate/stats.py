"""Statistics of chains: coverage, acceptance, rejection rules, lengths, tokens and cost, by domain and class."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from domainbed_reasoning.chains.chain import count_words
from domainbed_reasoning.chains.image_names import ImageLookup
from domainbed_reasoning.chains.record import is_accepted
from domainbed_reasoning.chains.store import Record
from domainbed_reasoning.images.catalog import Picture


@dataclass
class Group:
    """Counts over some images and their candidates.

    Attributes:
        images: in the dataset.
        chains: images with an accepted chain.
        tried: images with a candidate.
        candidates: in the chain file.
        accepted: of them.
        words: of each accepted chain, without tags.
        prompt_tokens: of all candidates that record them.
        completion_tokens: likewise.
        dollars: likewise.
        unpriced: candidates without a recorded cost.
        rules: rejected candidates by rule.
    """

    images: int = 0
    chains: int = 0
    tried: int = 0
    candidates: int = 0
    accepted: int = 0
    words: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    unpriced: int = 0
    rules: Counter[str] = field(default_factory=Counter)

    @property
    def coverage(self) -> float:
        """Share of images with a chain, in [0, 1]."""
        return self.chains / self.images if self.images else 0.0

    @property
    def acceptance(self) -> float:
        """Share of candidates accepted, in [0, 1]."""
        return self.accepted / self.candidates if self.candidates else 0.0

    @property
    def mean_words(self) -> float:
        """Mean number of words of an accepted chain."""
        return sum(self.words) / len(self.words) if self.words else 0.0

    def add(self, other: Group) -> None:
        """Add the counts of another group."""
        for name in ("images", "chains", "tried", "candidates", "accepted", "prompt_tokens", "completion_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dollars += other.dollars
        self.unpriced += other.unpriced
        self.words += other.words
        self.rules += other.rules


Groups = dict[tuple[str, str], Group]


def count(pictures: Sequence[Picture], records: Iterable[Mapping[str, Any]]) -> Groups:
    """Return the counts by (domain folder, class folder); candidates for unknown images are left out."""
    groups: Groups = {}
    of_image = {}
    for picture in pictures:
        group = groups.setdefault((picture.domain, picture.label), Group())
        group.images += 1
        of_image[picture.path] = group
    tried: set[str] = set()
    done: set[str] = set()
    for record in records:
        image = record["image"]
        if image not in of_image:
            continue
        group = of_image[image]
        group.tried += image not in tried
        tried.add(image)
        group.candidates += 1
        usage = record.get("usage") or {}
        group.prompt_tokens += usage.get("prompt_tokens") or 0
        group.completion_tokens += usage.get("completion_tokens") or 0
        group.dollars += usage.get("dollars") or 0.0
        group.unpriced += usage.get("dollars") is None
        if is_accepted(record):
            group.accepted += 1
            group.chains += image not in done
            done.add(image)
            group.words.append(count_words(record["chain"]))
        else:
            group.rules[record.get("rule") or "unnamed"] += 1
    return groups


def split_known(pictures: Sequence[Picture], records: Iterable[Record]) -> tuple[list[Record], int]:
    """Return the candidates for images in the dataset, and the number of the others."""
    names = ImageLookup(picture.path for picture in pictures)
    known, unknown = [], 0
    for record in records:
        if names.find(record["image"]) is not None:
            known.append(names.with_path_on_disk(record))
        else:
            unknown += 1
    return known, unknown


def describe_unknown(count: int, are_listed: bool = True) -> str:
    """Return a message about candidates for images that are not in the dataset; ``are_listed``: by `check`."""
    subject = "1 candidate is for an image that is" if count == 1 else f"{count:,} candidates are for images that are"
    listed = f"; `check` lists {'it' if count == 1 else 'them'}" if are_listed else ""
    return f"{subject} not in the dataset{listed}."


def total(groups: Groups, axis: int | None = None) -> dict[str, Group]:
    """Return the sums over all groups (None), by domain (0) or by class (1)."""
    sums: dict[str, Group] = {}
    for key, group in groups.items():
        sums.setdefault("all" if axis is None else key[axis], Group()).add(group)
    return sums


_HEAD = ("images", "tried", "chains", "coverage", "candidates", "accepted", "words", "tokens in", "tokens out", "$")


def as_table(groups: Groups, classes: Sequence[str]) -> str:
    """Return the counts by domain and by class, and the rejections by rule, as text."""
    everything = total(groups)["all"] if groups else Group()
    rows = [[name, *_cells(group)] for name, group in total(groups, 0).items()]
    rows += [["", *[""] * len(_HEAD)]]
    by_class = total(groups, 1)
    rows += [[name, *_cells(by_class[name])] for name in classes if name in by_class]
    rows += [["", *[""] * len(_HEAD)], ["all", *_cells(everything)]]
    lines = _aligned([["", *_HEAD], *rows])
    if everything.words:
        ordered = sorted(everything.words)
        marks = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.05, 0.5, 0.95, 1)]
        lines += ["", "words of accepted chains: min {}, 5% {}, median {}, 95% {}, max {}".format(*marks)]
    if 0 < everything.unpriced < everything.candidates:
        lines += ["", f"{everything.unpriced:,} of {everything.candidates:,} candidates have no recorded cost."]
    if everything.rules:
        rejected = everything.rules.total()
        lines += ["", f"{rejected:,} candidates rejected:"]
        lines += [f"  {amount:>8,} {amount / rejected:6.1%}  {rule}" for rule, amount in everything.rules.most_common()]
    return "\n".join(lines)


def _cells(group: Group) -> list[str]:
    return [
        f"{group.images:,}",
        f"{group.tried:,}",
        f"{group.chains:,}",
        f"{group.coverage:.1%}",
        f"{group.candidates:,}",
        f"{group.acceptance:.1%}" if group.candidates else "–",
        f"{group.mean_words:.0f}" if group.words else "–",
        f"{group.prompt_tokens:,}",
        f"{group.completion_tokens:,}",
        f"{group.dollars:.2f}" if group.candidates > group.unpriced else "–",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def as_dicts(groups: Groups) -> list[dict[str, Any]]:
    """Return the counts by domain and class, and rejections by rule, for JSON."""
    return [
        {
            "domain": domain,
            "class": label,
            "images": group.images,
            "tried": group.tried,
            "chains": group.chains,
            "candidates": group.candidates,
            "accepted": group.accepted,
            "mean_words": group.mean_words if group.words else None,
            "prompt_tokens": group.prompt_tokens,
            "completion_tokens": group.completion_tokens,
            "dollars": group.dollars if group.candidates > group.unpriced else None,
            "unpriced": group.unpriced,
            "rejected": dict(group.rules),
        }
        for (domain, label), group in groups.items()
    ]


def as_csv(groups: Groups) -> str:
    """Return the counts by domain and class as CSV, with a column for each rule."""
    rules = sorted({rule for group in groups.values() for rule in group.rules})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["domain", "class", "images", "tried", "chains", "coverage", "candidates", "accepted", "mean_words"]
        + ["prompt_tokens", "completion_tokens", "dollars", "unpriced"]
        + [f"rejected_{rule}" for rule in rules]
    )
    for (domain, label), group in groups.items():
        writer.writerow(
            [domain, label, group.images, group.tried, group.chains, round(group.coverage, 4), group.candidates]
            + [group.accepted, round(group.mean_words, 1), group.prompt_tokens, group.completion_tokens]
            + [round(group.dollars, 6) if group.candidates > group.unpriced else "", group.unpriced]
            + [group.rules[rule] for rule in rules]
        )
    return out.getvalue()
