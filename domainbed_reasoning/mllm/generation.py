"""Generate answers token by token: greedy ones in slots (`decoding`), others in a batch that shrinks as its rows end.

All prompts of a question have the same length, so that rows need no padding and can leave the batch at any time. For
sampled answers, whose random draws depend on the rows in the batch, and for models whose layers keep more than keys and
values, transformers prepares everything else: its `generate` calls this module's loop as `custom_generate`.

The paper (arXiv 2602.23777) does not say how it decodes. Here a greedy answer is the argmax of the model's
distribution, and a sampled one is drawn from that distribution at the temperature and top_p that are asked for. The
checkpoint's generation config and transformers' own defaults are made for chat and are set aside: Qwen2.5-VL's penalty
on repeated tokens works against a conclusion that repeats the class which the reasoning has named, and transformers'
top_k of 50 would make self-labels at temperature 1 another distribution than the one that is trained. Two things are
kept: the checkpoint's tokens that end a turn, and that an answer holds no other special token
(`TextGenerator.suppressed_tokens`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from domainbed_reasoning.chains.chain import END_OF_CHAIN
from domainbed_reasoning.chains.reader import is_thinking, without_thoughts
from domainbed_reasoning.mllm.decoding import (
    Decoder,
    can_decode,
    prefill_bytes,
    prompts_at_a_time,
    slots_that_fit,
)
from domainbed_reasoning.mllm.devices import free_memory
from domainbed_reasoning.mllm.language_model import LanguageModel
from domainbed_reasoning.mllm.tree_masks import tree_positions

_LEAVE = 8  # rows leave the batch when an eighth of it has ended
_END_TOKENS = 2 * len(END_OF_CHAIN)  # tokens of an answer's end that hold the whole of a conclusion's tag

# What a checkpoint's generation config or transformers' defaults could do to the distribution, each undone.
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(
        "temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff sequence_bias guidance_scale "
        "watermarking_config exponential_decay_length_penalty bad_words_ids begin_suppress_tokens forced_bos_token_id "
        "forced_eos_token_id min_new_tokens max_time stop_strings renormalize_logits remove_invalid_values "
        "penalty_alpha dola_layers constraints force_words_ids prompt_lookup_num_tokens".split()
    ),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    **dict.fromkeys(("num_beams", "num_return_sequences"), 1),
    "token_healing": False,
}


class TextGenerator:
    """Writes one model's answers.

    Args:
        mllm: the model.
    """

    def __init__(self, mllm: LanguageModel):
        self.mllm = mllm

    @functools.cached_property
    def ends(self) -> set[int]:
        """Tokens that end the turn."""
        ends = self.mllm.base.generation_config.eos_token_id
        return {self.mllm.end_token, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])}

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """Arguments of transformers' `generate` that leave the model's distribution as it is."""
        from transformers import GenerationConfig

        known = GenerationConfig()  # releases have some of them or not
        return {name: value for name, value in _PLAIN.items() if hasattr(known, name)}

    @functools.cached_property
    def suppressed_tokens(self) -> list[int]:
        """Tokens that a sampled chain may not hold: image placeholders and other special tokens, save the ends."""
        image = getattr(self.mllm.base.config, "image_token_id", None)
        special = {*self.mllm.chat_format.special_ids, *([image] if image is not None else [])}
        return sorted(special - {*self.ends, self.mllm.tokenizer.eos_token_id})

    @functools.cached_property
    def closing_tokens(self) -> frozenset[int]:
        """Tokens that end a turn or could be the last of a conclusion."""
        tokenizer = self.mllm.tokenizer
        vocabulary = self.mllm.base.get_output_embeddings().weight.shape[0]
        tokens = tokenizer.convert_ids_to_tokens(range(min(vocabulary, len(tokenizer))))
        closing = (index for index, token in enumerate(tokens) if token is not None and END_OF_CHAIN[-1] in token)
        return frozenset(closing) | self.ends

    def has_ended(self, answer: list[int]) -> bool:
        """Return whether an answer has ended, with the turn or with its conclusion outside of the model's thoughts."""
        if answer[-1] in self.ends:
            return True
        decode = self.mllm.tokenizer.decode
        if END_OF_CHAIN not in decode(answer[-_END_TOKENS:]):
            return False
        text = decode(answer)
        return not is_thinking(text) and END_OF_CHAIN in without_thoughts(text)

    def generate(self, images: torch.Tensor, question: str, max_new_tokens: int, **sampling: Any) -> list[str]:
        """Return a new answer to the question about each image; see `write`."""
        return self.texts(self.write(images, question, max_new_tokens, **sampling))

    def texts(self, written: Any) -> list[str]:
        """Return answers without special tokens, from the tokens of each."""
        texts = self.mllm.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [self.mllm.chat_format.unescape(text.strip()) for text in texts]

    def write(self, images: torch.Tensor, question: str, max_new_tokens: int, **sampling: Any) -> list[list[int]]:
        """Return the tokens of a new answer to the question about each image.

        Args:
            images: ``(n, 3, H, W)``.
            question: asked of all of them.
            max_new_tokens: at most so many tokens.
            sampling: ``do_sample``, and with it ``temperature`` and ``top_p``.

        Raises:
            RuntimeError: for a model that keeps no cache, as gradient checkpointing has it in training mode.
        """
        if sampling.get("do_sample") or not self.has_slots:
            parts = images.split(self._fitting(question, max_new_tokens, len(images)))
            written = [self._write_by_transformers(part, question, max_new_tokens, **sampling) for part in parts]
            return [tokens for of_part in written for tokens in of_part]
        by_row = dict(self.stream(images.as_subclass(torch.Tensor), question, max_new_tokens, len(images)))
        return [by_row[row] for row in range(len(images))]

    def _fitting(self, question: str, max_new_tokens: int, batch: int, in_slots: bool = False) -> int:
        """Return how many answers are generated at a time: ``batch``, on an accelerator fewer if they do not fit.

        Args:
            question: about each image.
            max_new_tokens: maximum length of an answer in tokens.
            batch: the number wanted.
            in_slots: whether prompts are prefilled in parts, not all at once.
        """
        mllm = self.mllm
        free = free_memory(mllm.device) if mllm.device.type != "cpu" else None
        row = mllm.cache_bytes(1, question, max_new_tokens)
        if not in_slots:
            return slots_that_fit(batch, row + prefill_bytes(mllm, question, 1), free)
        part = min(batch, prompts_at_a_time(mllm.prompt(question)["input_ids"].shape[1]))
        return slots_that_fit(batch, row, free and max(0, free - prefill_bytes(mllm, question, part)))

    @property
    def has_slots(self) -> bool:
        """Whether greedy answers are decoded in slots (`decoding`)."""
        return can_decode(self.mllm)

    def stream(
        self, images: Iterable[torch.Tensor], question: str, max_new_tokens: int, batch: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the number of each image and the tokens of its greedy answer, in the order in which answers end.

        Args:
            images: ``(3, H, W)`` each, any number, consumed as needed.
            question: asked about every image.
            max_new_tokens: maximum length of an answer in tokens.
            batch: maximum number of answers generated at a time; on an accelerator, as many as fit.

        Raises:
            RuntimeError: see `write`.
        """
        if self.has_slots:
            slots = self._fitting(question, max_new_tokens, batch, in_slots=True)
            yield from Decoder(self, question, max_new_tokens, slots).write(images)
            return
        left, count = iter(images), 0
        while part := list(itertools.islice(left, batch)):
            written = self.write(torch.stack(part), question, max_new_tokens, do_sample=False)
            yield from enumerate(written, count)
            count += len(part)

    def _write_by_transformers(
        self, images: torch.Tensor, question: str, max_new_tokens: int, **sampling: Any
    ) -> list[list[int]]:
        """Return what `write` does, using `decoding_loop`."""
        mllm, n = self.mllm, len(images)
        encoded = mllm.encode(images)
        prompt = mllm.prompt(question)["input_ids"].to(mllm.device).expand(n, -1)
        head: Callable[[torch.Tensor], torch.Tensor] = mllm.base.get_output_embeddings()
        length = prompt.shape[1]
        plain = torch.arange(length, length + max_new_tokens, device=mllm.device)
        positions = tree_positions(mllm, plain[None], question, encoded)

        def prefill(cache: Any) -> torch.Tensor:
            hidden = mllm.core(n, question, prompt, encoded, **mllm.keeping(cache))[0]
            if cache.get_seq_length() != length:
                raise RuntimeError("gradient checkpointing disables the cache in training mode: call eval() first.")
            return head(hidden[:, -1])

        def step(tokens: torch.Tensor, count: int, cache: Any) -> torch.Tensor:
            at = positions[..., count : count + 1].expand(*positions.shape[:-2], len(tokens), 1)
            out = mllm.base.model(input_ids=tokens, position_ids=at, **mllm.keeping(cache))
            return head(out[0][:, -1])

        written: list[list[int]] = mllm.base.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **{**self.plain, **sampling},
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=mllm.tokenizer.pad_token_id or mllm.end_token,
            suppress_tokens=self.suppressed_tokens,
            custom_generate=decoding_loop(prefill, step, self.has_ended, self.closing_tokens),
        )
        return written

    def generate_after(
        self, images: torch.Tensor, question: str, beginnings: Sequence[str], max_new_tokens: int, **sampling: Any
    ) -> list[str]:
        """Return what the model writes after what each answer begins with: transformers' own loop, on padded prompts.

        Args:
            images: ``(n, 3, H, W)``.
            question: asked of all of them.
            beginnings: n texts.
            max_new_tokens: at most so many tokens.
            sampling: ``do_sample``, and with it ``temperature`` and ``top_p``.
        """
        mllm, n = self.mllm, len(images)
        prompt = {name: value.to(mllm.device).expand(n, -1) for name, value in mllm.prompt(question).items()}
        prompt = self._begun(prompt, beginnings)
        out = mllm.base.generate(
            **{**prompt, **mllm.encode(images), **self.plain, **sampling, "stop_strings": [END_OF_CHAIN]},
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=mllm.tokenizer.pad_token_id or mllm.end_token,
            suppress_tokens=self.suppressed_tokens,
            tokenizer=mllm.tokenizer,
        )
        return self.texts(out[:, prompt["input_ids"].shape[1] :])

    def _begun(self, prompt: dict[str, torch.Tensor], beginnings: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the prompts with what each answer begins with after them, padded on the left."""
        begun = [self.mllm.target(text)[:-1] if text else () for text in beginnings]
        longest = max(map(len, begun))
        fills = {"input_ids": (self.mllm.tokenizer.pad_token_id or 0, 0), "attention_mask": (0, 1)}  # before, after
        out = {}
        for name, value in prompt.items():
            before, after = fills.get(name, (0, 0))
            rows = value.new_full((len(value), longest + value.shape[1]), before)
            for row, tokens in enumerate(begun):
                rows[row, longest - len(tokens) : rows.shape[1] - len(tokens)] = value[row]
                rows[row, rows.shape[1] - len(tokens) :] = value.new_tensor(tokens) if name == "input_ids" else after
            out[name] = rows
        return out


def decoding_loop(
    prefill: Callable[[Any], torch.Tensor],
    step: Callable[[torch.Tensor, int, Any], torch.Tensor],
    ended: Callable[[list[int]], bool],
    closing_tokens: Collection[int],
) -> Callable[..., list[list[int]]]:
    """Return the loop for transformers' `generate(custom_generate=…)`; it returns each row's tokens.

    Args:
        prefill: reads the prompts into a cache; logits of the next token, ``(n, vocabulary)``.
        step: reads a token of each row, ``(m, 1)``, the so many-th after the prompt, on top of a cache; logits.
        ended: whether a row of tokens is an answer's end.
        closing_tokens: tokens after which `ended` is asked.
    """

    def loop(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **more: Any,
    ) -> list[list[int]]:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config.get_text_config())
        written: list[list[int]] = [[] for _ in input_ids]
        running = list(range(len(written)))  # the answer of every row that is still in the batch
        open_rows = [True] * len(running)
        seen, logits = input_ids, prefill(cache)
        most = generation_config.max_length - input_ids.shape[1]
        for count in range(most):
            scores = logits_processor(seen, logits.float())
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)
            else:
                tokens = scores.argmax(-1, keepdim=True)
            for row, token in enumerate(tokens[:, 0].tolist()):
                if open_rows[row]:
                    answer = written[running[row]]
                    answer.append(token)
                    open_rows[row] = not (token in closing_tokens and ended(answer))
            if count + 1 == most or not any(open_rows):
                break
            seen = torch.cat([seen, tokens], dim=1)
            if sum(open_rows) <= len(open_rows) * (1 - 1 / _LEAVE):
                kept = [row for row, is_open in enumerate(open_rows) if is_open]
                index = torch.tensor(kept, device=seen.device)
                cache.batch_select_indices(index)
                seen, tokens = seen[index], tokens[index]
                running, open_rows = [running[row] for row in kept], [True] * len(kept)
            logits = step(tokens, count, cache)
        return written

    return loop
