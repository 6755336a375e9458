"""Class scores: from the likelihood of each class name, and from the conclusion of a generated chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from domainbed_reasoning.batching import Trie
from domainbed_reasoning.reader import read_conclusion
from domainbed_reasoning.samples import SampleId, Task


def scores_from_trie(trie: Trie, prompt_logits: torch.Tensor, node_logits: torch.Tensor) -> torch.Tensor:
    """Return log p(name | image, q_cls) of every class, the sum over its tokens with the end token.

    Args:
        trie: of the C class names.
        prompt_logits: of the next token after the prompt, ``(n, vocabulary)``; log probabilities will do as well.
        node_logits: of the next token after each node, ``(n, N, vocabulary)``.

    Returns:
        ``(n, C)``, float32, in nats.
    """
    edges, taken = trie.edges
    first = [token for node, token in edges if node < 0]  # sorted: those from the prompt come first
    nodes, tokens = [node for node, _ in edges[len(first) :]], [token for _, token in edges[len(first) :]]
    prompt_logits, node_logits = prompt_logits.float(), node_logits.float()
    from_prompt = prompt_logits[:, first] - prompt_logits.logsumexp(-1, keepdim=True)
    from_nodes = node_logits[:, nodes, tokens] - node_logits.logsumexp(-1)[:, nodes]
    return torch.cat([from_prompt, from_nodes], dim=1) @ taken.to(prompt_logits.device)


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
