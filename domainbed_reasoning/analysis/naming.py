"""Finds the first mention of the class that a chain concludes with, which the conclusion may then copy."""

from __future__ import annotations

import re


def first_naming(text: str, name: str, end: int) -> tuple[int, int] | None:
    """Return the first position of ``name`` in ``text`` before ``end`` as a separate word; None if there is none.

    Never matches inside words (``cat`` in ``located``); ignores case and treats spaces and underscores as equal.

    Args:
        text: of a chain, or a prefix of one.
        name: its conclusion.
        end: positions from here on are ignored.

    Returns:
        Start and end positions in ``text``.
    """
    words = r"[\s_]+".join(map(re.escape, name.replace("_", " ").split()))
    found = re.search(rf"(?<!\w){words}(?!\w)", text[:end], re.IGNORECASE) if words else None
    return found.span() if found else None
