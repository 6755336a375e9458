"""A preallocated key/value cache whose rows are slots, each with its own length, refilled while others decode.

Neither of transformers' caches can do this (5.24): `StaticCache` has one length for all rows, and continuous batching
(`generate_batch`) takes no images.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


class Slots:
    """The state that all layers of a `slot_cache` share: where they write, and how far they attend.

    Args:
        count: number of slots.
        prompt: length of every prompt in tokens.
        width: length of the cache in tokens: a prompt and its answer.
        device: device of keys and values.

    Attributes:
        rows: number of slots in use, from the first.
        length: number of columns that a decoding step attends to.
        at: column that each slot writes next, ``(count,)``, on the device.
        column: the same as a number, where all slots share it and the host knows it; else None.
        filling: slots that are being prefilled, ``(n,)``, on the device; None in a decoding step.
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
        """Write prompts into these slots, ``(n,)`` on the device, instead of one token into each."""
        self.filling = slots
        try:
            yield
        finally:
            self.filling = None
        self.at.index_fill_(0, slots, self.prompt)


def slot_cache(layers: int, slots: Slots) -> Any:
    """Return a transformers `Cache` of ``layers`` layers, whose keys and values are ``(slots, heads, width, size)``."""
    from transformers import Cache

    return Cache(layers=[_layer_class()(slots) for _ in range(layers)])


def keep(cache: Any, slots: Slots, kept: torch.Tensor) -> None:
    """Move the slots ``kept``, ``(n,)``, ascending and on the device, to the front, and drop the others."""
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
        """Keys and values of one layer; its length is that of the longest row."""

        def __init__(self, slots: Slots):
            super().__init__()  # type: ignore[no-untyped-call]
            self.slots = slots

        def get_seq_length(self) -> int:
            """Return the number of columns before those being written."""
            return 0 if self.slots.filling is not None else self.slots.length - 1

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """Write prompts, or one token per slot, and return the keys and values that they attend to."""
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
