"""Likelihoods and generation for any model, with nothing but its processor and forward pass: general, and slower.

The same functions as in `likelihood` and `generation`. The processor renders every conversation with its images, a row
is a question with one answer or class name, and transformers' `generate` decodes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning.mllm.findings import Findings
from domainbed_reasoning.mllm.generation import TextGenerator
from domainbed_reasoning.mllm.language_model import LanguageModel
from domainbed_reasoning.mllm.likelihood import LogLikelihoods, token_log_likelihoods
from domainbed_reasoning.mllm.transfer import moved, take

Encoded = dict[str, Any]  # the images as bytes, `pictures`; once encoded, their `mm_encoder_outputs`
_TOKENS_AT_A_TIME = {"cuda": 2**15, "cpu": 2**12}  # of prompts and class names


def findings_of(mllm: LanguageModel) -> Findings:
    """Return the findings of a model that has been probed."""
    assert mllm.family.findings is not None
    return mllm.family.findings


def conversations(mllm: LanguageModel, pictures: torch.Tensor, question: str) -> dict[str, torch.Tensor]:
    """Return the processor's inputs for a question about each image, up to where the answer begins.

    Args:
        mllm: the model.
        pictures: ``(n, 3, edge, edge)`` bytes, or columns of dynamic tiles.
        question: about each image; all prompts have the same length, since all images have the same size.
    """
    from PIL import Image

    if mllm.tiles is not None:  # already cut
        prompt = {name: value.expand(len(pictures), -1) for name, value in mllm.prompt(question).items()}
        return _converted(mllm, {**prompt, **mllm.image_inputs(pictures)})
    chat, turns = mllm.chat_format, []
    for pixels in pictures.permute(0, 2, 3, 1).cpu().numpy():
        content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": chat.escape(question)}]
        turns.append([{"role": "user", "content": content}])
    return _converted(mllm, chat.inputs(turns))


def _converted(mllm: LanguageModel, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors that the model's forward pass takes, on its device and of its type."""
    known = accepted(mllm.base) - {"labels"}
    found = {name: inputs[name] for name in inputs if name in known and isinstance(inputs[name], torch.Tensor)}
    dtype = next(mllm.base.parameters()).dtype
    return {name: value.to(mllm.device, dtype if value.is_floating_point() else None) for name, value in found.items()}


def accepted(network: Any) -> set[str]:
    """Return the argument names of a model's forward pass and of its decoder's, without the head."""
    names = set(inspect.signature(network.forward).parameters)
    core = getattr(network, "model", None)
    return names | set(inspect.signature(core.forward).parameters) if core is not None else names


def continued(inputs: Mapping[str, torch.Tensor], answers: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Return inputs with the tokens of an answer appended to each row, padded on the right.

    Args:
        inputs: of n prompts of P tokens.
        answers: n lists of tokens.
        pad: padding token id.
    """
    n, length = inputs["input_ids"].shape
    longest, out = max(map(len, answers)), {}
    for name, value in inputs.items():
        out[name] = value
        if value.shape[:2] != (n, length) or "pixel" in name:
            continue  # image inputs
        if name == "input_ids":
            more = value.new_tensor([[*tokens, *[pad] * (longest - len(tokens))] for tokens in answers])
        elif name == "attention_mask" and value.dim() == 2:
            more = value.new_tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in answers])
        elif name == "position_ids":
            more = value[:, -1:] + torch.arange(1, longest + 1, device=value.device)
        elif value.dim() == 2:
            more = value.new_zeros(n, longest)  # token types: text
        else:
            more = value[:, -1:].expand(-1, longest, *value.shape[2:])  # which images a token attends to
        out[name] = torch.cat([value, more], dim=1)
    return out


def forward(mllm: LanguageModel, inputs: Mapping[str, torch.Tensor], encoded: Encoded, last: int) -> torch.Tensor:
    """Return the logits at the last positions of every row, ``(n, last, vocabulary)``."""
    arguments: dict[str, Any] = dict(inputs)
    if "mm_encoder_outputs" in encoded:
        arguments = {name: value for name, value in arguments.items() if not name.startswith("pixel_values")}
        arguments["mm_encoder_outputs"] = dict(encoded["mm_encoder_outputs"])
    if "logits_to_keep" in inspect.signature(mllm.base.forward).parameters:
        arguments["logits_to_keep"] = last
    logits: torch.Tensor = mllm.base(**arguments, use_cache=False).logits
    return logits[:, -last:]


def encode(mllm: LanguageModel, images: torch.Tensor) -> Encoded:
    """Return images for any number of questions about them, encoded if the model can reuse encoded images."""
    encoded: Encoded = {"pictures": mllm.pictures(images)}
    if findings_of(mllm).reuse:
        encoded["mm_encoder_outputs"] = {"image": image_features(mllm, conversations(mllm, encoded["pictures"], "?"))}
    return encoded


def image_features(mllm: LanguageModel, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Return the vision features of the images in a batch of prompts."""
    encoder = image_encoder(mllm.base)
    wanted = set(inspect.signature(encoder).parameters)
    vision = {name: value for name, value in inputs.items() if name in wanted and name != "input_ids"}
    return encoder(**vision, return_dict=True)


def image_encoder(network: Any) -> Any:
    """Return a model's ``get_image_features``, which some define only on the model below the head."""
    return (network if hasattr(network, "get_image_features") else network.model).get_image_features


def log_likelihoods(mllm: LanguageModel, encoded: Encoded, question: str, answers: Sequence[str]) -> LogLikelihoods:
    """Return log p of every token of each image's answer; see `MLLM.log_likelihoods`."""
    targets = [mllm.target(answer) for answer in answers]
    inputs = conversations(mllm, encoded["pictures"], question)
    return _gathered(targets, _chosen(mllm, encoded, question, inputs, targets), mllm.device)


def _chosen(
    mllm: LanguageModel,
    encoded: Encoded,
    question: str,
    inputs: Mapping[str, torch.Tensor],
    targets: Sequence[Sequence[int]],
) -> Iterator[tuple[int, torch.Tensor]]:
    for row, logits in _logits(mllm, encoded, question, inputs, targets):
        yield row, token_log_likelihoods(logits, torch.tensor(targets[row], device=logits.device))


@torch.no_grad()
def token_statistics(
    mllm: LanguageModel, encoded: Encoded, question: str, answers: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-likelihoods, entropies and the mask of target tokens; see `MLLM.token_statistics`."""
    targets = [mllm.target(answer) for answer in answers]
    inputs = conversations(mllm, encoded["pictures"], question)
    chosen, entropies = [], []
    for row, logits in _logits(mllm, encoded, question, inputs, targets):
        log_probs = logits.float().log_softmax(-1)
        chosen.append((row, log_probs.gather(1, torch.tensor(targets[row], device=logits.device)[:, None])[:, 0]))
        entropies.append((row, -(log_probs.exp() * log_probs).sum(-1)))
    values, mask = _gathered(targets, chosen, mllm.device)
    return values, _gathered(targets, entropies, mllm.device)[0], mask


@torch.no_grad()
def class_scores(mllm: LanguageModel, images: torch.Tensor, question: str, names: Sequence[str]) -> torch.Tensor:
    """Return log p(name, end | image, question) of every name, one row per name."""
    targets = [mllm.target(name) for name in names]
    length = mllm.prompt(question)["input_ids"].shape[1] + max(map(len, targets))
    most = _TOKENS_AT_A_TIME.get(mllm.device.type, _TOKENS_AT_A_TIME["cuda"])
    parts = []
    for part in images.split(max(1, most // length)):
        encoded = encode(mllm, part)
        inputs = conversations(mllm, encoded["pictures"], question)
        columns = []
        for target in targets:
            found = dict(_chosen(mllm, encoded, question, inputs, [target] * len(part)))
            columns.append(torch.stack([found[row].sum() for row in range(len(part))]))
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)


def _logits(
    mllm: LanguageModel,
    encoded: Encoded,
    question: str,
    inputs: Mapping[str, torch.Tensor],
    targets: Sequence[Sequence[int]],
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each row's index and the logits that predict its target, ``(T, vocabulary)``, in any order."""
    found, pad = findings_of(mllm), mllm.tokenizer.pad_token_id or 0
    for rows in grouped([len(target) for target in targets], found.batch, found.padding):
        part, kept = inputs, encoded
        if len(rows) < len(targets):
            part, kept = conversations(mllm, take(encoded["pictures"], rows), question), {}
        fed = continued(part, [targets[row][:-1] for row in rows], pad)  # nothing is predicted after the last token
        logits = forward(mllm, fed, kept, max(len(targets[row]) for row in rows))
        for place, row in enumerate(rows):
            yield row, logits[place, : len(targets[row])]


def grouped(lengths: Sequence[int], batch: bool, padding: bool) -> list[list[int]]:
    """Return the rows that are computed together: all, those of equal length without ``padding``, or each alone."""
    if not batch:
        return [[row] for row in range(len(lengths))]
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(0 if padding else length, []).append(row)
    return list(groups.values())


def _gathered(
    targets: Sequence[Sequence[int]], values: Iterator[tuple[int, torch.Tensor]] | Sequence[Any], device: torch.device
) -> LogLikelihoods:
    """Return values of target tokens, ``(n, T)``, 0 at padding, and the mask."""
    rows = [value for _, value in sorted(values, key=lambda pair: pair[0])]
    counts = torch.tensor([len(target) for target in targets])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    mask, *places = moved((mask, *mask.nonzero(as_tuple=True)), device)
    flat = torch.cat(rows)
    return flat.new_zeros(mask.shape).index_put(tuple(places), flat), mask


class GeneralGenerator(TextGenerator):
    """Generates answers with transformers' own decoding loop; see `TextGenerator`."""

    @functools.cached_property
    def suppressed_tokens(self) -> list[int]:
        """Tokens that answers must not contain, as in `TextGenerator`, limited to the model's vocabulary."""
        size = int(self.mllm.base.get_output_embeddings().weight.shape[0])
        return [token for token in super().suppressed_tokens if token < size]

    @property
    def has_slots(self) -> bool:
        """Whether greedy answers are decoded in slots: never, transformers' `generate` is used."""
        return False

    def write(self, images: torch.Tensor, question: str, max_new_tokens: int, **sampling: Any) -> list[list[int]]:
        """Return the tokens of a new answer to the question about each image; see `TextGenerator.write`."""
        return self._continue(images, question, [()] * len(images), max_new_tokens, **sampling)

    def generate_after(
        self, images: torch.Tensor, question: str, beginnings: Sequence[str], max_new_tokens: int, **sampling: Any
    ) -> list[str]:
        """Return the continuation of each answer's beginning; beginnings of equal length share a batch."""
        begun = [self.mllm.target(text)[:-1] if text else () for text in beginnings]
        return self.texts(self._continue(images, question, begun, max_new_tokens, **sampling))

    @torch.no_grad()
    def _continue(
        self,
        images: torch.Tensor,
        question: str,
        begun: Sequence[Sequence[int]],
        max_new_tokens: int,
        **sampling: Any,
    ) -> list[list[int]]:
        mllm, found = self.mllm, findings_of(self.mllm)
        pictures = mllm.pictures(images)
        written: dict[int, list[int]] = {}
        fitting = self._fitting(question, max_new_tokens, len(images)) if len(images) else 1
        groups = grouped([len(tokens) for tokens in begun], found.batch, padding=False)
        for rows in (group[at : at + fitting] for group in groups for at in range(0, len(group), fitting)):
            inputs = conversations(mllm, take(pictures, rows), question)
            length = inputs["input_ids"].shape[1]
            if begun[rows[0]]:
                inputs = continued(inputs, [begun[row] for row in rows], 0)
            prompt = inputs["input_ids"]
            out = mllm.base.generate(
                **{**inputs, **self.plain, **sampling},
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(self.ends),
                pad_token_id=mllm.tokenizer.pad_token_id or mllm.end_token,
                suppress_tokens=self.suppressed_tokens,
                stopping_criteria=self._criteria(length),
                use_cache=found.cache,
            )
            if out.shape[1] >= prompt.shape[1] and torch.equal(out[:, : prompt.shape[1]], prompt):
                out = out[:, prompt.shape[1] :]
            for row, tokens in zip(rows, out.tolist(), strict=True):
                written[row] = self._ended(list(begun[row]), tokens)
        return [written[row] for row in range(len(pictures))]

    def _criteria(self, prompt: int) -> Any:
        from transformers import StoppingCriteria, StoppingCriteriaList

        generator = self

        class Ended(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
                answers = input_ids[:, prompt:] if input_ids.shape[1] > prompt else input_ids
                ended = [row[-1] in generator.closing_tokens and generator.has_ended(row) for row in answers.tolist()]
                return torch.tensor(ended, device=input_ids.device)

        return StoppingCriteriaList([Ended()])

    def _ended(self, begun: list[int], tokens: list[int]) -> list[int]:
        """Return the tokens up to the end of the answer; the rest is padding of the batch."""
        for count in range(1, len(tokens) + 1):
            if tokens[count - 1] in self.closing_tokens and self.has_ended([*begun, *tokens[:count]]):
                return tokens[:count]
        return tokens
