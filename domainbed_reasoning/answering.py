"""How chains answer, and what scores follow: the same for DomainBed, `predict` and the analyses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from domainbed_reasoning.scoring import answers_from_chains, elect, scores_from_answers


def elected_chains(
    mllm: Any,
    images: torch.Tensor,
    question: str,
    class_names: Sequence[str],
    max_new_tokens: int,
    batch: int,
    votes: int = 1,
    *sampling: float,
    exact: bool = False,
) -> list[str]:
    """Return a chain for each image: of ``votes`` chains the first that concludes as most do (`scoring.elect`).

    Args:
        mllm: writes the chains.
        images: ``(n, 3, H, W)``.
        question: q_reason.
        class_names: of the task.
        max_new_tokens: at most so many tokens a chain.
        batch: images at a time.
        votes: chains an image.
        sampling: temperature and top_p; none is greedy.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """
    chains: list[str] = []
    for part in images.split(batch):
        rounds = [mllm.generate(part, question, max_new_tokens, *sampling) for _ in range(votes)]
        chains += [elect(candidates, class_names, exact) for candidates in zip(*rounds, strict=True)]
    return chains


def answering_chains(
    mllm: Any,
    images: torch.Tensor,
    question: str,
    class_names: Sequence[str],
    max_new_tokens: int,
    batch: int,
    votes: int,
    vote_temperature: float,
    exact: bool = False,
) -> list[str]:
    """Return the chain that answers for each image: a greedy one, or the one elected of several sampled ones.

    Args:
        mllm: writes the chains.
        images: ``(n, 3, H, W)``.
        question: q_reason.
        class_names: of the task.
        max_new_tokens: at most so many tokens a chain.
        batch: images at a time.
        votes: chains an image; 1 is the paper's.
        vote_temperature: at which several are sampled.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """
    sampling = (vote_temperature,) if votes > 1 else ()
    return elected_chains(mllm, images, question, class_names, max_new_tokens, batch, votes, *sampling, exact=exact)


def scores_of_chains(
    mllm: Any,
    images: torch.Tensor,
    question: str,
    class_names: Sequence[str],
    chains: Sequence[str],
    by_label: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Return class scores in [0, 1], ``(n, C)``: the chain's, the classification path's where it names no class.

    Args:
        mllm: is asked about the images whose chain names no class.
        images: ``(n, 3, H, W)``.
        question: q_cls.
        class_names: C names.
        chains: n chains.
        by_label: log-likelihoods of all n images' class names, ``(n, C)``, where they are there already.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """
    answers = answers_from_chains(chains, class_names, exact)
    failed = [row for row, answer in enumerate(answers) if answer is None]
    if by_label is not None:
        fallback = by_label[failed]
    elif failed:
        fallback = mllm.class_scores(images[failed], question, class_names)
    else:
        fallback = torch.zeros(0, len(class_names), device=images.device)
    return scores_from_answers(answers, fallback)
