"""Writing answers token by token: a batch that shrinks as its rows end, over keys and values that grow in place.

All prompts of a question are equally long, so rows never need padding and can leave the batch at any time. transformers
prepares everything else (its `generate` calls this loop as `custom_generate`): the processors of logits, from the
checkpoint's own generation config, are its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_GROWTH = 128  # tokens by which the room for keys and values grows
_LEAVE = 8  # rows leave the batch when an eighth of it has ended


def write_tokens(
    prefill: Callable[[Any], torch.Tensor],
    step: Callable[[torch.Tensor, int, Any], torch.Tensor],
    ended: Callable[[list[int]], bool],
    may_end: torch.Tensor,
) -> Callable[..., list[list[int]]]:
    """Return the loop for transformers' `generate(custom_generate=…)`; it returns each row's tokens.

    Args:
        prefill: reads the prompts into a cache; logits of the next token, ``(n, vocabulary)``.
        step: reads a token of each row, ``(m, 1)``, the so many-th after the prompt, on top of a cache; logits.
        ended: whether a row of tokens is an answer's end.
        may_end: True for tokens after which `ended` is asked, ``(vocabulary,)``.
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
        kinds = _growing_layers()
        cache.layers = [kinds[type(layer)]() if type(layer) in kinds else layer for layer in cache.layers]
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
            check = may_end[tokens[:, 0]].tolist()
            for row, token in enumerate(tokens[:, 0].tolist()):
                if open_rows[row]:
                    answer = written[running[row]]
                    answer.append(token)
                    open_rows[row] = not (check[row] and ended(answer))
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


@functools.cache
def _growing_layers() -> dict[type, type]:
    """Return, for each kind of transformers' cache layer that copies all it holds at every token, one that does not."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values with room for more tokens."""

        _room: tuple[torch.Tensor, torch.Tensor] | None = None

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            old, new = self.get_seq_length(), key_states.shape[-2]
            if self._room is None or old + new > self._room[0].shape[-2]:
                shape = list(key_states.shape)
                shape[-2] = old + new + _GROWTH
                rooms = (key_states.new_empty(shape), value_states.new_empty([*shape[:-1], value_states.shape[-1]]))
                if old:
                    rooms[0][..., :old, :], rooms[1][..., :old, :] = self.keys, self.values
                self._room = rooms
            self._room[0][..., old : old + new, :] = key_states
            self._room[1][..., old : old + new, :] = value_states
            self.keys, self.values = (room[..., : old + new, :] for room in self._room)
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            if self._room is not None:
                length = self.get_seq_length()
                self._room = (self._room[0][indices], self._room[1][indices])
                self.keys, self.values = (room[..., :length, :] for room in self._room)

    return {DynamicLayer: GrowingLayer}
