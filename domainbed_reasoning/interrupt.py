"""Ctrl-C ends a process with one sentence in the place of a traceback."""

from __future__ import annotations

import functools
import sys
from types import TracebackType


@functools.cache
def end_with(sentence: str) -> None:
    """Have a KeyboardInterrupt that nobody catches print ``sentence``; the process ends by SIGINT, code 130 in a shell.

    Args:
        sentence: what to do next.
    """
    before = sys.excepthook

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print(f"\n{sentence}", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = say
