"""Ctrl-C prints one sentence instead of a traceback."""

from __future__ import annotations

import functools
import sys
from types import TracebackType


@functools.cache
def end_with(sentence: str) -> None:
    """Make an uncaught KeyboardInterrupt print ``sentence``. The process still ends by SIGINT, code 130 in a shell.

    Args:
        sentence: what the user can do next.
    """
    original = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"\n{sentence}", file=sys.stderr, flush=True)
        else:
            original(kind, error, trace)

    sys.excepthook = excepthook
