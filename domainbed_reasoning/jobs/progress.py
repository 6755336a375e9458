"""Prints the progress of updates and evaluations once a minute: DomainBed prints nothing until they have completed."""

from __future__ import annotations

import time

from tqdm import tqdm

from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_EVERY_SECONDS = 60.0


class ProgressLog:
    """Prints the progress of a task and the remaining time, at most once a minute.

    Args:
        what: description of the task.
        total: number of units.
        unit: name of a unit.
    """

    def __init__(self, what: str, total: int, unit: str):
        self.what = what
        self.total = total
        self.unit = unit
        self._done = 0
        self._seconds = 0.0
        self._printed = time.monotonic()

    def add(self, count: int, seconds: float) -> None:
        """Count completed units.

        Args:
            count: number of units.
            seconds: time that they took, excluding time between calls.
        """
        self._done += count
        self._seconds += seconds
        now = time.monotonic()
        if now - self._printed >= _EVERY_SECONDS and self._done < self.total:
            self._printed = now
            meter = tqdm.format_meter(self._done, self.total, self._seconds, unit=self.unit, ncols=0)
            _log.info(f"{self.what}: {meter}")
