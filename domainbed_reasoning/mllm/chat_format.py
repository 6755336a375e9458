"""Convert questions and answers to tokens by the model's chat template and tokenizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

_ANSWER = "ANSWER"  # placeholder of the assistant's turn when the chat template is analyzed
_QUESTION: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
_ZERO_WIDTH = "\u200b"
_OPEN_THOUGHT = re.compile(r"([<◁])think([>▷])(\s*)$")
_REMEMBERED = 100_000  # cached answers: the chains of a whole dataset, a few hundred bytes each


class ChatFormat:
    """The conversation format of one model.

    Every question is about one image of fixed size, so all prompts of a question have the same tokens. Models that
    think before they answer are asked to answer at once: by their chat template's ``enable_thinking``, or, where it
    opens a thought all the same, by closing this thought in the prompt.

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
    def _template_settings(self) -> dict[str, bool]:
        """What the chat template is told beside the messages."""
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        return {"enable_thinking": False} if "enable_thinking" in str(template) else {}

    def _render(self, turns: list[dict[str, Any]], **settings: bool) -> str:
        text: str = self.processor.apply_chat_template(turns, tokenize=False, **settings, **self._template_settings)
        return text

    @functools.cached_property
    def _thought_closing(self) -> tuple[str, str]:
        """The blanks after a thought that the prompt opens, and the text to put in their place; empty without one."""
        opened = _OPEN_THOUGHT.search(self._render([_QUESTION], add_generation_prompt=True))
        return (opened[3], f"\n\n{opened[1]}/think{opened[2]}\n\n") if opened else ("", "")

    @functools.cached_property
    def _turn(self) -> tuple[str, str, int]:
        """The text before an answer, what the chat template inserts between the two, and the end token."""
        answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
        prompt, (blanks, closing) = self._render([_QUESTION], add_generation_prompt=True), self._thought_closing
        if closing:
            prompt = prompt[: len(prompt) - len(blanks)] + closing
        lead, found, tail = self._render([_QUESTION, answer]).rpartition(_ANSWER)
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

    def inputs(self, turns: list[Any]) -> dict[str, Any]:
        """Return the processor's inputs of one conversation or of several of equal length, up to the answer.

        Args:
            turns: the messages of a conversation, or a list of conversations.
        """
        inputs = dict(
            self.processor.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=dict(self.image_settings),
                **self._template_settings,
            )
        )
        blanks, closing = self._thought_closing
        if not closing:
            return inputs
        tokens, replaced = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (closing, blanks))
        shape = inputs["input_ids"].shape
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.shape == shape:
                value = value[:, : shape[1] - len(replaced)]  # noqa: PLW2901
                more = torch.tensor(tokens) if name == "input_ids" else value[0, -1]
                inputs[name] = torch.cat([value, more.expand(shape[0], len(tokens))], 1)
        return inputs

    def prompt(self, question: str) -> dict[str, torch.Tensor]:
        """Return the inputs of a question about one image, without the image: ``input_ids`` ``(1, P)`` and others."""
        if question not in self._prompts:
            self._prompts[question] = self._tokenise_question(question)
        return self._prompts[question]

    def _tokenise_question(self, question: str) -> dict[str, torch.Tensor]:
        from PIL import Image

        blank = Image.new("RGB", (self.image_size, self.image_size))
        content = [{"type": "image", "image": blank}, {"type": "text", "text": self.escape(question)}]
        inputs = self.inputs([{"role": "user", "content": content}])
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
