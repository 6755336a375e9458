"""SARR's self-labelled chains (arXiv 2602.23777, algorithm 1).

Round k = 1…N lets the model of the round's start write a chain for every training image with q_reason, keeps
(x, y, r̂) where the text inside <CONCLUSION> equals y, and tunes on what was kept.

Labelling is lazy: a sample's chain is written the first time the round meets it and kept for the round. That is the
same distribution as labelling the whole set first, without labelling what DomainBed's sampler never draws.

Beyond the paper, a second filter may ask that a chain that concludes rightly also supports its conclusion.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from domainbed_reasoning.chains import conclusion_of, match_class
from domainbed_reasoning.samples import SampleId


def accept(chain: str, label: int, class_names: Sequence[str]) -> bool:
    """Return whether SARR keeps ``chain``: the text inside <CONCLUSION> equals the label's name (the paper's rule)."""
    return match_class(conclusion_of(chain), class_names) == label


@dataclass
class SelfLabels:
    """The chains that one round's frozen labeller has written so far.

    Attributes:
        write: writes one chain for each image of a batch, ``(n, 3, H, W)``.
        class_names: of the task, in label order.
        supports: beyond the paper, says of accepted chains, given images, chains and labels, which of them are kept.
        written: by sample, the chain and whether it was kept; samples without an id are not remembered.
    """

    write: Callable[[torch.Tensor], list[str]]
    class_names: Sequence[str]
    supports: Callable[[torch.Tensor, list[str], list[int]], list[bool]] | None = None
    written: dict[SampleId, tuple[str, bool]] = field(default_factory=dict)
    _labelled: int = 0
    _accepted: int = 0
    _told: int = 0

    def chains_for(
        self, images: torch.Tensor, labels: Sequence[int], ids: Sequence[SampleId] | None
    ) -> list[str | None]:
        """Return the kept chain of each image, None where the labeller's chain was rejected.

        Args:
            images: ``(n, 3, H, W)``, as the labeller takes them.
            labels: n true labels.
            ids: n sample ids; None labels every image anew.
        """
        keys: Sequence[SampleId | None] = ids if ids is not None else [None] * len(labels)
        fresh: dict[SampleId | int, int] = {}  # one image of each new sample: a batch may draw a sample twice
        for position, key in enumerate(keys):
            if key is None or key not in self.written:
                fresh.setdefault(position if key is None else key, position)
        unkeyed: dict[int, tuple[str, bool]] = {}
        if fresh:
            positions = list(fresh.values())
            chains = self.write(images[positions])
            for position, chain, kept in zip(
                positions, chains, self._keep(positions, chains, images, labels), strict=True
            ):
                self._labelled += 1
                self._accepted += kept
                key = keys[position]
                if key is None:
                    unkeyed[position] = (chain, kept)
                else:
                    self.written[key] = (chain, kept)
        found = [unkeyed[i] if key is None else self.written[key] for i, key in enumerate(keys)]
        return [chain if kept else None for chain, kept in found]

    def _keep(self, positions: list[int], chains: list[str], images: torch.Tensor, labels: Sequence[int]) -> list[bool]:
        """Return which of the chains, written for the images at ``positions``, are kept."""
        kept = [
            accept(chain, labels[position], self.class_names) for position, chain in zip(positions, chains, strict=True)
        ]
        rows = [row for row, accepted in enumerate(kept) if accepted]
        if self.supports is not None and rows:
            where = [positions[row] for row in rows]
            verdicts = self.supports(images[where], [chains[row] for row in rows], [labels[at] for at in where])
            for row, verdict in zip(rows, verdicts, strict=True):
                kept[row] = verdict
        return kept

    @property
    def labelled(self) -> int:
        """Number of chains written."""
        return self._labelled

    @property
    def accepted_share(self) -> float:
        """Share of written chains that were kept, in [0, 1]; 0 before the first."""
        return self._accepted / self._labelled if self._labelled else 0.0

    def newly_written(self) -> list[tuple[int, int, str, bool]]:
        """Return what was written since the last call: environment, index, chain, whether it was kept."""
        new = list(itertools.islice(self.written.items(), self._told, None))
        self._told = len(self.written)
        return [(env, index, chain, kept) for (env, index), (chain, kept) in new]

    def restore(self, rows: Sequence[tuple[int, int, str, bool]], labelled: int, accepted_share: float) -> None:
        """Remember what an earlier process wrote in this round.

        Args:
            rows: as `newly_written` returned them.
            labelled: the count then, which samples without an id are part of.
            accepted_share: then.
        """
        self.written = {(env, index): (chain, kept) for env, index, chain, kept in rows}
        self._told = len(self.written)
        self._labelled, self._accepted = labelled, round(accepted_share * labelled)
