"""Wall time of a process by part, from its start; standard library only, so that the imports of all else are seen."""

from __future__ import annotations

import functools
import importlib.machinery
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

IMPORTS, REST = "imports", "rest"


class Parts:
    """Seconds by part; a part inside of another pauses it.

    Args:
        started: time of the process's start, in seconds since the epoch; what passed since then counts as imports.

    Attributes:
        seconds: of each part so far, the running ones left out.
    """

    def __init__(self, started: float):
        self.started = started
        self.seconds: Counter[str] = Counter({IMPORTS: time.time() - started})
        self._running = [REST]
        self._since = time.perf_counter()

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as a part."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def watch(self, owner: Any, function: str, name: str) -> None:
        """Count the calls of a function or method as a part."""
        called = getattr(owner, function)

        @functools.wraps(called)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return called(*args, **kwargs)

        setattr(owner, function, timed)

    def watch_imports(self) -> None:
        """Count the execution of modules as imports, wherever they are imported."""
        self.watch(importlib.machinery.SourceFileLoader, "exec_module", IMPORTS)

    def since_start(self) -> float:
        """Return the seconds since the process was started."""
        return time.time() - self.started

    def finished(self) -> dict[str, float]:
        """Return the seconds of each part until now."""
        self._turn()
        return dict(self.seconds)


def shares(seconds: dict[str, float], wall: float) -> str:
    """Return what share of a process's wall time each part took, the longest first; its end is part of the rest.

    Args:
        seconds: by part.
        wall: seconds from the process's start to its end.
    """
    complete = {**seconds, REST: wall - sum(value for name, value in seconds.items() if name != REST)}
    ordered = sorted(complete.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / wall:.0%}" for name, value in ordered)
