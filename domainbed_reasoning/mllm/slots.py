"""Keys and values of answers that are being written: a row a slot, allocated once, each with a position of its own.

A slot whose answer has ended takes the next prompt while the others go on. transformers' own means do not serve:
its StaticCache has one length for all rows, and its continuous batching (`generate_batch`) takes no images (5.24).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


class Slots:
    """Which slots and columns the layers of a `slot_cache` write next, and how far they are read.

    Args:
        count: of slots.
        prompt: tokens of every prompt.
        width: columns, of a prompt and its answer.
        device: of keys and values.

    Attributes:
        rows: the first so many slots are in use.
        length: columns that a decoding step reads, from the first.
        at: the column that each slot writes next, ``(count,)``, on the device.
        column: that column where it is the same in all slots, and known to the host; else None.
        filling: slots that are being filled, ``(n,)``, on the device; None in a decoding step.
    """

    def __init__(self, count: int, prompt: int, width: int, device: torch.device):
        self.rows, self.prompt, self.width = count, prompt, width
        self.count, self.length = count, prompt
        self.at = torch.full((count,), prompt, device=device)
        self.column: int | None = None
        self.filling: torch.Tensor | None = None
        self.every = torch.arange(count, device=device)

    @contextlib.contextmanager
    def filled(self, slots: torch.Tensor) -> Iterator[None]:
        """Take the keys and values of prompts into these slots, ``(n,)`` on the device, instead of a step's."""
        self.filling = slots
        try:
            yield
        finally:
            self.filling = None
        self.at.index_fill_(0, slots, self.prompt)


def slot_cache(layers: int, slots: Slots) -> Any:
    """Return a transformers `Cache` of so many layers; its keys and values are ``(slots, heads, width, size)`` each."""
    from transformers import Cache

    return Cache(layers=[_layer_class()(slots) for _ in range(layers)])


def keep(cache: Any, slots: Slots, kept: torch.Tensor) -> None:
    """Move the slots ``kept``, ``(n,)`` in order, on the device, to the front; the others are given up."""
    n = len(kept)
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            part[:n, :, : slots.length].copy_(part[:, :, : slots.length].index_select(0, kept))
    slots.at[:n] = slots.at.index_select(0, kept)
    slots.rows = n


@functools.cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class SlotLayer(DynamicLayer):
        """One layer's keys and values; masks follow from its length, which is the longest row's."""

        def __init__(self, slots: Slots):
            super().__init__()  # type: ignore[no-untyped-call]
            self.slots = slots

        def get_seq_length(self) -> int:
            """Return the columns before those that are being written."""
            return 0 if self.slots.filling is not None else self.slots.length - 1

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """Write prompts, or a token of each slot, and return what they attend to."""
            slots, new = self.slots, (key_states, value_states)
            if not self.is_initialized:
                self.keys, self.values = (
                    part.new_zeros(slots.count, part.shape[1], slots.width, part.shape[-1]) for part in new
                )
                self.is_initialized = True
            held: Any = (self.keys, self.values)
            if slots.filling is not None:
                for part, states in zip(held, new, strict=True):
                    part[:, :, : slots.prompt].index_copy_(0, slots.filling, states)
                return new
            rows = slots.rows
            for part, states in zip(held, new, strict=True):
                if slots.column is not None:
                    part[:rows, :, slots.column] = states[:, :, 0]
                else:
                    part[slots.every[:rows], :, slots.at[:rows]] = states[:, :, 0]
            return tuple(part[:rows, :, : slots.length] for part in held)

    return SlotLayer
