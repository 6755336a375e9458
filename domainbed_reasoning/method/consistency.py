"""Whether a chain supports its conclusion: would its words lead to that class if the image were not there?

SARR keeps a chain for its conclusion alone (arXiv 2602.23777, algorithm 1), so it may keep chains that see wrong parts
and conclude rightly all the same. Here the labeller is shown a blank image, and a chain r̂ of class y is held against
the same chain with a rival's name wherever y's stood:

    s(c) = log p(r̂[y → c] | blank, q_reason) - its mean over the chains of the round,   kept if s(y) > s(c) for all c.

Only what caption and reasoning say can tell the versions apart: a rival's parts under y's name make the rival likelier.
Ours, not the paper's. The text-only question is that of faithfulness tests of reasoning (Lanham et al., 2023, arXiv
2307.13702), asked of likelihoods; taking off what a name has without evidence is contextual calibration (Zhao et al.,
2021, arXiv 2102.09690).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.chains.contradiction import contradiction, mention
from domainbed_reasoning.method.model import ReasoningModel

RIVALS = 6  # classes that a chain's own is held against: those that the label path finds likeliest on the image
_GREY = 128
_ROWS = 64  # texts a forward pass


def rename(text: str, name: str, other: str) -> str:
    """Return ``text`` with ``other`` wherever it mentions the class ``name`` as a word of its own."""
    return mention((name,)).sub(lambda _: other, text)


@dataclass
class ConsistencyFilter:
    """Judges the chains of one round; what it has seen tells how likely each class's name is whatever the words say.

    A chain must have its five stages, must not contradict itself in words (`contradiction`), and its own class must
    gain more from its words than any rival: the likelihood of every version is held against the mean of that class's
    versions over the round's chains so far, so that a name that the blank image alone suggests is no evidence. The
    round's first chain has nothing to be held against and is not kept.

    Costs one pass of the label path where there are more than ``RIVALS`` others, and 1 + ``RIVALS`` passes of text.

    Attributes:
        questions: q_cls and q_reason.
        class_names: of the task, in label order.
        sums: by class, what its versions had more than the mean of their chain's versions, in nats.
        counts: by class, how many versions.
    """

    questions: tuple[str, str]
    class_names: Sequence[str]
    sums: torch.Tensor = field(init=False)
    counts: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin without any chain."""
        self.sums = torch.zeros(len(self.class_names))
        self.counts = torch.zeros(len(self.class_names))

    def judge(
        self, mllm: ReasoningModel, images: torch.Tensor, chains: Sequence[str], labels: Sequence[int]
    ) -> list[bool]:
        """Return whether each chain, which concludes with its label, supports that conclusion.

        Args:
            mllm: the labeller.
            images: n images, ``(n, 3, H, W)``; the label path looks at them for rivals, the likelihoods do not.
            chains: n chains.
            labels: n classes.
        """
        if not chains:
            return []
        names = self.class_names
        rivals = _rivals(mllm, self.questions[0], images, labels, names)
        classes = torch.tensor([[label, *others] for label, others in zip(labels, rivals, strict=True)])
        texts = [
            rename(chain, names[label], names[other]) if other != label else chain
            for chain, label, row in zip(chains, labels, classes.tolist(), strict=True)
            for other in row
        ]
        versions = _without_image(mllm, self.questions[1], texts, images).view(len(chains), -1)  # (n, 1 + rivals)
        gains = versions - versions.mean(dim=1, keepdim=True)
        self.sums.index_add_(0, classes.flatten(), gains.flatten())
        self.counts.index_add_(0, classes.flatten(), torch.ones(classes.numel()))
        evidence = gains - (self.sums / self.counts.clamp(min=1))[classes]
        fits = (evidence[:, :1] > evidence[:, 1:]).all(dim=1).tolist()  # without rivals nothing is likelier
        sound = [_is_sound(chain, label, names) for chain, label in zip(chains, labels, strict=True)]
        return [words and fit for words, fit in zip(sound, fits, strict=True)]


def _is_sound(chain: str, label: int, class_names: Sequence[str]) -> bool:
    try:
        return contradiction(parse_chain(chain), label, class_names) is None
    except ChainError:
        return False


def _rivals(
    mllm: ReasoningModel, question: str, images: torch.Tensor, labels: Sequence[int], class_names: Sequence[str]
) -> list[list[int]]:
    """Return for each image the likeliest other classes."""
    count = min(RIVALS, len(class_names) - 1)
    if count == len(class_names) - 1:
        return [[other for other in range(len(class_names)) if other != label] for label in labels]
    order = mllm.class_scores(images, question, class_names).argsort(dim=1, descending=True).tolist()
    return [[other for other in row if other != label][:count] for row, label in zip(order, labels, strict=True)]


@torch.no_grad()
def _without_image(mllm: ReasoningModel, question: str, texts: Sequence[str], like: torch.Tensor) -> torch.Tensor:
    """Return log p of each text after a blank image, the sum over its tokens in nats, ``(len(texts),)``."""
    parts = []
    for start in range(0, len(texts), _ROWS):
        part = list(texts[start : start + _ROWS])
        blank = torch.full_like(like[:1], _GREY).expand(len(part), *like.shape[1:])
        log_likelihoods, mask = mllm.log_likelihoods(mllm.encode(blank), question, part)
        parts.append((log_likelihoods * mask).sum(dim=1))
    return torch.cat(parts).cpu()
