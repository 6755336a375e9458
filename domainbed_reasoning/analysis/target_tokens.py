"""Per-token predictions of a model for fixed answers: the probability of the target token, and the entropy.

p_t = p(r_t | r_<t, x, q) of each target token r_t, H_t = -Σ_v p(v | r_<t, x, q) log p(v | r_<t, x, q) in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tqdm

from domainbed_reasoning.analysis.data import AnalysisData
from domainbed_reasoning.analysis.naming import first_naming
from domainbed_reasoning.chains.chain import END_OF_CHAIN, STAGE_TAGS
from domainbed_reasoning.jobs.seeds import seeded
from domainbed_reasoning.method.answering import Questions
from domainbed_reasoning.method.self_labeling import labels_of_round
from domainbed_reasoning.method.task import SampleId
from domainbed_reasoning.mllm import MLLM
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_CONCLUSION = "<CONCLUSION>"
_FILTERED = {
    "conclusion": "",
    "well_formed": ", kept if they have five stages",
    "consistent": ", kept if they support their conclusion",
}
KINDS = ("word", "naming", "class", "tag", "end")


@dataclass(frozen=True)
class TargetTexts:
    """Answers to one question about n images, whose tokens a model predicts.

    Attributes:
        question: q_cls or q_reason.
        samples: n sample ids.
        texts: n class names or chains.
    """

    question: str
    samples: Sequence[SampleId]
    texts: Sequence[str]


@dataclass(frozen=True)
class TokenTable:
    """All target tokens of the answers, concatenated.

    Attributes:
        answer: index of the answer that contains the token, ``(N,)``.
        token: text of the token.
        kind: ``class`` in a class name or a chain's conclusion, ``naming`` at the first mention of a chain's
            conclusion, ``tag`` in a stage's tag, ``end`` of the turn, else ``word``, ``(N,)``.
        probability: of the token, in [0, 1], ``(N,)``.
        entropy: of the predicted distribution, in nats, ``(N,)``.
    """

    answer: np.ndarray
    token: list[str]
    kind: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray


def label_targets(data: AnalysisData, samples: Sequence[SampleId]) -> TargetTexts:
    """Return the true class names as answers of the classification path."""
    return TargetTexts(data.q_cls, samples, [data.name(sample) for sample in samples])


def teacher_targets(data: AnalysisData, samples: Sequence[SampleId]) -> TargetTexts:
    """Return the data's chains as answers of the reasoning path; all samples must have one."""
    return TargetTexts(data.q_reason, samples, [data.task.chains[sample] for sample in samples])


@dataclass(frozen=True)
class Labeling:
    """How SARR's labeler generates and filters chains, from its hyper-parameters.

    Attributes:
        max_new_tokens: maximum length of a chain in tokens.
        batch: batch size.
        votes: chains per image.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus sampling, in (0, 1].
        filter: the hparam ``sarr_filter``.
        exact: how conclusions are read, see `reader.read_conclusion`.
    """

    max_new_tokens: int
    batch: int = 64
    votes: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    filter: str = "conclusion"
    exact: bool = False

    @property
    def description(self) -> str:
        """Readable description of generation and filtering."""
        written = f"sampled at temperature {self.temperature:g}" if self.temperature > 0 else "greedy"
        voted = f", majority of {self.votes}" if self.votes > 1 else ""
        return f"{written}{voted}{_FILTERED[self.filter]}"

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyper-parameters of self-labeling, by name."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p}
        return {"sarr_votes": self.votes, "sarr_filter": self.filter, **sampling}


def labeling_of(hparams: Mapping[str, Any]) -> Labeling:
    """Return a job's settings in SARR rounds; without rounds the paper's: greedy, filtered by conclusion."""
    return Labeling(
        hparams["max_new_tokens"],
        hparams["eval_batch"],
        hparams.get("sarr_votes", 1),
        hparams.get("temperature", 0.0),
        hparams.get("top_p", 1.0),
        hparams.get("sarr_filter", "conclusion"),
        hparams.get("answer_matching") == "exact",
    )


def own_targets(mllm: MLLM, data: AnalysisData, samples: Sequence[SampleId], labeling: Labeling) -> TargetTexts:
    """Return the model's own chains for these images, in order, that SARR would keep.

    Raises:
        ValueError: if none is kept.
    """
    asked = (data.q_cls, data.q_reason, tuple(data.task.class_names), labeling.max_new_tokens, labeling.batch)
    labels = labels_of_round(lambda: nullcontext(mllm), Questions(*asked, labeling.exact), labeling.hparams)
    kept: list[tuple[SampleId, str]] = []
    for start in tqdm.tqdm(range(0, len(samples), labeling.batch), "generating chains", disable=None):
        part = samples[start : start + labeling.batch]
        with seeded(0, "own chains", part):
            chains = labels.chains_for(data.pixels(part), [data.label(sample) for sample in part], part)
        kept += [(sample, chain) for sample, chain in zip(part, chains, strict=True) if chain is not None]
    summary = f"{len(kept)} of {len(samples)} own chains ({labeling.description}) would be kept by SARR"
    if not kept:
        raise ValueError(f"{summary}: there are no tokens to analyze.")
    _log.info("%s", summary)
    return TargetTexts(data.q_reason, [sample for sample, _ in kept], [chain for _, chain in kept])


def spelt(mllm: MLLM, text: str) -> list[str]:
    """Return the tokens of an answer as strings, including the end token."""
    return [mllm.tokenizer.decode([token]) for token in mllm.target(text)]


def check_same_tokens(mllm: MLLM, answers: TargetTexts, table: TokenTable, before: str, after: str) -> None:
    """Check that a model's tokens of the answers equal those in a table.

    Args:
        mllm: the model.
        answers: n texts.
        table: another model's predictions at their tokens.
        before: name of the other model, for the message.
        after: name of the model.

    Raises:
        ValueError: if the tokens differ.
    """
    if [token for text in answers.texts for token in spelt(mllm, text)] != table.token:
        raise ValueError(
            f"{before} and {after} have different tokenizers, so their probabilities cannot be compared. Pass a "
            "--before of the same model family."
        )


def read_tokens(mllm: MLLM, data: AnalysisData, answers: TargetTexts, batch: int = 16) -> TokenTable:
    """Return a model's predictions at every token of the answers.

    Args:
        mllm: the model.
        data: the images.
        answers: n answers to one question.
        batch: batch size.
    """
    is_chain = answers.question == data.q_reason
    numbers, tokens, kinds, probabilities, entropies = [], [], [], [], []
    for start in tqdm.tqdm(range(0, len(answers.texts), batch), "reading tokens", disable=None):
        texts = answers.texts[start : start + batch]
        with torch.no_grad():
            encoded = mllm.encode(data.pixels(answers.samples[start : start + batch]))
        log_likelihood, entropy, mask = mllm.token_statistics(encoded, answers.question, texts)
        probabilities.append(log_likelihood[mask].exp().cpu().numpy())
        entropies.append(entropy[mask].cpu().numpy())
        for row, text in enumerate(texts):
            cut = spelt(mllm, text)
            numbers += [start + row] * len(cut)
            tokens += cut
            kinds += token_kinds(mllm, text, is_chain)
    return TokenTable(
        np.asarray(numbers), tokens, np.asarray(kinds), np.concatenate(probabilities), np.concatenate(entropies)
    )


def token_kinds(mllm: MLLM, text: str, is_chain: bool) -> list[str]:
    """Return the kind of every token of an answer with its end token, each one of `KINDS`.

    Args:
        mllm: the model, for its tokenizer.
        text: a class name or a chain.
        is_chain: whether ``text`` is a chain.
    """
    count = len(mllm.target(text)) - 1
    if not is_chain:
        return ["class"] * count + ["end"]
    text = mllm.chat_format.escape(text)
    spans = mllm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # Some families insert a token before the answer in context, so positions are counted from the end.
    spans = [(0, 0)] * (count - len(spans)) + list(spans)[max(0, len(spans) - count) :]
    marks = ["word"] * len(text)
    for tag in STAGE_TAGS:
        start = text.find(tag)
        while start >= 0:
            marks[start : start + len(tag)] = ["tag"] * len(tag)
            start = text.find(tag, start + 1)
    start, end = text.rfind(_CONCLUSION), text.rfind(END_OF_CHAIN)
    if 0 <= start < end:
        start += len(_CONCLUSION)
        name = text[start:end].strip()
        named = first_naming(text, name, start - len(_CONCLUSION))
        if named is not None:
            marks[slice(*named)] = ["naming"] * (named[1] - named[0])
        marks[start:end] = ["class"] * (end - start)
    return [_kind(marks[first:last], text[first:last]) for first, last in spans] + ["end"]


def _kind(marks: Sequence[str], text: str) -> str:
    """Return the kind of most of a token's non-whitespace characters."""
    visible = [mark for mark, letter in zip(marks, text, strict=True) if not letter.isspace()]
    if not visible:
        return "word"
    return max(set(visible), key=lambda mark: (visible.count(mark), -KINDS.index(mark)))
