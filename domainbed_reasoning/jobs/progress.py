"""A line a minute about work of which DomainBed says nothing until it has ended: hours of updates, then of answers."""

from __future__ import annotations

import time

from tqdm import tqdm

_EVERY_SECONDS = 60.0


class ProgressLog:
    """Says how far a piece of work is, and how long the rest will take, at most once a minute.

    Args:
        what: the work, as a person calls it.
        total: of its units.
        unit: of the work.
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what = what
        self.total = total
        self.unit = unit
        self._done = 0
        self._seconds = 0.0
        self._said = time.monotonic()

    def add(self, count: int, seconds: float) -> None:
        """Count units as done.

        Args:
            count: of them.
            seconds: that they took; time between calls is another's.
        """
        self._done += count
        self._seconds += seconds
        now = time.monotonic()
        if now - self._said >= _EVERY_SECONDS and self._done < self.total:
            self._said = now
            meter = tqdm.format_meter(self._done, self.total, self._seconds, unit=self.unit, ncols=0)
            print(f"{self.what}: {meter}", flush=True)
