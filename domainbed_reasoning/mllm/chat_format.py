"""Convert questions and answers to tokens by the model's chat template and tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

_ANSWER = "ANSWER"  # placeholder of the assistant's turn when the chat template is analyzed
_ZERO_WIDTH = "\u200b"
_REMEMBERED = 100_000  # cached answers: the chains of a whole dataset, a few hundred bytes each


class ChatFormat:
    """The conversation format of one model.

    Every question is about one image of fixed size, so all prompts of a question have the same tokens.

    Args:
        processor: of the model.
        image_size: edge in pixels of the images.
        image_settings: arguments of the image processor.
    """

    def __init__(self, processor: Any, image_size: int, image_settings: Mapping[str, Any]):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_size = image_size
        self.image_settings = dict(image_settings)
        self._prompts: dict[str, dict[str, torch.Tensor]] = {}
        self._targets: dict[str, tuple[int, ...]] = {}

    @functools.cached_property
    def special_tokens(self) -> list[str]:
        """Every token with a meaning to the model or processor, longest first.

        Named special tokens are not all of them: Gemma's ``<end_of_turn>`` is only marked as special among added ones.
        """
        marked = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        own = {value for name, value in vars(self.processor).items() if name.endswith("_token")}
        known = marked | set(self.tokenizer.all_special_tokens) | {token for token in own if isinstance(token, str)}
        return sorted(filter(None, known), key=lambda token: (-len(token), token))

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens that the tokenizer has."""
        ids = (self.tokenizer.convert_tokens_to_ids(token) for token in self.special_tokens)
        return frozenset(token for token in ids if token is not None)

    def escape(self, text: str) -> str:
        """Return ``text`` with every special token broken by a zero-width space.

        Class names and chains are data: ``<IMG_CONTEXT>`` inside of one would count as an image.
        """
        for token in self.special_tokens:
            text = text.replace(token, token[:1] + _ZERO_WIDTH + token[1:])
        return text

    def unescape(self, text: str) -> str:
        """Return ``text`` as it was before `escape`."""
        for token in reversed(self.special_tokens):
            text = text.replace(token[:1] + _ZERO_WIDTH + token[1:], token)
        return text

    @functools.cached_property
    def _turn(self) -> tuple[str, str, int]:
        """The text before an answer, what the chat template inserts between the two, and the end token."""
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
        template = self.processor.apply_chat_template
        prompt = template([question], add_generation_prompt=True, tokenize=False)
        lead, found, tail = template([question, answer], tokenize=False).rpartition(_ANSWER)
        lead = lead[len(prompt) :] if found and lead.startswith(prompt) else ""
        after = self.tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
        end = next((token for token in after if token in self.special_ids), self.tokenizer.eos_token_id)
        for token in self.special_tokens:
            prompt = prompt.rpartition(token)[2]
        return prompt, lead, end

    @property
    def end_token(self) -> int:
        """Token id that ends the assistant's turn."""
        return self._turn[2]

    def prompt(self, question: str) -> dict[str, torch.Tensor]:
        """Return the inputs of a question about one image, without the image: ``input_ids`` ``(1, P)`` and others."""
        if question not in self._prompts:
            self._prompts[question] = self._tokenise_question(question)
        return self._prompts[question]

    def _tokenise_question(self, question: str) -> dict[str, torch.Tensor]:
        from PIL import Image

        blank = Image.new("RGB", (self.image_size, self.image_size))
        content = [{"type": "image", "image": blank}, {"type": "text", "text": self.escape(question)}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(self.image_settings),
        )
        shape = inputs["input_ids"].shape  # others are image inputs
        return {name: inputs[name] for name in inputs if inputs[name].shape == shape}

    def target(self, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer with the token that ends it."""
        if answer not in self._targets:
            if len(self._targets) >= _REMEMBERED:
                self._targets.clear()
            self._targets[answer] = self._tokenize_answer(answer)
        return self._targets[answer]

    def _tokenize_answer(self, answer: str) -> tuple[int, ...]:
        before, lead, end = self._turn
        # In context: Llama's tokenizer treats the beginning of a text differently.
        context = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(before + lead + self.escape(answer), add_special_tokens=False)["input_ids"]
        if ids[: len(context)] != context:  # the first characters were merged with the context
            context, ids = [], self.tokenizer(lead + self.escape(answer), add_special_tokens=False)["input_ids"]
        return (*ids[len(context) :], end)
