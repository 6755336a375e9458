"""A multimodal LLM behind the few calls that the method needs: encode, likelihood, class scores, generation."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning.mllm import general, likelihood
from domainbed_reasoning.mllm.adapter_files import check_adapters, shapes_of_sum
from domainbed_reasoning.mllm.chat_format import ChatFormat
from domainbed_reasoning.mllm.decoding import prefill_bytes, prompts_at_a_time
from domainbed_reasoning.mllm.devices import allocated_memory, free_memory
from domainbed_reasoning.mllm.dynamic_tiles import DynamicTiles
from domainbed_reasoning.mllm.embedding import embedded
from domainbed_reasoning.mllm.families import Family, is_general
from domainbed_reasoning.mllm.generation import TextGenerator
from domainbed_reasoning.mllm.generation_cache import AnswerCache, keys_of, state_of
from domainbed_reasoning.mllm.interface import CACHES
from domainbed_reasoning.mllm.likelihood import LogLikelihoods
from domainbed_reasoning.mllm.loading import cached_numbers
from domainbed_reasoning.mllm.pixels import from_picture, resize, to_uint8
from domainbed_reasoning.mllm.tile_groups import GroupedGenerator, TileGroups
from domainbed_reasoning.mllm.tree_attention import install

ROWS = ("naive", "vision", "tree")


class MLLM(torch.nn.Module):
    """A multimodal LLM, with or without adapters, and its processor.

    Every question is about one image of fixed size, so all prompts of a question have the same tokens: they are
    tokenized once, and batches need no left padding. With dynamic tiles this holds for images of equal numbers of
    tiles: `tile_groups` computes batches in such groups, each by a model for that number.

    Attributes:
        network: the transformers model, or the PEFT model around it.
        processor: its processor.
        family: its entry in the table of families.
        grid: tiles per side of a square image.
        tiles: dynamic tiles instead; None for square images.
        count: number of tiles of each image, if they are all equal.
        quantized: whether the weights are quantized by bitsandbytes.
        image_size: edge in pixels of the images that the model sees; of a tile with dynamic tiles.
        answer_cache: greedy answers of copies for inference.
        frozen_state: digest of the adapters, merged or not, while they do not change: the key of cached greedy answers;
            else None.
    """

    def __init__(
        self,
        network: Any,
        processor: Any,
        family: Family,
        grid: int = 1,
        quantized: bool = False,
        tiles: DynamicTiles | None = None,
        count: int | None = None,
    ):
        super().__init__()
        self.answer_cache = AnswerCache()
        self.frozen_state: bytes | None = None
        self.network = network
        self.processor = processor
        self.family = family
        self.grid = grid
        self.quantized = quantized
        self.tiles, self.count = tiles, count
        edge = family.tile_edge(processor.image_processor)
        self.image_size = edge * grid
        self._image_settings = tiles.prompt_settings(count) if tiles else family.image_settings(edge, grid)
        self.chat_format = ChatFormat(processor, self.image_size, self._image_settings)
        self._vision_inputs = {"pixel_values"}
        self._core_inputs = general.accepted(self.base) - {"pixel_values"}
        # Not the model itself: in a reference cycle, large copies would live until garbage collection.
        own = weakref.proxy(self)
        self.reading: Any = likelihood if family.tree else general
        self.generator = TextGenerator(own) if family.tree else general.GeneralGenerator(own)
        if tiles is not None and count is None:
            same = functools.partial(MLLM, network, processor, family, quantized=quantized, tiles=tiles)
            self.reading = TileGroups(tiles, lambda count: same(count=count))
            self.generator = GroupedGenerator(own, self.reading)
        if not family.tree:
            return
        self._vision_inputs = set(inspect.signature(general.image_encoder(self.base)).parameters)
        self._core_inputs = set(inspect.signature(self.base.model.forward).parameters) - {"pixel_values"}
        self._cache_argument = next(name for name in CACHES if name in self._core_inputs)
        if family.tree != "windows":
            install(self.base)

    def train(self, mode: bool = True) -> MLLM:
        """Set the mode; frozen layers stay in evaluation mode: no batch statistics, no dropout."""
        super().train(mode)
        for module in self._always_evaluated:
            if not getattr(module, "gradient_checkpointing", False):
                module.training = False
        return self

    @functools.cached_property
    def _always_evaluated(self) -> list[torch.nn.Module]:
        """Batch normalizations and, of architectures without an entry, whose layers may drop out, all but LoRA's."""
        general_path, norms = is_general(self.family), torch.nn.modules.batchnorm._BatchNorm
        return [
            module
            for name, module in self.network.named_modules()
            if (general_path and "lora_dropout" not in name) or isinstance(module, norms)
        ]

    @property
    def base(self) -> Any:
        """The transformers model, including adapters."""
        return self.network.base_model.model if hasattr(self.network, "get_base_model") else self.network

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        weight: torch.Tensor = self.base.get_input_embeddings().weight
        return weight.device

    # -- text -----------------------------------------------------------------------------------------------------

    @property
    def end_token(self) -> int:
        """Token id that ends the assistant's turn."""
        return self.chat_format.end_token

    def prompt(self, question: str) -> dict[str, torch.Tensor]:
        """Return the inputs of a question about one image, without the image: ``input_ids`` ``(1, P)`` and others."""
        inputs = self.chat_format.prompt(question)
        return {name: value for name, value in inputs.items() if name in self._core_inputs}

    def target(self, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer with the token that ends it."""
        return self.chat_format.target(answer)

    # -- images ---------------------------------------------------------------------------------------------------

    @property
    def from_picture(self) -> Callable[[Any], torch.Tensor]:
        """The transform from a PIL picture to an image as the model sees it, bytes; see `pictures`."""
        return self.tiles or from_picture(self.image_size)

    def pictures(self, images: torch.Tensor) -> torch.Tensor:
        """Return images as the model sees them, bytes: ``(n, 3, edge, edge)``, or columns of dynamic tiles.

        Args:
            images: ``(n, 3, H, W)``, bytes or DomainBed's floats.
        """
        pixels = to_uint8(images.as_subclass(torch.Tensor))
        return resize(pixels, self.image_size) if self.tiles is None else self.tiles.columns(pixels)

    def image_inputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the vision inputs of a batch of images, ``(n, 3, H, W)`` bytes or DomainBed's floats."""
        pictures, settings = self.pictures(images), self._image_settings
        if self.tiles is not None and self.count is not None:
            pictures, settings = self.tiles.cut(pictures, self.count), {"crop_to_patches": False}
        out = self.processor.image_processor(images=[[p] for p in pictures], return_tensors="pt", **settings)
        used = self._vision_inputs | self._core_inputs
        tensors = {name: value for name, value in out.items() if name in used and isinstance(value, torch.Tensor)}
        return {name: value.to(self.device) for name, value in tensors.items()}

    def encode(self, images: torch.Tensor) -> dict[str, Any]:
        """Return encoded images as inputs of the language model, for any number of questions about them.

        Args:
            images: ``(n, 3, H, W)``, bytes or DomainBed's floats.
        """
        if isinstance(self.reading, TileGroups):
            return self.reading.encode(self.pictures(images))
        if not self.family.tree:
            return general.encode(self, images)
        inputs = self.image_inputs(images)
        vision = {name: value for name, value in inputs.items() if name in self._vision_inputs}
        features = general.image_encoder(self.base)(**vision, return_dict=True)
        kept = {name: value for name, value in inputs.items() if name in self._core_inputs}
        kept.pop("pixel_attention_mask", None)
        return {**kept, "mm_encoder_outputs": {"image": features}}

    # -- the language model ---------------------------------------------------------------------------------------

    def keeping(self, cache: Any) -> dict[str, Any]:
        """Return the arguments that make the language model use and extend ``cache``."""
        return {self._cache_argument: cache, "use_cache": True}

    def core(self, rows: int, question: str, fed: torch.Tensor, encoded: dict[str, Any], **more: Any) -> Any:
        """Run the language model, without its head, on ``fed``: prompt and continuation, ``(rows, L)``."""
        extra = {}
        for name, value in self.prompt(question).items():
            if name in ("input_ids", "attention_mask"):
                continue
            value = value.to(self.device).expand(rows, -1)
            extra[name] = torch.nn.functional.pad(value, (0, fed.shape[1] - value.shape[1]))
        return self.base.model(**embedded(self, question, fed, encoded), **extra, **more)

    # -- likelihood -----------------------------------------------------------------------------------------------

    def log_likelihoods(self, encoded: dict[str, Any], question: str, answers: Sequence[str]) -> LogLikelihoods:
        """Return log p of every token of each image's answer, with its end token.

        The output head runs on supervised positions only.

        Args:
            encoded: n images, from `encode`.
            question: asked of all of them.
            answers: n texts.

        Returns:
            log-likelihoods in nats, float32, ``(n, T)``, and the mask of target tokens, ``(n, T)``.
        """
        found: LogLikelihoods = self.reading.log_likelihoods(self, encoded, question, answers)
        return found

    def token_statistics(
        self, encoded: dict[str, Any], question: str, answers: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `log_likelihoods` does, and the entropy of the distribution at each target token.

        Returns:
            log-likelihoods and entropies in nats, float32, ``(n, T)`` each, and the mask of target tokens, ``(n, T)``.
        """
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.reading.token_statistics(
            self, encoded, question, answers
        )
        return found

    def two_path_log_likelihoods(
        self,
        images: torch.Tensor,
        questions: tuple[str, str],
        answers: tuple[Sequence[str], Sequence[str]],
        rows: str | None = None,
    ) -> tuple[LogLikelihoods, LogLikelihoods]:
        """Return what `log_likelihoods` does for two questions about each image, in any layout of rows.

        ``naive``: a row for each question, and the image encoded for each. ``vision``: a row for each, the image
        encoded once. ``tree``: one row of a prefix (image, template and the words that both questions begin with) and
        two branches. All three are the same function of the weights.

        Args:
            images: ``(n, 3, H, W)``, bytes or DomainBed's floats.
            questions: both asked of all of them.
            answers: n texts to each question.
            rows: ``naive``, ``vision`` or ``tree``; None uses the fastest that the family supports.

        Raises:
            ValueError: for any other layout.
        """
        rows = rows or ("tree" if self.family.tree else "vision")  # the fastest in every measurement
        known = ROWS if self.family.tree else ROWS[:2]
        if rows not in known:
            raise ValueError(f"rows must be one of {', '.join(known)}; got {rows!r}.")
        if rows == "tree":
            found: tuple[LogLikelihoods, LogLikelihoods] = self.reading.tree_log_likelihoods(
                self, self.encode(images), questions, answers
            )
            return found
        encoded = [self.encode(images)]
        encoded.append(self.encode(images) if rows == "naive" else encoded[0])
        a, b = (self.log_likelihoods(*each) for each in zip(encoded, questions, answers, strict=True))
        return a, b

    def path_log_likelihoods(
        self,
        images: torch.Tensor,
        questions: tuple[str, str],
        answers: tuple[Sequence[str] | None, Sequence[str] | None],
    ) -> tuple[LogLikelihoods | None, LogLikelihoods | None]:
        """Return what `log_likelihoods` does for either question, None for one without answers; encodes images once."""
        a, b = answers
        if a is not None and b is not None:
            return self.two_path_log_likelihoods(images, questions, (a, b))
        encoded = self.encode(images)
        by_a = self.log_likelihoods(encoded, questions[0], a) if a is not None else None
        by_b = self.log_likelihoods(encoded, questions[1], b) if b is not None else None
        return by_a, by_b

    def class_scores(self, images: torch.Tensor, question: str, names: Sequence[str]) -> torch.Tensor:
        """Return log p(name, end | image, question) for every class name.

        Args:
            images: ``(n, 3, H, W)``.
            question: q_cls.
            names: C class names.

        Returns:
            ``(n, C)``, float32, in nats.
        """
        found: torch.Tensor = self.reading.class_scores(self, images, question, names)
        return found

    # -- generation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        images: torch.Tensor,
        question: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        beginnings: Sequence[str] | None = None,
    ) -> list[str]:
        """Generate one answer per image, ending with the turn or with the chain's conclusion.

        Greedy answers are cached while the weights are frozen (`frozen_state`).

        Args:
            images: ``(n, 3, H, W)``.
            question: q_reason or q_cls.
            max_new_tokens: maximum number of tokens.
            temperature: 0 is greedy. Nothing else alters the distribution, see `generation`.
            top_p: nucleus sampling in (0, 1].
            beginnings: n texts that the answers begin with; None for none.

        Returns:
            n texts without special tokens, without the ``beginnings``.
        """
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if beginnings is not None:
            return self.generator.generate_after(images, question, beginnings, max_new_tokens, **sampling)
        if temperature > 0 or self.frozen_state is None:
            return self.generator.generate(images, question, max_new_tokens, **sampling)
        known = self.answer_cache.of(self.frozen_state)
        pictures, keys = keys_of(self, images, question, max_new_tokens)
        new = {key: row for row, key in enumerate(keys) if key not in known}
        if new:
            texts = self.generator.generate(pictures[list(new.values())], question, max_new_tokens, **sampling)
            known.update(zip(new, texts, strict=True))
        return [known[key] for key in keys]

    def remember(
        self, state: bytes, images: torch.Tensor, question: str, max_new_tokens: int, answers: Sequence[str]
    ) -> None:
        """Add greedy answers that a copy in that state generated in another process to the cache.

        Args:
            state: `frozen_state` of the copy.
            images: as passed to `generate`, ``(n, 3, H, W)``.
            question: as passed to `generate`.
            max_new_tokens: as passed to `generate`.
            answers: n greedy answers.
        """
        _, keys = keys_of(self, images, question, max_new_tokens)
        self.answer_cache.of(state).update(zip(keys, answers, strict=True))

    # -- adapters -------------------------------------------------------------------------------------------------

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the trainable tensors by name; empty for a base model."""
        return dict(self._trained)

    @functools.cached_property
    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}

    def load_adapters(self, values: Mapping[str, torch.Tensor], several: bool = False) -> None:
        """Load adapter values by name.

        Args:
            values: by the names of `adapters`.
            several: accept a sum of adapters too, whose rank is a multiple, see `method.average`.

        Raises:
            ValueError: for tensors that do not match this model's adapters, naming the first.
        """
        shapes = {name: tuple(weight.shape) for name, weight in self.adapters().items()}
        check_adapters(shapes_of_sum(shapes, values) if several else shapes, values)
        self._set_adapters(values)

    def merge(self) -> MLLM:
        """Merge the adapters into the weights and return a model for inference; do not use this one afterwards."""
        return self._merged(self.network)

    def _merged(self, network: Any) -> MLLM:
        if hasattr(network, "get_base_model"):
            network = network.merge_and_unload()
        network.requires_grad_(False).eval()
        return MLLM(network, self.processor, self.family, self.grid, self.quantized, self.tiles)

    def copy_for_inference(self) -> MLLM:
        """Return a frozen copy with the current weights, unaffected by later training.

        The adapters are merged into a copy of the weights, never into the trained ones, which would drift in bfloat16.
        Copies share the cache of answers with this model.
        """
        frozen = self._merged(copy.deepcopy(self.network))
        frozen.answer_cache = self.answer_cache
        frozen.frozen_state = self.frozen_state or state_of(self.adapters().values())
        return frozen

    def cache_bytes(self, rows: int, question: str, new_tokens: int) -> int:
        """Return the bytes of keys and values for generating chains.

        Args:
            rows: images per batch.
            question: about each image.
            new_tokens: maximum tokens of a chain.
        """
        tokens = self.prompt(question)["input_ids"].shape[1] + new_tokens
        itemsize = int(next(self.network.parameters()).element_size())
        return cached_numbers(self.base.config) * itemsize * rows * tokens

    def generation_bytes(self, rows: int, question: str, new_tokens: int) -> int:
        """Return the bytes for generating chains: of `cache_bytes`, and for reading the prompts."""
        part = min(rows, prompts_at_a_time(self.prompt(question)["input_ids"].shape[1]))
        return self.cache_bytes(rows, question, new_tokens) + prefill_bytes(self, question, part)

    def fits_a_copy(self, writes: int = 0, beside: int = 0) -> bool:
        """Return whether `copy_for_inference` is possible: not quantized, and memory for a second set of weights.

        Args:
            writes: bytes that it needs for generation, see `generation_bytes`.
            beside: bytes, including this model's, that training needs while the copy exists.
        """
        if self.quantized:
            return False
        free, used = free_memory(self.device), allocated_memory(self.device)
        if free is None:
            return True
        weights = self.weight_bytes()
        left = min(free - max(0, beside - used) - 1.5 * weights, free - 1.1 * (weights + writes))
        return bool(left > 0)

    def weight_bytes(self) -> int:
        """Return the bytes of all weights, adapters included."""
        return sum(weight.numel() * weight.element_size() for weight in self.network.parameters())

    @contextlib.contextmanager
    def with_adapters(self, values: Mapping[str, torch.Tensor]) -> Iterator[MLLM]:
        """Temporarily use other adapter values, in evaluation mode; values and mode are restored."""
        own = {name: weight.detach().clone() for name, weight in self.adapters().items()}
        training = self.training
        self._set_adapters(values)
        self.eval()
        try:
            yield self
        finally:
            self._set_adapters(own)
            self.train(training)

    @torch.no_grad()
    def _set_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self.adapters().items():
            if weight.shape == values[name].shape:
                weight.copy_(values[name])
            else:  # a sum of adapters, whose scale is that of each
                weight.data = values[name].to(weight.device, weight.dtype, copy=True)
