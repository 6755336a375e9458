"""Log-likelihoods of the tokens of answers, and scores of class names.

An image is encoded once for all questions about it, and the output head runs on supervised positions only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from domainbed_reasoning.mllm.embedding import embedded
from domainbed_reasoning.mllm.language_model import LanguageModel
from domainbed_reasoning.mllm.rows import Rows, TreeBranch, Trie, build_rows, build_tree_rows, build_trie
from domainbed_reasoning.mllm.tree_attention import no_mask
from domainbed_reasoning.mllm.tree_masks import tree_mask, tree_positions

LogLikelihoods = tuple[torch.Tensor, torch.Tensor]  # of target tokens, (n, T), and their mask, (n, T)
Encoded = dict[str, Any]  # images, as `MLLM.encode` returns them
_LOGITS_AT_A_TIME = 2**27
_WORDS_AT_A_TIME = 2**14  # rows of the output head that are cast at once
# Prompts and class names: 2 GiB of keys and values at 8B; on a CPU a sixth faster than 2**15.
_TOKENS_AT_A_TIME = {"cuda": 2**15, "cpu": 2**12}


def log_likelihoods(mllm: LanguageModel, encoded: Encoded, question: str, answers: Sequence[str]) -> LogLikelihoods:
    """Return log p of every token of each image's answer, one row per answer; see `MLLM.log_likelihoods`."""
    rows, hidden = _read(mllm, encoded, question, answers)
    return _at_targets(mllm, hidden, rows), rows.target_mask


@torch.no_grad()
def token_statistics(
    mllm: LanguageModel, encoded: Encoded, question: str, answers: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-likelihoods, entropies and the mask of target tokens; see `MLLM.token_statistics`."""
    rows, hidden = _read(mllm, encoded, question, answers)
    chosen, entropies = [], []
    for logits, targets in _logits(mllm, hidden, rows):
        log_probs = logits.float().log_softmax(-1)
        chosen.append(log_probs.gather(1, targets[:, None])[:, 0])
        entropies.append(-(log_probs.exp() * log_probs).sum(-1))
    return _scattered(rows, chosen), _scattered(rows, entropies), rows.target_mask


def tree_log_likelihoods(
    mllm: LanguageModel, encoded: Encoded, questions: tuple[str, str], answers: tuple[Sequence[str], Sequence[str]]
) -> tuple[LogLikelihoods, LogLikelihoods]:
    """Return what `log_likelihoods` does for two questions about each image, both of them in one row."""
    prompts = [mllm.prompt(question)["input_ids"][0].tolist() for question in questions]
    targets = [[mllm.target(answer) for answer in texts] for texts in answers]
    rows = build_tree_rows(
        (prompts[0], prompts[1]), (targets[0], targets[1]), mllm.tokenizer.pad_token_id or 0, mllm.device
    )
    if mllm.family.tree == "windows":  # one mask for each kind of layer
        position = rows.position_ids[0]
        seen: dict[str, Any] = {"attention_mask": tree_mask(mllm, rows.mask, position, position, questions[0])}
    else:
        seen = {"attention_mask": rows.twig_mask, "branches": rows.lengths}
    hidden = mllm.base.model(
        position_ids=tree_positions(mllm, rows.position_ids, questions[0], encoded),
        use_cache=False,
        **seen,
        **embedded(mllm, questions[0], rows.input_ids, encoded),
    )[0]
    a, b = rows.branches
    return (_at_targets(mllm, hidden, a), a.target_mask), (_at_targets(mllm, hidden, b), b.target_mask)


@torch.no_grad()
def class_scores(mllm: LanguageModel, images: torch.Tensor, question: str, names: Sequence[str]) -> torch.Tensor:
    """Return log p(name, end | image, question) of every name, a bounded number of tokens at a time."""
    trie = _trie(tuple(mllm.target(name) for name in names))
    tokens = mllm.prompt(question)["input_ids"].shape[1] + len(trie.tokens)
    most = _TOKENS_AT_A_TIME.get(mllm.device.type, _TOKENS_AT_A_TIME["cuda"])
    parts = images.split(max(1, most // tokens))
    return torch.cat([_scores_by_trie(mllm, part, question, trie) for part in parts])


_trie = functools.lru_cache(maxsize=4)(build_trie)


def _scores_by_trie(mllm: LanguageModel, images: torch.Tensor, question: str, trie: Trie) -> torch.Tensor:
    """Return the scores of a few images: one pass over image and question, one over all nodes of the trie."""
    from transformers import DynamicCache

    encoded = mllm.encode(images)
    prompt = mllm.prompt(question)["input_ids"].to(mllm.device).expand(len(images), -1)
    cache = DynamicCache(config=mllm.base.config.get_text_config())
    hidden = mllm.core(len(images), question, prompt, encoded, **mllm.keeping(cache))[0]
    head = functools.partial(float32_logits, mllm.base.get_output_embeddings())
    first = head(hidden[:, -1])
    if not len(trie.tokens):
        return scores_from_trie(trie, first, first[:, None])
    n, length = prompt.shape
    plain = (length + trie.depths.to(mllm.device))[None]
    mask = torch.ones(1, 1, len(trie.tokens), length + len(trie.tokens), dtype=torch.bool, device=mllm.device)
    mask[..., length:] = trie.visible.to(mllm.device)
    key = torch.cat([torch.arange(length, device=mllm.device), plain[0]])
    positions = tree_positions(mllm, plain, question, encoded)
    nodes = mllm.base.model(
        input_ids=trie.tokens.to(mllm.device).expand(n, -1),
        attention_mask=tree_mask(mllm, mask, plain[0], key, question),
        position_ids=positions.expand(*positions.shape[:-2], n, -1),
        **mllm.keeping(cache),
    )[0]
    # Logits of every node at once would take more memory than the model: 14 GiB at 8B, 65 names and 64 images.
    rows = _rows_at_a_time(mllm.base.get_output_embeddings(), len(trie.tokens))
    parts = zip(first.split(rows), nodes.split(rows), strict=True)
    return torch.cat([scores_from_trie(trie, one, head(part)) for one, part in parts])


def _read(mllm: LanguageModel, encoded: Encoded, question: str, answers: Sequence[str]) -> tuple[Rows, torch.Tensor]:
    """Return the rows ``question + answer``, and the last hidden states over them."""
    prompt = mllm.prompt(question)["input_ids"][0].tolist()
    targets = [mllm.target(answer) for answer in answers]
    rows = build_rows(prompt, targets, mllm.tokenizer.pad_token_id or 0, mllm.device)
    seen: dict[str, Any] = {"attention_mask": rows.attention_mask}
    if mllm.family.tree == "plain":  # right padding, which no real token attends to
        length = rows.input_ids.shape[1]
        seen = {"attention_mask": no_mask(mllm.device), "branches": (length, 0, 0)}
    hidden = mllm.core(len(answers), question, rows.input_ids, encoded, use_cache=False, **seen)[0]
    return rows, hidden


def _at_targets(mllm: LanguageModel, hidden: torch.Tensor, rows: Rows | TreeBranch) -> torch.Tensor:
    """Return log p of each target token, 0 at padding, ``(n, T)``."""
    parts = [token_log_likelihoods(logits, targets) for logits, targets in _logits(mllm, hidden, rows)]
    return _scattered(rows, parts)


def _logits(
    mllm: LanguageModel, hidden: torch.Tensor, rows: Rows | TreeBranch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits of target tokens, ``(m, vocabulary)``, and those tokens, ``(m,)``, in blocks of bounded size.

    In float32 the logits of 64 chains and their softmax would take 20 GiB at 8B. Autograd keeps all of them anyway.
    """
    head = mllm.base.get_output_embeddings()
    row, position = rows.supervised
    predicting, targets = hidden[row, position], rows.wanted
    count = len(targets) if torch.is_grad_enabled() else _rows_at_a_time(head, 1)
    for part, wanted in zip(predicting.split(count), targets.split(count), strict=True):
        yield head(part), wanted


def _rows_at_a_time(head: Any, positions: int) -> int:
    """Return how many rows' logits, at ``positions`` positions each, are held at a time."""
    return max(1, _LOGITS_AT_A_TIME // (positions * int(head.weight.shape[0])))


def _scattered(rows: Rows | TreeBranch, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return concatenated values of target tokens scattered to their positions, 0 elsewhere, ``(n, T)``."""
    values = torch.cat(list(parts))
    # By numbers, not by the mask: the gradient of masked_scatter counts the mask's entries on the host.
    return values.new_zeros(rows.target_mask.shape).index_put((rows.supervised[0], rows.tokens), values)


def float32_logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return an output head's logits in float32, ``(…, vocabulary)``; its weights are cast a block at a time.

    bfloat16 rounds logits by up to 2⁻⁹ of their magnitude, which adds up over the tokens of a name.

    Args:
        head: a linear layer.
        hidden: ``(…, width)``.
    """
    if head.weight.dtype == torch.float32:
        return torch.as_tensor(head(hidden))
    bias, hidden = getattr(head, "bias", None), hidden.float()
    blocks = [hidden @ block.float().t() for block in head.weight.split(_WORDS_AT_A_TIME)]
    logits = torch.cat(blocks, dim=-1)
    return logits if bias is None else logits + bias.float()


def token_log_likelihoods(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log p of each target token, computed in float32.

    Args:
        logits: ``(n, vocabulary)``.
        targets: token ids, ``(n,)``.

    Returns:
        ``(n,)``, in nats.
    """
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


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
