"""Versions of the formats of persisted files: chain files, task.json, exported adapters and saved progress.

A file has its version under `KEY` (a chain file on each line). A file without one was written before versions were
recorded and has version 1. Every version up to the current one is read, and written back as the current one; a newer
one is refused, since it may mean something else.
"""

from __future__ import annotations

from typing import Any

KEY = "format_version"
UPGRADE = "Upgrade domainbed-reasoning: `git pull` and `pip install .` in its checkout"


def newer_than(current: int, version: Any) -> str:
    """Return that a file is of a newer version than ``current``; empty if it is not.

    Args:
        current: version that this package writes, from 1.
        version: of the file; None where it has none.
    """
    if isinstance(version, int) and version > current:
        return f"its format has version {version}, and this domainbed-reasoning reads up to version {current}"
    return ""
