"""The interface of `MLLM` that generation, likelihoods, and tree attention depend on."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from domainbed_reasoning.mllm.chat_format import ChatFormat
from domainbed_reasoning.mllm.dynamic_tiles import DynamicTiles
from domainbed_reasoning.mllm.families import Family


class LanguageModel(Protocol):
    """The part of `MLLM` that its modules use; see there.

    Attributes:
        family: its row in the table of families.
        chat_format: its conversations as tokens.
        image_size: edge in pixels of the images that the model sees.
        quantized: whether weights are bitsandbytes'.
        tiles: dynamic tiles; None for square images.
    """

    family: Family
    chat_format: ChatFormat
    image_size: int
    quantized: bool
    tiles: DynamicTiles | None

    @property
    def base(self) -> Any:
        """The transformers model."""

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def end_token(self) -> int:
        """Token id that ends the assistant's turn."""
        ...

    def prompt(self, question: str) -> dict[str, torch.Tensor]:
        """Return the tokens of a question about one image."""
        ...

    def cache_bytes(self, rows: int, question: str, new_tokens: int) -> int:
        """Return the bytes of keys and values for generating answers."""
        ...

    def target(self, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer with its end token."""
        ...

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """Return images as the model sees them, bytes."""
        ...

    def image_inputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the vision inputs of a batch of images."""
        ...

    def encode(self, images: torch.Tensor) -> dict[str, Any]:
        """Return encoded images."""
        ...

    def core(self, rows: int, question: str, fed: torch.Tensor, encoded: dict[str, Any], **more: Any) -> Any:
        """Run the language model without its head."""

    def keeping(self, cache: Any) -> dict[str, Any]:
        """Return the arguments that make the language model use ``cache``."""
        ...
