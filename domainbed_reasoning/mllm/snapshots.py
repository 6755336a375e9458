"""Frozen models for inference during training: copies with merged adapters where memory allows.

DomainBed evaluates the current weights; a SARR round labels with the weights from its start. Both generate chains with
a copy whose adapters are merged, which is faster, if a second set of weights fits in memory; otherwise with the trained
model itself, whose adapters are swapped for the time being. Either way answers are cached by the adapters' digest, so
that a round generates no chain that the evaluation before it has generated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch

from domainbed_reasoning.mllm.devices import allocated_memory, free_memory, memory_is_measured, peak_memory
from domainbed_reasoning.mllm.generation_cache import state_of
from domainbed_reasoning.mllm.model import MLLM
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_SHARE = 0.8  # of free memory that larger passes may take: other batches have longer chains
Frozen = Callable[[], contextlib.AbstractContextManager[MLLM]]  # a context in which the frozen model is available


class Snapshots:
    """Creates and owns the copies of one model.

    Args:
        mllm: the model that is trained.
        cache_bytes: bytes for generating one evaluation batch of chains, see `MLLM.generation_bytes`.

    Attributes:
        labels_by_copy: whether a round's labeler is a copy; None until an update has been measured.
        training_peak: bytes that an update allocates; None until measured.
    """

    def __init__(self, mllm: MLLM, cache_bytes: int):
        self.mllm = mllm
        self.cache_bytes = cache_bytes
        self.labels_by_copy: bool | None = None
        self.training_peak: int | None = None if memory_is_measured(mllm.device) else 0
        self._current: MLLM | None = None
        self._labelers: list[MLLM] = []  # at most one
        if not mllm.adapters():
            mllm.frozen_state = state_of(())

    def current(self) -> MLLM:
        """Return the model that answers with the current weights: a copy if one fits, else the model itself."""
        if not self.mllm.adapters():
            return self.mllm
        if self._current is None:
            self._labelers.clear()  # makes room; copied anew if the round continues
            fits = self.mllm.fits_a_copy(self.cache_bytes)
            self._current = self.mllm.copy_for_inference() if fits else self.mllm
            if not fits:
                self.mllm.frozen_state = state_of(self.mllm.adapters().values())
        return self._current

    def answering(self, adapters: Mapping[str, torch.Tensor] | None = None) -> contextlib.AbstractContextManager[MLLM]:
        """Return, for a while, the model that answers.

        Args:
            adapters: in place of the present ones; the same until `weights_change`. None keeps the present ones.
        """
        if adapters is None:
            return contextlib.nullcontext(self.current())
        if self._current is None:
            with self.mllm.with_adapters(adapters):
                self.current()
        if self._current is self.mllm:  # no copy fits
            return self.mllm.with_adapters(adapters)
        assert self._current is not None
        return contextlib.nullcontext(self._current)

    def weights_change(self) -> None:
        """Drop the copy of the current weights, which are about to change."""
        self._current = None
        if self.mllm.adapters():
            self.mllm.frozen_state = None

    def update_done(self, micro_batch: int, samples: int) -> None:
        """Measure what training allocates, after the first update, before any evaluation adds a copy.

        Args:
            micro_batch: samples of a forward and backward pass.
            samples: of the update on this rank.
        """
        if self.training_peak is not None:
            return
        peak = peak_memory(self.mllm.device)
        self.training_peak = int(1.1 * peak)
        fitting = min(samples, self._fitting(micro_batch, peak))
        if fitting >= 2 * micro_batch:
            _log.info(
                "micro_batch %d: about %d images at a time would fit, beside a copy for inference. The same updates in "
                "fewer passes are faster where the GPU waits for the host, which launches every pass.",
                micro_batch,
                fitting,
            )

    def _fitting(self, micro_batch: int, peak: int) -> int:
        """Return how many samples a pass has memory for, if one of ``micro_batch`` samples reaches ``peak``."""
        used, free = allocated_memory(self.mllm.device), free_memory(self.mllm.device)
        if free is None or peak <= used:
            return 0
        room = free if self.mllm.quantized else free - 1.1 * self.mllm.weight_bytes()
        return max(0, int(_SHARE * room * micro_batch / (peak - used)))

    def freeze(self) -> Frozen:
        """Return the model with its current weights, unaffected by later training.

        Whether a copy fits beside training is known after an update. A round without an earlier update labels its
        first batch by swapping adapters; all rounds of a job follow the first decision. If they label by copies, the
        copy that the evaluation before the round made is kept.
        """
        adapters = {name: weight.detach().clone() for name, weight in self.mllm.adapters().items()}
        state = state_of(adapters.values())
        current = self._current if self.labels_by_copy and self._current is not self.mllm else None
        copies = self._labelers = [current] if current is not None and current.frozen_state == state else []

        @contextlib.contextmanager
        def exchanged() -> Iterator[MLLM]:
            with self.mllm.with_adapters(adapters) as then:
                before, then.frozen_state = then.frozen_state, state
                try:
                    yield then
                finally:
                    then.frozen_state = before

        def frozen() -> contextlib.AbstractContextManager[MLLM]:
            if self.labels_by_copy is None and self.training_peak is not None:
                self.labels_by_copy = self.mllm.fits_a_copy(self.cache_bytes, self.training_peak)
            if not self.labels_by_copy:
                return exchanged()
            if not copies:
                with exchanged() as then:
                    copies.append(then.copy_for_inference())
            return contextlib.nullcontext(copies[0])

        return frozen
