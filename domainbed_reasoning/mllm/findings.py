"""Findings about a model: which optimizations it supports."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.files.cache import cache_folder


@dataclass(frozen=True)
class Findings:
    """Results of the trials of one model; see `trials`.

    Attributes:
        tree: how rows that share a prefix are computed, as in `Family`; empty where they are not.
        batch: whether images in one batch get the logits that each gets alone.
        padding: whether rows padded on the right get the logits of rows without padding.
        reuse: whether encoded images can be used again for another question.
        cache: whether generation with a cache of keys and values equals generation without.
        image_tokens: tokens of a prompt that stand for its image.
        worst: largest deviation of a log-likelihood among the optimizations in use, in nats.
        seconds: that the trials took.
    """

    tree: str
    batch: bool
    padding: bool
    reuse: bool
    cache: bool
    image_tokens: int
    worst: float
    seconds: float

    @property
    def costs(self) -> tuple[str, ...]:
        """Descriptions of what is computed redundantly; empty if everything is fast."""
        if self.tree:
            return ()
        return (
            "two rows a sample and a row a class name",
            *(() if self.batch else ("one image at a time",)),
            *(() if self.padding or not self.batch else ("answers of equal length at a time",)),
            *(() if self.reuse else ("images encoded for every question",)),
            *(() if self.cache else ("generation without a cache",)),
        )

    def table(self) -> list[tuple[str, str, str]]:
        """Return rows of (trial, finding, cost)."""
        shared = {"": "no", "plain": "equal", "rope": "equal, 3-D positions", "windows": "equal, sliding windows"}
        return [
            ("image tokens", str(self.image_tokens), ""),
            ("images in a batch", _equal(self.batch), "" if self.batch else "one image at a time"),
            ("right-padded rows", _equal(self.padding), "" if self.padding else "answers of equal length at a time"),
            ("reused vision features", _equal(self.reuse), "" if self.reuse else "images encoded for every question"),
            ("rows with a shared prefix", shared[self.tree], "" if self.tree else "two rows a sample, a row a name"),
            ("generation with a cache", _equal(self.cache), "" if self.cache else "the whole row for every token"),
            ("largest deviation", f"{self.worst:.1e} nats", ""),
            ("trials", f"{self.seconds:.1f} s", "once for each model and release of transformers"),
        ]


def _equal(found: bool) -> str:
    return "equal" if found else "not equal"


def recall(digest: str) -> Findings | None:
    """Return cached findings; None if there are none or they cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Findings(**json.loads((cache_folder() / "findings" / f"{digest}.json").read_text(encoding="utf-8")))
    return None


def remember(digest: str, findings: Findings) -> None:
    """Cache findings; a cache that cannot be written is skipped."""
    with contextlib.suppress(OSError):
        path = cache_folder() / "findings" / f"{digest}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(dataclasses.asdict(findings)))
