"""What a model expects at every token of given answers: the probability of the true one, and the entropy.

p_t = p(r_t | r_<t, x, q) of each target token r_t, H_t = -Σ_v p(v | r_<t, x, q) log p(v | r_<t, x, q) in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tqdm

from domainbed_reasoning.analysis.material import Material
from domainbed_reasoning.analysis.naming import first_naming
from domainbed_reasoning.chains import END_OF_CHAIN, STAGE_TAGS
from domainbed_reasoning.mllm import MLLM
from domainbed_reasoning.samples import SampleId
from domainbed_reasoning.selflabel import accept

_CONCLUSION = "<CONCLUSION>"
KINDS = ("word", "naming", "class", "tag", "end")


@dataclass(frozen=True)
class Answers:
    """Answers to one question, an image each.

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
    """Every target token of the answers, one after another.

    Attributes:
        answer: the number of the answer that it is part of, ``(N,)``.
        token: its text.
        kind: ``class`` in a class name or a chain's conclusion, ``naming`` where a chain first names what it will
            conclude with, ``tag`` in a stage's tag, ``end`` of the turn, else ``word``, ``(N,)``.
        probability: of the token, in [0, 1], ``(N,)``.
        entropy: of the distribution over it, in nats, ``(N,)``.
    """

    answer: np.ndarray
    token: list[str]
    kind: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray


def label_answers(material: Material, samples: Sequence[SampleId]) -> Answers:
    """Return the true class names as answers of the classification path."""
    return Answers(material.q_cls, samples, [material.name(sample) for sample in samples])


def teacher_answers(material: Material, samples: Sequence[SampleId]) -> Answers:
    """Return the material's chains as answers of the reasoning path; all samples must have one."""
    return Answers(material.q_reason, samples, [material.task.chains[sample] for sample in samples])


def own_answers(
    mllm: MLLM, material: Material, samples: Sequence[SampleId], max_new_tokens: int, batch: int = 64
) -> Answers:
    """Return the chains that a model writes itself, those that SARR would keep.

    Raises:
        ValueError: where none concludes rightly.
    """
    kept: list[tuple[SampleId, str]] = []
    for start in tqdm.tqdm(range(0, len(samples), batch), "writing chains", disable=None):
        part = samples[start : start + batch]
        chains = mllm.generate(material.pixels(part), material.q_reason, max_new_tokens)
        pairs = zip(part, chains, strict=True)
        kept += [(s, chain) for s, chain in pairs if accept(chain, material.label(s), material.task.class_names)]
    if not kept:
        raise ValueError(f"none of {len(samples)} chains that the model wrote itself names the true class.")
    print(f"{len(kept)} of {len(samples)} chains that the model wrote itself name the true class", flush=True)
    return Answers(material.q_reason, [sample for sample, _ in kept], [chain for _, chain in kept])


def read_tokens(mllm: MLLM, material: Material, answers: Answers, batch: int = 16) -> TokenTable:
    """Return what a model expects at every token of the answers.

    Args:
        mllm: the model.
        material: whose images the answers are about.
        answers: n texts to one question.
        batch: images at a time.
    """
    is_chain = answers.question == material.q_reason
    numbers, tokens, kinds, probabilities, entropies = [], [], [], [], []
    for start in tqdm.tqdm(range(0, len(answers.texts), batch), "reading tokens", disable=None):
        texts = answers.texts[start : start + batch]
        with torch.no_grad():
            encoded = mllm.encode(material.pixels(answers.samples[start : start + batch]))
        log_likelihood, entropy, mask = mllm.token_statistics(encoded, answers.question, texts)
        probabilities.append(log_likelihood[mask].exp().cpu().numpy())
        entropies.append(entropy[mask].cpu().numpy())
        for row, text in enumerate(texts):
            ids = mllm.target(text)
            numbers += [start + row] * len(ids)
            tokens += [mllm.tokenizer.decode([token]) for token in ids]
            kinds += token_kinds(mllm, text, is_chain)
    return TokenTable(
        np.asarray(numbers), tokens, np.asarray(kinds), np.concatenate(probabilities), np.concatenate(entropies)
    )


def token_kinds(mllm: MLLM, text: str, is_chain: bool) -> list[str]:
    """Return the kind of every token of an answer with its end token, each one of `KINDS`.

    Args:
        mllm: whose tokens they are.
        text: a class name or a chain.
        is_chain: which of the two.
    """
    count = len(mllm.target(text)) - 1
    if not is_chain:
        return ["class"] * count + ["end"]
    text = mllm.texts.escape(text)
    spans = mllm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # In context a family may put a token before the answer: positions are counted from the end, where both agree.
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
    """Return the kind of most of a token's characters, white space left out."""
    visible = [mark for mark, letter in zip(marks, text, strict=True) if not letter.isspace()]
    if not visible:
        return "word"
    return max(set(visible), key=lambda mark: (visible.count(mark), -KINDS.index(mark)))
