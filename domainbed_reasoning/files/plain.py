"""Untrusted files: opened only if they are regular files, and read up to a size limit.

A path may name a FIFO without a writer, an endless device, a socket, a folder, or a sparse file of a terabyte. All
files that this process did not write are opened here.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

# Records of a job: JSON lines of one or two kilobytes, one an evaluation.
MAX_LOG_BYTES = 64 << 20
# JSON that describes something: a job's task, a model's config, an export's answers.
MAX_DESCRIPTION_BYTES = 8 << 20
# An image file: `images.decode.MAX_PIXELS` of 16 bits and four channels are 716 MB.
MAX_IMAGE_BYTES = 1 << 30

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "a named pipe"),
    (stat.S_ISSOCK, errno.EINVAL, "a socket"),
    (lambda mode: True, errno.EINVAL, "a device"),
)


def open_plain(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """Open a regular file for reading, without blocking on FIFOs.

    Args:
        path: of the file; links are followed.
        most: its maximum size in bytes; None for a file that is streamed.

    Raises:
        OSError: it is missing, unreadable, not a regular file, or larger; see ``strerror``.
    """
    _require_plain(os.stat(path), path, most)  # opening a device may have side effects
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        _require_plain(os.fstat(descriptor), path, most)  # it may have been replaced
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_plain_text(
    path: str | os.PathLike[str], encoding: str = "utf-8", errors: str = "strict", newline: str | None = None
) -> io.TextIOWrapper:
    """Open a regular file of any size as text, to be read in parts.

    Raises:
        OSError: as `open_plain`.
    """
    return io.TextIOWrapper(open_plain(path), encoding, errors, newline)


def read_plain(path: str | os.PathLike[str], most: int) -> bytes:
    """Return the contents of a regular file of at most ``most`` bytes.

    Raises:
        OSError: as `open_plain`.
    """
    with open_plain(path, most) as file:
        data = file.read(most + 1)  # some files, e.g. in /proc, report no size
    if len(data) > most:
        raise _too_large(path, most)
    return data


def read_plain_text(path: str | os.PathLike[str], most: int = MAX_DESCRIPTION_BYTES, errors: str = "strict") -> str:
    """Return the text of a regular file of at most ``most`` bytes.

    Raises:
        OSError: as `open_plain`.
        UnicodeDecodeError: it is not UTF-8, if ``errors`` is ``strict``.
    """
    return read_plain(path, most).decode("utf-8", errors)


def plain_lines(path: str | os.PathLike[str], longest: int, most: int = MAX_LOG_BYTES) -> Iterator[str]:
    """Yield the lines of a text of at most ``most`` bytes; lines are truncated to ``longest`` bytes.

    Raises:
        OSError: as `open_plain`.
    """
    with open_plain(path, most) as file:
        left = most
        while left > 0 and (line := file.readline(longest)):
            left -= len(line)
            rest = line
            while left > 0 and not rest.endswith(b"\n") and (rest := file.readline(longest)):
                left -= len(rest)
            yield line.decode("utf-8", "replace")


def _require_plain(found: os.stat_result, path: str | os.PathLike[str], most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        number, kind = next((number, kind) for is_it, number, kind in _KINDS if is_it(found.st_mode))
        raise OSError(number, f"it is {kind}, not a regular file", os.fspath(path))
    if most is not None and found.st_size > most:
        raise _too_large(path, most)


def _too_large(path: str | os.PathLike[str], most: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {most:,} bytes", os.fspath(path))
