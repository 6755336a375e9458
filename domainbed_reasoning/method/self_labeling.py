"""SARR's self-labeled chains (arXiv 2602.23777, algorithm 1).

Round k = 1…N lets the model of the round's start write a chain for every training image with q_reason, keeps
(x, y, r̂) where the text inside <CONCLUSION> equals y, and tunes on what was kept.

Labeling is lazy: a sample's chain is written the first time the round meets it and kept for the round. That is the
same distribution as labeling the whole set first, without labeling what DomainBed's sampler never draws.

The paper is silent about form. Equality is tested after normalization (`reader`), and an own chain that has blemishes
is trained on in canonical form, its thoughts, fences and words around the stages left out and its conclusion spelt as
the class is: what the model wrote would teach the next round's labeller to write more of them. A chain without
blemishes is trained on as it was written, and one that lacks a stage is kept for its conclusion, as the paper's rule
says. With the hparam ``answer_matching`` at ``exact`` the text inside <CONCLUSION> must equal y as it stands.

Beyond the paper, a second filter (``sarr_filter``) may ask more of a chain that concludes rightly: ``well_formed``, its
five stages in order, each closed, for a filter that reads the conclusion alone may keep chains whose stages break down
from round to round; ``consistent``, that its words support its conclusion (`consistency`). Whatever the filter, the
share of the kept chains that are well formed is recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from domainbed_reasoning.chains.reader import is_well_formed, read_conclusion
from domainbed_reasoning.method.answering import Questions, majority_chains
from domainbed_reasoning.method.consistency import ConsistencyFilter
from domainbed_reasoning.method.task import SampleId

Frozen = Callable[[], AbstractContextManager[Any]]  # gives the model of the round's start for a while


def accept(chain: str, label: int, class_names: Sequence[str], exact: bool = False) -> str | None:
    """Return the chain as it is trained on, None where SARR does not keep it.

    It is kept where the text inside <CONCLUSION> equals the label's name (the paper's rule).

    Args:
        chain: as it was written.
        label: the true class.
        class_names: of the task.
        exact: see `reader.read_conclusion`.
    """
    reading = read_conclusion(chain, class_names, exact)
    return reading.text if reading.answer == label else None


def labels_of_round(frozen: Frozen, questions: Questions, hparams: Mapping[str, Any]) -> SelfLabels:
    """Return the chains of a round that begins: none yet, to be written by the model that is frozen now.

    Args:
        frozen: gives that model for a while.
        questions: asked of it.
        hparams: ``sarr_votes``, ``temperature``, ``top_p`` and ``sarr_filter``.
    """
    names = questions.class_names
    sampling = (hparams["sarr_votes"], hparams["temperature"], hparams["top_p"])
    support = ConsistencyFilter(questions.both, names) if hparams["sarr_filter"] == "consistent" else None

    def write(images: torch.Tensor) -> list[str]:
        with frozen() as mllm:
            return majority_chains(mllm, images, *questions.writing, *sampling, exact=questions.exact)

    def supports(images: torch.Tensor, chains: list[str], labels: list[int]) -> list[bool]:
        assert support is not None
        with frozen() as mllm:
            return support.judge(mllm, images, chains, labels)

    def well_formed(images: torch.Tensor, chains: list[str], labels: list[int]) -> list[bool]:
        return [is_well_formed(chain, questions.exact) for chain in chains]

    second = {"conclusion": None, "well_formed": well_formed, "consistent": supports}[hparams["sarr_filter"]]
    return SelfLabels(write, names, second, questions.exact, support=support)


@dataclass
class SelfLabels:
    """The chains that one round's frozen labeller has written so far.

    Attributes:
        write: writes one chain for each image of a batch, ``(n, 3, H, W)``.
        class_names: of the task, in label order.
        second: beyond the paper, says of accepted chains, given images, chains and labels, which of them are kept.
        exact: how conclusions are read, see `reader.read_conclusion`.
        support: judges for ``second`` where that asks for consistency; its means over the round's chains are part of
            the state.
        written: by sample, the chain, in canonical form where it concludes with the label, and whether it was kept;
            samples without an id are not remembered.
    """

    write: Callable[[torch.Tensor], list[str]]
    class_names: Sequence[str]
    second: Callable[[torch.Tensor, list[str], list[int]], list[bool]] | None = None
    exact: bool = False
    support: ConsistencyFilter | None = None
    written: dict[SampleId, tuple[str, bool]] = field(default_factory=dict)
    _labeled: int = 0
    _accepted: int = 0
    _well_formed: int = 0
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
            judged = self._keep(positions, self.write(images[positions]), images, labels)
            for position, (chain, kept) in zip(positions, judged, strict=True):
                self._labeled += 1
                self._accepted += kept
                self._well_formed += kept and is_well_formed(chain, self.exact)
                key = keys[position]
                if key is None:
                    unkeyed[position] = (chain, kept)
                else:
                    self.written[key] = (chain, kept)
        found = [unkeyed[i] if key is None else self.written[key] for i, key in enumerate(keys)]
        return [chain if kept else None for chain, kept in found]

    def _keep(
        self, positions: list[int], chains: list[str], images: torch.Tensor, labels: Sequence[int]
    ) -> list[tuple[str, bool]]:
        """Return the chains, written for the images at ``positions``, and which of them are kept."""
        read = [
            accept(chain, labels[position], self.class_names, self.exact)
            for position, chain in zip(positions, chains, strict=True)
        ]
        kept = [chain is not None for chain in read]
        chains = [written if chain is None else chain for written, chain in zip(chains, read, strict=True)]
        rows = [row for row, accepted in enumerate(kept) if accepted]
        if self.second is not None and rows:
            where = [positions[row] for row in rows]
            verdicts = self.second(images[where], [chains[row] for row in rows], [labels[at] for at in where])
            for row, verdict in zip(rows, verdicts, strict=True):
                kept[row] = verdict
        return list(zip(chains, kept, strict=True))

    @property
    def labeled(self) -> int:
        """Number of chains written."""
        return self._labeled

    @property
    def accepted_share(self) -> float:
        """Share of written chains that were kept, in [0, 1]; 0 before the first."""
        return self._accepted / self._labeled if self._labeled else 0.0

    @property
    def accepted(self) -> int:
        """Number of chains that were kept."""
        return self._accepted

    @property
    def well_formed_share(self) -> float:
        """Share of the kept chains that have five stages, in order, each closed, in [0, 1]; 1 before the first."""
        return self._well_formed / self._accepted if self._accepted else 1.0

    def shares(self, round: int) -> dict[str, float]:
        """Return what the records say of the round so far, in [0, 1].

        Returns:
            ``sarr{k}_accepted``, the share of written chains that were kept, and, where any was,
            ``sarr{k}_well_formed``, the share of these that are well formed.
        """
        whole = {f"sarr{round}_well_formed": self.well_formed_share} if self._accepted else {}
        return {f"sarr{round}_accepted": self.accepted_share, **whole}

    def newly_written(self) -> list[tuple[int, int, str, bool]]:
        """Return what was written since the last call: environment, index, chain, whether it was kept."""
        new = list(itertools.islice(self.written.items(), self._told, None))
        self._told = len(self.written)
        return [(env, index, chain, kept) for (env, index), (chain, kept) in new]

    def state_dict(self) -> dict[str, Any]:
        """Return counts and means of the round so far; the chains are recorded as they are written."""
        support = [self.support.sums, self.support.counts] if self.support is not None else []
        counts = {"labelled": self._labeled, "accepted": self._accepted, "well_formed": self._well_formed}
        return {**counts, "support": support}

    def load_state_dict(self, state: Mapping[str, Any], rows: Sequence[tuple[int, int, str, bool]]) -> None:
        """Restore what an earlier process wrote in this round.

        Args:
            state: what `state_dict` returned.
            rows: as `newly_written` returned them.
        """
        self.written = {(env, index): (chain, kept) for env, index, chain, kept in rows}
        self._told = len(self.written)
        self._labeled, self._accepted = state["labelled"], state["accepted"]
        self._well_formed = state["well_formed"]
        if self.support is not None:
            self.support.sums, self.support.counts = state["support"]
