"""Models with frozen weights that answer while another is trained: merged copies where memory allows.

DomainBed evaluates the model as it is now; a SARR round labels with the model as it was when the round began. Both
write their chains with a copy whose adapters are merged, which is faster, if a second set of weights fits; otherwise
with the trained model itself, its adapters exchanged for as long as it takes. Either way, what these weights have
written is remembered: a round that begins with the weights of an evaluation writes none of its chains again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from domainbed_reasoning.mllm.generation_cache import state_of
from domainbed_reasoning.mllm.model import MLLM

Frozen = Callable[[], contextlib.AbstractContextManager[MLLM]]  # gives the frozen model for a while


class Snapshots:
    """Decides about copies of one model, and owns them.

    Args:
        mllm: the model that is trained.
        cache_bytes: keys and values that writing an evaluation batch of chains needs, see `MLLM.cache_bytes`.

    Attributes:
        labels_by_copy: whether a round's labeler is a copy; None until an update has shown how much training needs.
        training_peak: bytes that an update allocates; None until it has been measured.
    """

    def __init__(self, mllm: MLLM, cache_bytes: int):
        self.mllm = mllm
        self.cache_bytes = cache_bytes
        self.labels_by_copy: bool | None = None
        self.training_peak: int | None = 0 if mllm.device.type != "cuda" else None
        self._current: MLLM | None = None
        self._labelers: list[MLLM] = []  # at most one
        if not mllm.adapters():
            mllm.frozen_state = state_of(())

    def current(self) -> MLLM:
        """Return the model that answers for the present weights: a copy where one fits, else the model itself."""
        if not self.mllm.adapters():
            return self.mllm
        if self._current is None:
            self._labelers.clear()  # makes room; copied anew if the round continues
            fits = self.mllm.fits_a_copy(self.cache_bytes)
            self._current = self.mllm.copy_for_inference() if fits else self.mllm
            if not fits:
                self.mllm.frozen_state = state_of(self.mllm.adapters().values())
        return self._current

    def weights_change(self) -> None:
        """Forget the copy of the present weights: they are about to change."""
        self._current = None
        if self.mllm.adapters():
            self.mllm.frozen_state = None

    def update_done(self) -> None:
        """Measure what training allocates, after the first update: no evaluation has added a copy to it."""
        if self.training_peak is None:
            self.training_peak = int(1.1 * torch.cuda.max_memory_allocated(self.mllm.device))

    def freeze(self) -> Frozen:
        """Return the model as it is now, whatever is trained afterwards.

        Whether a copy fits beside training is known after an update. A round that no update came before labels its
        first batch with the adapters alone; all rounds of a job decide as its first.
        """
        adapters = {name: weight.detach().clone() for name, weight in self.mllm.adapters().items()}
        state = state_of(adapters.values())
        copies = self._labelers = []

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
