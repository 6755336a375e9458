"""Decode greedy answers in slots that are refilled as answers end, without synchronizing for a token.

All prompts of a question have the same length, so every answer starts in the same column of the key/value cache. When
an eighth of the slots is free, the next prompts are prefilled into them as one batch. On a GPU the host launches a step
before it reads the tokens of the previous one; it notices the end of an answer one step late and drops what the slot
has generated since. On the CPU, where this gains nothing, tokens are read at once.

On CUDA, decoding steps replay graphs (`StepGraphs`). Models quantized by bitsandbytes, and steps that cannot be
captured, run without.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from domainbed_reasoning.mllm.language_model import LanguageModel
from domainbed_reasoning.mllm.slots import Slots, keep, slot_cache
from domainbed_reasoning.mllm.transfer import is_asynchronous, moved, read_later
from domainbed_reasoning.mllm.tree_masks import tree_positions
from domainbed_reasoning.terminal import counted

_FREE = 8  # free slots are refilled or dropped once they are an eighth of all
FEWEST = 64  # slots for which a copy for inference leaves memory
_SHARE = 0.7  # of free memory, for keys and values
_PREFILLED = 2**14  # tokens of prompts at a time: those of many tiles need more memory than their keys and values
_COLUMNS = 128  # graphs attend to a multiple of so many columns


class Ending(Protocol):
    """The part of `TextGenerator` that decides when an answer ends."""

    mllm: LanguageModel

    @property
    def suppressed_tokens(self) -> list[int]:
        """Tokens that an answer may not contain."""
        ...

    @property
    def closing_tokens(self) -> Collection[int]:
        """Tokens after which `has_ended` is called."""
        ...

    def has_ended(self, answer: list[int]) -> bool:
        """Return whether the answer is complete."""
        ...


def can_decode(mllm: LanguageModel) -> bool:
    """Return whether every layer of a model caches only keys and values, and takes boolean masks.

    Other layers (recurrent states, sliding windows of families without masks for them) need transformers' own caches.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    text = mllm.base.config.get_text_config()
    kinds = {type(layer) for layer in DynamicCache(config=text).layers}
    served = {DynamicLayer, *([DynamicSlidingWindowLayer] if mllm.family.tree == "windows" else [])}
    return bool(kinds) and kinds <= served and "sdpa" in str(text._attn_implementation)


def slots_that_fit(slots: int, row: int, free: int | None) -> int:
    """Return the number of slots, halved until their keys and values fit, with a warning if it is fewer than wanted.

    Args:
        slots: the number wanted.
        row: bytes of a slot.
        free: bytes on the device; None if unknown.
    """
    fitting = slots
    while free is not None and fitting > 1 and fitting * row > _SHARE * free:
        fitting //= 2
    if fitting < slots:
        warnings.warn(
            f"Generating {counted(fitting, 'answer')} at a time, not {slots} (hparam eval_batch): {free or 0:,} bytes "
            f"are free, and each takes {row:,}.",
            stacklevel=2,
        )
    return fitting


def prompts_at_a_time(prompt: int) -> int:
    """Return how many prompts of so many tokens are prefilled in one pass."""
    return max(1, _PREFILLED // prompt)


def prefill_bytes(mllm: LanguageModel, question: str, rows: int) -> int:
    """Return about how many bytes prefilling takes beside the cache.

    Args:
        mllm: the model.
        question: about each image.
        rows: prompts in one pass.
    """
    prompt = mllm.prompt(question)["input_ids"].shape[1]
    return rows * prompt * numbers_a_token(mllm.base.config) * int(next(mllm.base.parameters()).element_size())


def numbers_a_token(config: Any) -> int:
    """Return about how many numbers a decoder layer holds for a token: its MLP's three inner ones, four outer ones."""
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return 3 * int(max(inner) if isinstance(inner, list | tuple) else inner) + 4 * int(text.hidden_size)


class Decoder:
    """Generates greedy answers to one question about any number of images.

    Args:
        generator: the model's generator, which decides when an answer ends.
        question: asked about every image.
        max_new_tokens: maximum length of an answer in tokens.
        slots: number of answers generated at a time.
    """

    def __init__(self, generator: Ending, question: str, max_new_tokens: int, slots: int):
        self.generator, self.question, self.most = generator, question, max_new_tokens
        mllm = self.mllm = generator.mllm
        self.prompt = mllm.prompt(question)["input_ids"].to(mllm.device)
        self.head: Callable[[torch.Tensor], torch.Tensor] = mllm.base.get_output_embeddings()
        text = mllm.base.config.get_text_config()
        length = self.prompt.shape[1]
        self.late = is_asynchronous(mllm.device)
        self.slots = Slots(slots, length, length + max_new_tokens, mllm.device)
        self.cache = slot_cache(text.num_hidden_layers, self.slots)
        self.tokens = torch.zeros(slots, dtype=torch.long, device=mllm.device)  # the latest of each slot
        self.columns = torch.arange(self.slots.width, device=mllm.device)
        self.window = text.sliding_window if mllm.family.tree == "windows" else 0
        size = int(mllm.base.get_output_embeddings().weight.shape[0])
        never = torch.tensor([token for token in generator.suppressed_tokens if token < size], dtype=torch.long)
        (self.never,) = moved((never,), mllm.device)
        self.positions: torch.Tensor | None = None  # position ids of every column
        self.ropes = _dynamic_ropes(mllm.base, self.slots.width)
        self.graphs = StepGraphs() if mllm.device.type == "cuda" and not mllm.quantized else None
        self.answers: list[tuple[int, list[int]] | None] = [None] * slots  # image number and tokens; None if free
        self.begun = [0] * slots  # step at which each slot was filled
        self.steps = 0

    @torch.no_grad()
    def write(self, images: Iterable[torch.Tensor]) -> Iterator[tuple[int, list[int]]]:
        """Yield the number of an image and the tokens of its answer, in the order in which answers end.

        Args:
            images: ``(3, H, W)`` each, consumed as slots become free.

        Raises:
            RuntimeError: the model keeps no cache, as under gradient checkpointing in training mode.
        """
        waiting = enumerate(images)
        following = next(waiting, None)
        while True:
            free = self._free()
            if following is not None and len(free) * _FREE >= self.slots.rows:
                new = [following, *itertools.islice(waiting, len(free) - 1)]
                part = prompts_at_a_time(self.prompt.shape[1])
                for begin in range(0, len(new), part):
                    self._fill(free[begin : begin + len(new[begin : begin + part])], new[begin : begin + part])
                following = next(waiting, None)
            if len(self._free()) == self.slots.rows:
                return
            if self.late and following is None:
                self._give_up()
            read = read_later(self.tokens[: self.slots.rows])
            if not self.late:
                yield from self._take(read())
                if following is None:
                    self._give_up()
            if len(self._free()) < self.slots.rows:
                self._step()
            if self.late:
                yield from self._take(read())

    def _free(self) -> list[int]:
        return [slot for slot in range(self.slots.rows) if self.answers[slot] is None]

    def _fill(self, free: Sequence[int], new: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Prefill the prompts of new images into free slots, and choose the first token of each answer."""
        mllm, n = self.mllm, len(new)
        encoded = mllm.encode(torch.stack([image for _, image in new]))
        (slots,) = moved((torch.tensor(free),), mllm.device)
        if self.positions is None:
            self.positions = tree_positions(mllm, self.columns[None], self.question, encoded)
        with self.slots.filled(slots):
            prompts = self.prompt.expand(n, -1)
            hidden = mllm.core(n, self.question, prompts, encoded, **mllm.keeping(self.cache))[0]
        if not self.cache.layers[0].is_initialized:
            raise RuntimeError("gradient checkpointing disables the cache in training mode: call eval() first.")
        self.tokens.index_copy_(0, slots, self._chosen(hidden))
        for slot, (number, _) in zip(free, new, strict=True):
            self.answers[slot], self.begun[slot] = (number, []), self.steps

    def _give_up(self) -> None:
        """Drop free slots, as no image is left; with graphs, half of all slots at a time, to keep shapes few."""
        free, rows = self._free(), self.slots.rows
        if len(free) * _FREE < rows or len(free) == rows:
            return
        if self.graphs is not None:
            while rows >= 2 * (self.slots.rows - len(free)):
                rows //= 2
            if rows == self.slots.rows:
                return
        else:
            rows -= len(free)
        spare = rows - (self.slots.rows - len(free))
        given_up = set(free[spare:])
        kept = [slot for slot in range(self.slots.rows) if slot not in given_up]
        (index,) = moved((torch.tensor(kept),), self.mllm.device)
        keep(self.cache, self.slots, index)
        self.tokens[:rows] = self.tokens.index_select(0, index)
        self.answers = [self.answers[slot] for slot in kept]
        self.begun = [self.begun[slot] for slot in kept]

    def _take(self, tokens: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Append each slot's token to its answer; yield the answers that have ended, and free their slots."""
        for slot, token in enumerate(tokens):
            answer = self.answers[slot]
            if answer is None:
                continue
            answer[1].append(token)
            ended = token in self.generator.closing_tokens and self.generator.has_ended(answer[1])
            if ended or len(answer[1]) == self.most:
                self.answers[slot] = None
                yield answer

    def _step(self) -> None:
        """Decode one token per slot, without synchronizing."""
        slots = self.slots
        counts = {self.steps - self.begun[slot] for slot in range(slots.rows) if self.answers[slot] is not None}
        longest = slots.prompt + max(counts) + 1
        if self.graphs is not None:
            slots.length = min(-(-longest // _COLUMNS) * _COLUMNS, slots.width)
            self.graphs.run((slots.rows, slots.length), self._compute)
        else:
            slots.length = min(longest, slots.width)
            slots.column = slots.length - 1 if len(counts) == 1 else None
            self._compute()
        self.steps += 1

    def _compute(self) -> None:
        """Compute a step in place: it reads and writes the same memory each time, so that a graph can replay it."""
        slots, mllm = self.slots, self.mllm
        assert self.positions is not None
        at, rows = slots.at[: slots.rows], slots.rows
        if slots.column is not None and not self.window:
            positions = self.positions[..., slots.column : slots.column + 1]
            seen: dict[str, Any] = {}
            positions = positions.expand(*positions.shape[:-2], rows, 1)
        else:
            positions = self.positions[..., 0, :].index_select(-1, at)[..., None]
            seen = {"attention_mask": self._masks(at)}
        with _static(self.ropes):
            hidden = mllm.base.model(
                input_ids=self.tokens[:rows, None], position_ids=positions, **seen, **mllm.keeping(self.cache)
            )[0]
        self.tokens[:rows] = self._chosen(hidden)
        at.add_(1).clamp_(max=slots.width - 1)  # free slots go on until they are refilled

    def _masks(self, at: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the attention mask of each slot's token, ``(rows, 1, 1, length)``, as the family takes it."""
        columns, own = self.columns[: self.slots.length], at[:, None, None, None]
        full = columns <= own
        if not self.window:
            return full
        return {"full_attention": full, "sliding_attention": full & (own - columns < self.window)}

    def _chosen(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the most likely next token of each row, ``(n,)``, among those allowed."""
        scores = self.head(hidden[:, -1]).float()
        return scores.index_fill_(-1, self.never, -torch.inf).argmax(-1)


class StepGraphs:
    """CUDA graphs of decoding steps, one per shape.

    The first step of a shape runs eagerly on a side stream, as warm-up; the second is captured and replayed.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], Any] = {}
        self._pool: Any = None  # shared: no step's memory outlives it
        self._fails = False

    def run(self, shape: tuple[int, int], step: Callable[[], None]) -> None:
        """Run a step, eagerly or by its graph.

        Args:
            shape: determines the sizes of all tensors in the step.
            step: runs it; inputs and outputs are the same tensors each time.
        """
        if self._fails:
            step()
        elif shape not in self._graphs:
            if not self._warms_up(step):
                step()
            self._graphs[shape] = None
        else:
            if self._graphs[shape] is None:
                self._graphs[shape] = self._captured(step)
            graph = self._graphs[shape]
            step() if graph is None else graph.replay()

    def _warms_up(self, step: Callable[[], None]) -> bool:
        """Run a step on a stream of its own; return whether it waits for the GPU nowhere, as capturing requires.

        A capture that fails leaves PyTorch's allocator and generators in it; so it is not tried where it would.
        """
        current, stream, mode = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        stream.wait_stream(current)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(stream):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._fail(error)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(stream)
        return not self._fails

    def _fail(self, error: Exception) -> None:
        self._fails = True
        warnings.warn(
            f"A decoding step cannot be captured as a CUDA graph ({error}): decoding runs without, and slower.",
            stacklevel=3,
        )

    def _captured(self, step: Callable[[], None]) -> Any:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch.cuda.graph does not if ending the capture fails too
            self._fail(error)
            return None
        return graph


def _dynamic_ropes(network: Any, longest: int) -> list[Any]:
    """Return the model's modules of dynamic rotary embeddings that are static up to this position.

    Up to the trained length, dynamic scaling (InternVL3 has it) changes nothing; but transformers reads the largest
    position back from the GPU in every forward pass to compare it.
    """
    return [
        module
        for module in network.modules()
        if "dynamic" in str(getattr(module, "rope_type", ""))
        and isinstance(module.rope_type, str)
        and longest <= module.original_max_seq_len == module.max_seq_len_cached
    ]


@contextlib.contextmanager
def _static(ropes: Sequence[Any]) -> Iterator[None]:
    kinds = [module.rope_type for module in ropes]
    for module in ropes:
        module.rope_type = "default"
    try:
        yield
    finally:
        for module, kind in zip(ropes, kinds, strict=True):
            module.rope_type = kind
