"""How chains answer, and what scores follow: the same for DomainBed, `predict` and the analyses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from domainbed_reasoning.chains.reader import read_conclusion
from domainbed_reasoning.method.model import ReasoningModel
from domainbed_reasoning.method.task import SampleId, Task


def elected_chains(
    mllm: ReasoningModel,
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
    mllm: ReasoningModel,
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
    mllm: ReasoningModel,
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


def misled(task: Task) -> tuple[list[SampleId], list[SampleId]]:
    """Return the samples whose teacher chain concludes with no class, and those with another class than their own."""
    answers = answers_from_chains(list(task.chains.values()), task.class_names)
    pairs = list(zip(task.chains, answers, strict=True))
    nothing = [key for key, answer in pairs if answer is None]
    other = [(env, i) for (env, i), answer in pairs if answer is not None and answer != task.labels[env][i]]
    return nothing, other


def answers_from_chains(chains: Sequence[str], class_names: Sequence[str], exact: bool = False) -> list[int | None]:
    """Return the class that each chain concludes with, None where it names no class of the task.

    Args:
        chains: n texts as they were generated.
        class_names: of the task.
        exact: see `reader.read_conclusion`.
    """
    read = {chain: read_conclusion(chain, class_names, exact).answer for chain in set(chains)}
    return [read[chain] for chain in chains]


def elect(candidates: Sequence[str], class_names: Sequence[str], exact: bool = False) -> str:
    """Return the first chain that concludes with the class that most of the candidates conclude with.

    Self-consistency (Wang et al., 2023, arXiv 2203.11171). Chains that name no class have no vote; between classes with
    as many votes the one that was named first wins; where none names a class, the first chain is returned.
    """
    answers = answers_from_chains(candidates, class_names, exact)
    named = [answer for answer in answers if answer is not None]
    return candidates[answers.index(max(named, key=named.count))] if named else candidates[0]


def scores_from_answers(answers: Sequence[int | None], label_scores: torch.Tensor) -> torch.Tensor:
    """Return class scores in [0, 1] for read conclusions, falling back to the classification path.

    Args:
        answers: for each row the concluded class; None where the chain did not parse.
        label_scores: log-likelihoods of the class names for the rows without an answer, in order, ``(m, C)``.

    Returns:
        ``(n, C)``: 1 for the concluded class and 0 for the others; softmax of ``label_scores`` where there is none.
    """
    scores = label_scores.new_zeros(len(answers), label_scores.shape[1], dtype=torch.float32)
    fallback = iter(label_scores.float().softmax(dim=1))
    for row, answer in enumerate(answers):
        if answer is None:
            scores[row] = next(fallback)
        else:
            scores[row, answer] = 1.0
    return scores
