"""Finds where a chain first names the class that it concludes with, which the conclusion can then copy."""

from __future__ import annotations

import re


def first_naming(text: str, name: str, end: int) -> tuple[int, int] | None:
    """Return where ``name`` first stands in ``text`` before ``end``, as a word of its own; None where it does not.

    Never by containment, ``cat`` is in ``located``; in whatever case, with spaces or underscores between its words.

    Args:
        text: of a chain, or of its beginning.
        name: what it concludes with.
        end: positions from here on do not count.

    Returns:
        the positions of its first character and after its last one, in the text as it is given.
    """
    words = r"[\s_]+".join(map(re.escape, name.replace("_", " ").split()))
    found = re.search(rf"(?<!\w){words}(?!\w)", text[:end], re.IGNORECASE) if words else None
    return found.span() if found else None
