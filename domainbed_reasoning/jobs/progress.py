"""Prints the progress of updates and evaluations once a minute: DomainBed prints nothing until they have completed.

A launcher that shows a bar for each job names a file in the environment variable `VARIABLE`: it contains the current
task, the number of completed units and their total, as JSON.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from tqdm import tqdm

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

VARIABLE = "DOMAINBED_REASONING_PROGRESS_FILE"
_EVERY_SECONDS = 60.0
_FILE_EVERY_SECONDS = 1.0


class ProgressLog:
    """Prints the progress of a task and the remaining time, at most once a minute, and reports it to the launcher.

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
        self._printed = self._written = time.monotonic()

    def add(self, count: int, seconds: float) -> None:
        """Count completed units.

        Args:
            count: number of units.
            seconds: time that they took, excluding time between calls.
        """
        self._done += count
        self._seconds += seconds
        now = time.monotonic()
        if (path := os.environ.get(VARIABLE)) and now - self._written >= _FILE_EVERY_SECONDS:
            self._written = now
            try:
                replace_text(Path(path), json.dumps({"task": self.what, "done": self._done, "total": self.total}))
            except OSError:  # the launcher has ended
                del os.environ[VARIABLE]
        if now - self._printed >= _EVERY_SECONDS and self._done < self.total:
            self._printed = now
            meter = tqdm.format_meter(self._done, self.total, self._seconds, unit=self.unit, ncols=0)
            _log.info(f"{self.what}: {meter}")
