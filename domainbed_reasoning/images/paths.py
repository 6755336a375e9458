"""Many paths in little memory.

A million Python strings are over 100 MB, of which every worker of a loader gets its own copy as soon as it looks at
them, for looking at an object changes its reference count. Here they are one block of bytes that processes share.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class Paths(Sequence[str]):
    """A sequence of paths that grows at its end.

    Args:
        paths: as Python has them, bytes that are not UTF-8 as surrogate escapes.
    """

    def __init__(self, paths: Iterable[str] = ()):
        self._block, self._ends = bytearray(), array("q", [0])
        for path in paths:
            self.append(path)

    def append(self, path: str) -> None:
        """Add a path."""
        self._block += path.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._block))

    def __len__(self) -> int:
        """Return the number of paths."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return a path, or several."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._block[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """Yield the paths."""
        start = 0
        for end in itertools.islice(self._ends, 1, None):
            yield self._block[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        """Return whether another sequence has the same paths."""
        if isinstance(other, Paths):
            return (self._block, self._ends) == (other._block, other._ends)
        return isinstance(other, list | tuple) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show the number of paths."""
        return f"Paths({len(self):,})"

    def digest(self) -> str:
        """Return the SHA-256 of the paths and of where each ends."""
        return hashlib.sha256(self._ends.tobytes() + self._block).hexdigest()
