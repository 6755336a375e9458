"""Answers and class scores from chains and class names, shared by DomainBed, `predict` and the analyses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.chains.reader import read_conclusion
from domainbed_reasoning.method.model import ReasoningModel
from domainbed_reasoning.method.ranks import Ranks
from domainbed_reasoning.method.task import SampleId, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Questions:
    """The questions asked about every image, and how chains are generated and parsed.

    Attributes:
        q_cls: the question of the classification path.
        q_reason: the question of the reasoning path.
        class_names: those that the questions offer, in label order.
        max_new_tokens: maximum length of a chain in tokens.
        batch: images per generation batch.
        exact: how conclusions are read, see `reader.read_conclusion`.
        offered: labels of the names, if they are not all of the task's; else None.
        num_classes: of the task, if they are not all.
    """

    q_cls: str
    q_reason: str
    class_names: tuple[str, ...]
    max_new_tokens: int
    batch: int
    exact: bool = False
    offered: tuple[int, ...] | None = None
    num_classes: int = 0

    @classmethod
    def of(cls, task: Task, hparams: Mapping[str, Any], env: int | None = None) -> Questions:
        """Return the questions of an MLLM algorithm with these hyper-parameters about an environment.

        Args:
            task: whose environments may offer different classes.
            hparams: of the algorithm.
            env: number of the environment; None for those of training.
        """
        offered = task.classes_offered(env)
        names = tuple(task.class_names[label] for label in offered)
        questions = (q_cls(names, task.subject), q_reason(names, task.subject))
        exact = hparams["answer_matching"] == "exact"
        some = (offered, len(task.class_names)) if task.offered else (None, 0)
        return cls(*questions, names, hparams["max_new_tokens"], hparams["eval_batch"], exact, *some)

    def places_of(self, labels: Sequence[int]) -> Sequence[int]:
        """Return the places of labels of the task among ``class_names``."""
        return labels if self.offered is None else [self.offered.index(label) for label in labels]

    def labels_of(self, places: Sequence[int]) -> Sequence[int]:
        """Return the task's labels of places among ``class_names``."""
        return places if self.offered is None else [self.offered[place] for place in places]

    def over_all_classes(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores of ``class_names``, ``(n, C')``, over all classes, ``(n, C)``: -inf for those not offered.

        A further column, "no class", remains the last.
        """
        return scores if self.offered is None else spread_scores(scores, self.offered, self.num_classes)

    @property
    def both(self) -> tuple[str, str]:
        """q_cls and q_reason."""
        return self.q_cls, self.q_reason

    @property
    def writing(self) -> tuple[str, tuple[str, ...], int, int]:
        """Arguments of chain generation: question, class names, maximum length, batch size."""
        return self.q_reason, self.class_names, self.max_new_tokens, self.batch


def answer_images(
    mllm: Any, images: torch.Tensor, questions: Questions, hparams: Mapping[str, Any], both: bool = False
) -> tuple[torch.Tensor, list[str] | None, list[int] | None]:
    """Return class scores, ``(n, C)``, the generated chains, and the classification path's answers.

    ``answer="label"``: scores are log p(name | x, q_cls) of each class. ``answer="chain"``: 1 for the class that the
    generated chain concludes with. If it names none, ``on_parse_failure="label"`` uses the classification path's
    probabilities; with ``"wrong"``, scores are ``(n, C + 1)`` with a last column "no class", which is never correct.

    Args:
        mllm: the model.
        images: ``(n, 3, H, W)``, at the model's input resolution.
        questions: asked about all images, ``questions.batch`` at a time.
        hparams: ``answer``, ``on_parse_failure``, ``votes`` and ``vote_temperature``.
        both: answer by both paths; otherwise chains or classes are None.
    """
    by_chains = hparams["answer"] == "chain"
    asks_label, asks_chain = both or not by_chains, both or by_chains
    voting = (hparams["votes"], hparams["vote_temperature"], questions.exact)
    scores: list[torch.Tensor] = []
    chains: list[str] = []
    labels: list[int] = []
    for part in images.split(questions.batch):
        by_label = mllm.class_scores(part, questions.q_cls, questions.class_names) if asks_label else None
        written = answering_chains(mllm, part, *questions.writing, *voting) if asks_chain else []
        if by_chains and hparams["on_parse_failure"] == "wrong":
            answers = answers_from_chains(written, questions.class_names, questions.exact)
            scores.append(strict_scores(answers, len(questions.class_names)).to(part.device))
        elif by_chains:
            asked = (questions.q_cls, questions.class_names)
            scores.append(scores_of_chains(mllm, part, *asked, written, by_label, questions.exact))
        else:
            assert by_label is not None
            scores.append(by_label)
        chains += written
        labels += by_label.argmax(1).tolist() if by_label is not None else []
    by_name = list(questions.labels_of(labels)) if asks_label else None
    return questions.over_all_classes(torch.cat(scores)), chains if asks_chain else None, by_name


def answer_in_ranks(
    ranks: Ranks, mllm: Any, images: torch.Tensor, questions: Questions, hparams: Mapping[str, Any], both: bool = False
) -> tuple[torch.Tensor, list[str] | None, list[int] | None]:
    """Return what `answer_images` does, each rank answering its share of the images and getting all answers."""
    if ranks.world == 1:
        return answer_images(mllm, images, questions, hparams, both)

    def part(rows: slice) -> tuple[torch.Tensor, list[str] | None, list[int] | None]:
        scores, chains, labels = answer_images(mllm, images[rows], questions, hparams, both)
        return scores.cpu(), chains, labels

    scores, chains, labels = zip(*ranks.map(len(images), part), strict=True)
    return torch.cat(scores).to(images.device), _joined(chains), _joined(labels)


def _joined(parts: Sequence[list[T] | None]) -> list[T] | None:
    return None if parts[0] is None else [item for part in parts if part is not None for item in part]


def majority_chains(
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
    """Return a chain for each image: the first of ``votes`` chains with the most frequent conclusion.

    Args:
        mllm: generates the chains.
        images: ``(n, 3, H, W)``.
        question: q_reason.
        class_names: of the task.
        max_new_tokens: maximum length of a chain in tokens.
        batch: batch size.
        votes: chains per image.
        sampling: temperature and top_p; empty for greedy decoding.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """
    chains: list[str] = []
    for part in images.split(batch):
        rounds = [mllm.generate(part, question, max_new_tokens, *sampling) for _ in range(votes)]
        chains += [majority_chain(candidates, class_names, exact) for candidates in zip(*rounds, strict=True)]
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
    """Return the answering chain of each image: greedy, or the majority of several sampled ones.

    Args:
        mllm: generates the chains.
        images: ``(n, 3, H, W)``.
        question: q_reason.
        class_names: of the task.
        max_new_tokens: maximum length of a chain in tokens.
        batch: batch size.
        votes: chains per image; 1 is the paper's.
        vote_temperature: sampling temperature with several votes.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """
    sampling = (vote_temperature,) if votes > 1 else ()
    return majority_chains(mllm, images, question, class_names, max_new_tokens, batch, votes, *sampling, exact=exact)


def scores_of_chains(
    mllm: ReasoningModel,
    images: torch.Tensor,
    question: str,
    class_names: Sequence[str],
    chains: Sequence[str],
    by_label: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """Return class scores in [0, 1], ``(n, C)``: the chain's, or the classification path's if it names no class.

    Args:
        mllm: scores the images whose chain names no class.
        images: ``(n, 3, H, W)``.
        question: q_cls.
        class_names: C names.
        chains: n chains.
        by_label: log-likelihoods of all n images' class names, ``(n, C)``, if already computed.
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


def misled(task: Task, exact: bool = False) -> tuple[list[SampleId], list[SampleId]]:
    """Return the samples whose teacher chain concludes with no class, and those whose chain concludes a wrong class.

    Args:
        task: with its teacher chains.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """
    answers = answers_from_chains(list(task.chains.values()), task.class_names, exact)
    pairs = list(zip(task.chains, answers, strict=True))
    nothing = [key for key, answer in pairs if answer is None]
    other = [(env, i) for (env, i), answer in pairs if answer is not None and answer != task.labels[env][i]]
    return nothing, other


def answers_from_chains(chains: Sequence[str], class_names: Sequence[str], exact: bool = False) -> list[int | None]:
    """Return the class that each chain concludes with; None if it names no class of the task.

    Args:
        chains: n generated texts.
        class_names: of the task.
        exact: see `reader.read_conclusion`.
    """
    read = {chain: read_conclusion(chain, class_names, exact).answer for chain in set(chains)}
    return [read[chain] for chain in chains]


def majority_chain(candidates: Sequence[str], class_names: Sequence[str], exact: bool = False) -> str:
    """Return the first chain that concludes with the most frequent class.

    Self-consistency (Wang et al., 2023, arXiv 2203.11171). Chains that name no class do not vote; ties go to the class
    that was named first; if no chain names a class, the first chain is returned.
    """
    answers = answers_from_chains(candidates, class_names, exact)
    named = [answer for answer in answers if answer is not None]
    return candidates[answers.index(max(named, key=named.count))] if named else candidates[0]


def scores_from_answers(answers: Sequence[int | None], label_scores: torch.Tensor) -> torch.Tensor:
    """Return class scores in [0, 1] from parsed conclusions, falling back to the classification path.

    Args:
        answers: for each row the concluded class; None if the chain did not parse.
        label_scores: log-likelihoods of the class names for the rows without an answer, in order, ``(m, C)``.

    Returns:
        ``(n, C)``: 1 for the concluded class and 0 for the others; softmax of ``label_scores`` for rows without one.
    """
    scores = label_scores.new_zeros(len(answers), label_scores.shape[1], dtype=torch.float32)
    fallback = iter(label_scores.float().softmax(dim=1))
    for row, answer in enumerate(answers):
        if answer is None:
            scores[row] = next(fallback)
        else:
            scores[row, answer] = 1.0
    return scores


def spread_scores(scores: torch.Tensor, offered: Sequence[int], num_classes: int) -> torch.Tensor:
    """Return the scores of some classes over all classes, -inf for the others; further columns remain the last.

    Args:
        scores: ``(n, C' + k)``.
        offered: labels of the first C' columns.
        num_classes: C of the task.

    Returns:
        ``(n, C + k)``.
    """
    if len(offered) == num_classes:
        return scores
    further = range(num_classes, num_classes + scores.shape[1] - len(offered))
    wide = scores.new_full((len(scores), num_classes + len(further)), -torch.inf)
    wide[:, [*offered, *further]] = scores
    return wide


def strict_scores(answers: Sequence[int | None], num_classes: int) -> torch.Tensor:
    """Return 1 for the concluded class, in the last column for "no class", and 0 elsewhere, ``(n, num_classes + 1)``.

    Args:
        answers: for each row the concluded class; None if the chain did not parse.
        num_classes: of the task.
    """
    columns = [num_classes if answer is None else answer for answer in answers]
    return torch.nn.functional.one_hot(torch.tensor(columns), num_classes + 1).float()
