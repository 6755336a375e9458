"""Locks on open files, which the operating system gives up when their process ends, however it ends."""

from __future__ import annotations

import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_BEYOND_THE_CONTENT = 1 << 40  # Windows locks bytes, and keeps others from reading those


def lock(descriptor: int, shared: bool = False) -> None:
    """Lock an open file for this process without waiting.

    Args:
        descriptor: of the file.
        shared: let others take shared locks as well, where the system has such.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    try:
        import msvcrt
    except ImportError:  # a system with neither: two writers are the user's to avoid
        return
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _BEYOND_THE_CONTENT, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from error
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)
