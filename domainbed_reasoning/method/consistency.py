"""Whether a chain supports its conclusion: does its text lead to that class without the image?

SARR filters chains by their conclusion alone (arXiv 2602.23777, algorithm 1), so it may keep chains that describe wrong
parts but conclude correctly. Here the labeler scores a chain r̂ of class y, given a blank image, against the same chain
with y's name replaced by that of a rival class:

    s(c) = log p(r̂[y → c] | blank, q_reason) - its mean over the round's chains,   kept if s(y) > s(c) for all c.

Only caption and reasoning can distinguish the versions: if they describe a rival's parts, the rival becomes likelier.
Not part of the paper. The text-only test follows faithfulness tests of reasoning (Lanham et al., 2023, arXiv
2307.13702), applied to likelihoods; subtracting a name's prior is contextual calibration (Zhao et al., 2021, arXiv
2102.09690).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.chains.contradiction import contradiction, mention
from domainbed_reasoning.method.model import ReasoningModel
from domainbed_reasoning.method.ranks import Ranks

RIVALS = 6  # rival classes: those that the label path finds likeliest for the image
_GREY = 128
_ROWS = 64  # texts per forward pass


def rename(text: str, name: str, other: str) -> str:
    """Return ``text`` with every mention of the class ``name`` as a separate word replaced by ``other``."""
    return mention((name,)).sub(lambda _: other, text)


@dataclass
class ConsistencyFilter:
    """Judges the chains of one round, using the previous ones to estimate each class name's prior.

    A chain must have its five stages, must not contradict its conclusion (`contradiction`), and must support its class
    more than any rival: each version's likelihood is compared with the mean of that class's versions over the round's
    chains so far, so that a name that is likely anyway is not evidence. The round's first chain has no reference and is
    not kept.

    Costs one pass of the label path if there are more than ``RIVALS`` other classes, and 1 + ``RIVALS`` text passes.

    Attributes:
        questions: q_cls and q_reason.
        class_names: of the task, in label order.
        ranks: share the forward passes.
        sums: by class, the sum of its versions' log-likelihoods above their chain's mean, in nats.
        counts: by class, the number of versions.
    """

    questions: tuple[str, str]
    class_names: Sequence[str]
    ranks: Ranks = field(default_factory=Ranks)
    sums: torch.Tensor = field(init=False)
    counts: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start with no chains."""
        self.sums = torch.zeros(len(self.class_names))
        self.counts = torch.zeros(len(self.class_names))

    def judge(
        self, mllm: ReasoningModel, images: torch.Tensor, chains: Sequence[str], labels: Sequence[int]
    ) -> list[bool]:
        """Return whether each chain supports its conclusion, which is its label.

        Args:
            mllm: the labeler.
            images: n images, ``(n, 3, H, W)``; used to find rivals, not for the likelihoods.
            chains: n chains.
            labels: n classes.
        """
        if not chains:
            return []
        names = self.class_names
        rivals = self._rivals(mllm, images, labels)
        classes = torch.tensor([[label, *others] for label, others in zip(labels, rivals, strict=True)])
        texts = [
            rename(chain, names[label], names[other]) if other != label else chain
            for chain, label, row in zip(chains, labels, classes.tolist(), strict=True)
            for other in row
        ]
        parts = self.ranks.map(len(texts), lambda rows: _without_image(mllm, self.questions[1], texts[rows], images))
        versions = torch.cat(parts).view(len(chains), -1)  # (n, 1 + rivals)
        gains = versions - versions.mean(dim=1, keepdim=True)
        self.sums.index_add_(0, classes.flatten(), gains.flatten())
        self.counts.index_add_(0, classes.flatten(), torch.ones(classes.numel()))
        evidence = gains - (self.sums / self.counts.clamp(min=1))[classes]
        fits = (evidence[:, :1] > evidence[:, 1:]).all(dim=1).tolist()  # True without rivals
        sound = [_is_sound(chain, label, names) for chain, label in zip(chains, labels, strict=True)]
        return [words and fit for words, fit in zip(sound, fits, strict=True)]

    def _rivals(self, mllm: ReasoningModel, images: torch.Tensor, labels: Sequence[int]) -> list[list[int]]:
        """Return for each image the likeliest other classes."""
        question, names = self.questions[0], self.class_names
        count = min(RIVALS, len(names) - 1)
        if count == len(names) - 1:
            return [[other for other in range(len(names)) if other != label] for label in labels]
        parts = self.ranks.map(len(images), lambda rows: mllm.class_scores(images[rows], question, names).cpu())
        order = torch.cat(parts).argsort(dim=1, descending=True).tolist()
        return [[other for other in row if other != label][:count] for row, label in zip(order, labels, strict=True)]


def _is_sound(chain: str, label: int, class_names: Sequence[str]) -> bool:
    try:
        return contradiction(parse_chain(chain), label, class_names) is None
    except ChainError:
        return False


@torch.no_grad()
def _without_image(mllm: ReasoningModel, question: str, texts: Sequence[str], like: torch.Tensor) -> torch.Tensor:
    """Return log p of each text after a blank image, the sum over its tokens in nats, ``(len(texts),)``."""
    parts = []
    for start in range(0, len(texts), _ROWS):
        part = list(texts[start : start + _ROWS])
        edge = like.shape[-1]  # of a tile, where images are columns of tiles
        blank = like.new_full((len(part), like.shape[1], edge, edge), _GREY)
        log_likelihoods, mask = mllm.log_likelihoods(mllm.encode(blank), question, part)
        parts.append((log_likelihoods * mask).sum(dim=1))
    return torch.cat(parts).cpu()
