"""One multimodal LLM behind the few calls that the method needs: encode, likelihood, class scores, generation."""

from __future__ import annotations

import contextlib
import copy
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning.mllm import general, likelihood, trials
from domainbed_reasoning.mllm.adapters import LoraSettings, add_lora, check_adapters
from domainbed_reasoning.mllm.chat_format import ChatFormat
from domainbed_reasoning.mllm.embedding import embedded
from domainbed_reasoning.mllm.families import Family, is_general, tile_grid
from domainbed_reasoning.mllm.generation import TextGenerator
from domainbed_reasoning.mllm.generation_cache import AnswerCache, Key, digests_of, state_of
from domainbed_reasoning.mllm.interface import CACHES, require_interface, require_sight
from domainbed_reasoning.mllm.likelihood import LogLikelihoods
from domainbed_reasoning.mllm.loading import cached_numbers, free_memory, load_network, resolve
from domainbed_reasoning.mllm.opening import small_files_digest
from domainbed_reasoning.mllm.pixels import resize, to_uint8
from domainbed_reasoning.mllm.tree_attention import install

ROWS = ("naive", "vision", "tree")


def load_mllm(
    model: str,
    *,
    lora: LoraSettings | None = None,
    adapters: Mapping[str, torch.Tensor] | None = None,
    dtype: str = "auto",
    quantize: str = "none",
    gradient_checkpointing: bool = False,
    max_tiles: int = 1,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MLLM:
    """Load a multimodal LLM, with fresh adapters if ``lora`` is given.

    Args:
        model: ``tiny``, a folder or a hub id of one of the supported families.
        lora: adapters to add; None loads the bare model.
        adapters: their trained values by name, which must fit; None leaves them as they start.
        dtype: ``auto`` (bfloat16 on CUDA, float32 on the CPU), ``float32``, ``bfloat16`` or ``float16``.
        quantize: ``none``, ``nf4`` or ``int8``.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        max_tiles: at most so many tiles an image, for families that cut images into tiles.
        device: None takes CUDA where there is one.
        revision: a branch, tag or commit of the hub's repository; None is its main branch.
        trust_remote_code: whether the checkpoint's own Python files run, where it has any.

    Raises:
        ModelError: for a model that cannot be used.
        ValueError: for ``adapters`` that do not fit it.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network, processor, family = load_network(model, dtype, quantize, where, revision, trust_remote_code)
    grid = tile_grid(family, max_tiles)
    if is_general(family):
        digest = trials.digest_of(small_files_digest(model, resolve(model, revision), revision), dtype, quantize, where)
        family = trials.known(lambda settings: MLLM(network, processor, settings), family, digest)
    else:
        require_interface(network, family)
    if lora is not None:
        network = add_lora(network, lora, adapters)
    mllm = MLLM(network, processor, family, grid, quantized=quantize != "none")
    if family.tree:
        require_sight(mllm)
    else:
        trials.require_sight(mllm)
    if is_general(family) and lora is not None:
        trials.require_gradients(mllm)
    if adapters:
        mllm.load_adapters(adapters)
    if gradient_checkpointing:
        checkpoint_activations(mllm.base)
    return mllm


def checkpoint_activations(network: Any) -> None:
    """Have transformers recompute activations in the backward pass, by the name that the installed release has."""
    named = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"  # from 5.24 on; before
    getattr(network, f"{named}_checkpointing_enable")({"use_reentrant": False})


class MLLM(torch.nn.Module):
    """A multimodal LLM, with or without adapters, and its processor.

    Every question is asked of one image of fixed size, so all prompts of a question have the same tokens: they are
    tokenised once, and batches need no padding on the left.

    Attributes:
        network: the transformers model, or the PEFT model around it.
        processor: its processor.
        family: its row in the table of families.
        grid: tiles a side that an image is cut into.
        quantized: whether weights are bitsandbytes'.
        image_size: edge in pixels of the images that the model sees.
        answer_cache: greedy answers of copies for inference.
        frozen_state: of a copy for inference, the digest of the adapters that are merged into it; else None.
    """

    def __init__(self, network: Any, processor: Any, family: Family, grid: int = 1, quantized: bool = False):
        super().__init__()
        self.answer_cache = AnswerCache()
        self.frozen_state: bytes | None = None
        self.network = network
        self.processor = processor
        self.family = family
        self.grid = grid
        self.quantized = quantized
        edge = family.tile_edge(processor.image_processor)
        self.image_size = edge * grid
        self._image_settings = family.image_settings(edge, grid)
        self.chat_format = ChatFormat(processor, self.image_size, self._image_settings)
        self._core_inputs = general.accepted(self.base) - {"pixel_values"}
        # Not the model itself: copies are large, and in a cycle they would stay until Python's collector comes.
        own = weakref.proxy(self)
        self.reading: Any = likelihood if family.tree else general
        self.generator = TextGenerator(own) if family.tree else general.GeneralGenerator(own)
        if not family.tree:
            return
        self._vision_inputs = set(inspect.signature(general.image_encoder(self.base)).parameters)
        self._core_inputs = set(inspect.signature(self.base.model.forward).parameters) - {"pixel_values"}
        self._cache_argument = next(name for name in CACHES if name in self._core_inputs)
        if family.tree != "windows":
            install(self.base)

    def train(self, mode: bool = True) -> MLLM:
        """Set the mode; what is frozen stays one function of its input: no batch statistics, no dropout of its own."""
        super().train(mode)
        general_path = is_general(self.family)  # the families have no dropout of their own
        for name, module in self.network.named_modules():
            is_own = (
                general_path and "lora_dropout" not in name and not getattr(module, "gradient_checkpointing", False)
            )
            if is_own or isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self

    @property
    def base(self) -> Any:
        """The transformers model, adapters inside of it."""
        return self.network.base_model.model if hasattr(self.network, "get_base_model") else self.network

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
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

    def image_inputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the vision inputs of a batch of images, ``(n, 3, H, W)`` bytes or DomainBed's floats."""
        pictures = resize(to_uint8(images.as_subclass(torch.Tensor)), self.image_size)
        out = self.processor.image_processor(
            images=[[p] for p in pictures], return_tensors="pt", **self._image_settings
        )
        used = self._vision_inputs | self._core_inputs
        tensors = {name: value for name, value in out.items() if name in used and isinstance(value, torch.Tensor)}
        return {name: value.to(self.device) for name, value in tensors.items()}

    def encode(self, images: torch.Tensor) -> dict[str, Any]:
        """Return the encoded images as inputs of the language model, for any number of questions about them.

        Args:
            images: ``(n, 3, H, W)``, bytes or DomainBed's floats.
        """
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
        """Return the arguments with which the language model reads ``cache`` and adds its keys and values to it."""
        return {self._cache_argument: cache, "use_cache": True}

    def core(self, rows: int, question: str, fed: torch.Tensor, encoded: dict[str, Any], **more: Any) -> Any:
        """Run the language model, without its head, on ``fed`` (prompt and what follows it), ``(rows, L)``."""
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

        The output head runs on supervised positions alone.

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
        """Return what `log_likelihoods` does, and the entropy of the distribution over each target token.

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
        """Return what `log_likelihoods` does for two questions about each image, however the rows are laid out.

        ``naive``: a row for each question, and the image encoded for each. ``vision``: a row for each, the image
        encoded once. ``tree``: one row of a prefix (image, template and the words that both questions begin with) and
        two branches. All three are the same function of the weights.

        Args:
            images: ``(n, 3, H, W)``, bytes or DomainBed's floats.
            questions: both asked of all of them.
            answers: n texts to each question.
            rows: ``naive``, ``vision`` or ``tree``; None takes the fastest that the family has.

        Raises:
            ValueError: for rows of another name.
        """
        rows = rows or ("tree" if self.family.tree else "vision")  # the fastest wherever it was measured
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
        """Return what `log_likelihoods` does for either question, None for one without answers; images encode once."""
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
        """Write one answer for each image, ending with the turn or with the chain's conclusion.

        A copy for inference remembers greedy answers: what its weights have been asked before is not written again.

        Args:
            images: ``(n, 3, H, W)``.
            question: q_reason or q_cls.
            max_new_tokens: at most so many tokens.
            temperature: 0 is greedy. See `generation` for what else shapes the distribution: nothing.
            top_p: nucleus sampling in (0, 1].
            beginnings: n texts that the answers must begin with; None leaves them free.

        Returns:
            n texts without special tokens, what was written after the ``beginnings``.
        """
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if beginnings is not None:
            return self.generator.generate_after(images, question, beginnings, max_new_tokens, **sampling)
        if temperature > 0 or self.frozen_state is None:
            return self.generator.generate(images, question, max_new_tokens, **sampling)
        known = self.answer_cache.of(self.frozen_state)
        pictures, keys = self._keys(images, question, max_new_tokens)
        new = {key: row for row, key in enumerate(keys) if key not in known}
        if new:
            texts = self.generator.generate(pictures[list(new.values())], question, max_new_tokens, **sampling)
            known.update(zip(new, texts, strict=True))
        return [known[key] for key in keys]

    def remember(
        self, state: bytes, images: torch.Tensor, question: str, max_new_tokens: int, answers: Sequence[str]
    ) -> None:
        """Take over what copies of this model in that state wrote, in another process, as if they had written it here.

        Args:
            state: `frozen_state` of the copy.
            images: as `generate` was given them, ``(n, 3, H, W)``.
            question: as then.
            max_new_tokens: as then.
            answers: n greedy answers.
        """
        _, keys = self._keys(images, question, max_new_tokens)
        self.answer_cache.of(state).update(zip(keys, answers, strict=True))

    def _keys(self, images: torch.Tensor, question: str, max_new_tokens: int) -> tuple[torch.Tensor, list[Key]]:
        """Return the images as the model sees them, and under what the memory keeps the answers."""
        pictures = resize(to_uint8(images.as_subclass(torch.Tensor)), self.image_size)
        return pictures, [(question, max_new_tokens, digest) for digest in digests_of(pictures)]

    # -- adapters -------------------------------------------------------------------------------------------------

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the trainable tensors by name; empty for a bare model."""
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}

    def load_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take over adapter values by name.

        Raises:
            ValueError: for tensors that do not fit this model's adapters, naming the first.
        """
        check_adapters({name: tuple(weight.shape) for name, weight in self.adapters().items()}, values)
        self._set_adapters(values)

    def merge(self) -> MLLM:
        """Return this model with its adapters merged into its own weights, for answering only; this one is used up."""
        return self._merged(self.network)

    def _merged(self, network: Any) -> MLLM:
        if hasattr(network, "get_base_model"):
            network = network.merge_and_unload()
        network.requires_grad_(False).eval()
        return MLLM(network, self.processor, self.family, self.grid, self.quantized)

    def copy_for_inference(self) -> MLLM:
        """Return a frozen model that answers as this one does now, whatever is trained afterwards.

        The adapters are merged into a copy of the weights, never into the trained ones, which would drift in bfloat16.
        Copies remember together with this model what equal weights have written.
        """
        frozen = self._merged(copy.deepcopy(self.network))
        frozen.answer_cache = self.answer_cache
        frozen.frozen_state = self.frozen_state or state_of(self.adapters().values())
        return frozen

    def cache_bytes(self, rows: int, question: str, new_tokens: int) -> int:
        """Return the bytes of the keys and values of chains that are being written.

        Args:
            rows: images at a time.
            question: of each.
            new_tokens: a chain's, at most.
        """
        tokens = self.prompt(question)["input_ids"].shape[1] + new_tokens
        itemsize = int(next(self.network.parameters()).element_size())
        return cached_numbers(self.base.config) * itemsize * rows * tokens

    def fits_a_copy(self, writes: int = 0, beside: int = 0) -> bool:
        """Return whether `copy_for_inference` is possible: unquantised, and with room for a second set of weights.

        Args:
            writes: bytes that it needs while it writes, see `cache_bytes`.
            beside: bytes, this model's among them, that training needs while the copy stays.
        """
        if self.quantized:
            return False
        if self.device.type != "cuda":
            return True
        weights = sum(weight.numel() * weight.element_size() for weight in self.network.parameters())
        free, used = free_memory(self.device), torch.cuda.memory_allocated(self.device)
        left = min(free - max(0, beside - used) - 1.5 * weights, free - 1.1 * (weights + writes))
        return bool(left > 0)

    @contextlib.contextmanager
    def with_adapters(self, values: dict[str, torch.Tensor]) -> Iterator[MLLM]:
        """Answer with other adapter values for a while, in evaluation mode; restores values and mode."""
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
            weight.copy_(values[name])
