"""Locks on open files, by `filelock`; the operating system releases them when their process ends, even by SIGKILL.

The lock is on the caller's own descriptor (`filelock.lock_descriptor`), not on a lock file beside it (`FileLock`): it
follows a chain file that is renamed, never extends to another file that takes its name, and is inherited by forks.
"""

from __future__ import annotations

import os
import time

import filelock

_PROBES = 3
_PROBE_SECONDS = 0.01


class FileLocked(BlockingIOError):
    """Another open file holds the lock.

    Attributes:
        holder: "another process (process 123)", without the number if the system does not provide it.
    """

    def __init__(self, holder: str):
        super().__init__(f"locked by {holder}")
        self.holder = holder


def lock(descriptor: int) -> None:
    """Lock an open file without waiting, until it is closed or this process ends.

    Args:
        descriptor: of the file, open for writing.

    Raises:
        FileLocked: another process holds the lock.
        OSError: the file system does not support locks.
    """
    if not filelock.lock_descriptor(descriptor, blocking=False):
        raise FileLocked(_holder(os.fstat(descriptor).st_ino))


def lock_in_place(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Lock an open file and return whether ``path`` still names it: another process may have replaced it meanwhile.

    Raises:
        OSError: as `lock`.
    """
    lock(descriptor)
    return is_in_place(descriptor, path)


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Return whether a process holds the lock of a file; False if it is missing, unreadable or cannot be locked.

    Probing takes the lock for a moment, so a lock that is released right away is taken for another probe.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        for probe in range(_PROBES):
            time.sleep(_PROBE_SECONDS * bool(probe))
            if filelock.lock_descriptor(descriptor, blocking=False):
                return False
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def is_in_place(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` names the file that is open as ``descriptor``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _holder(inode: int) -> str:
    try:
        with open("/proc/locks") as locks:  # Linux
            for line in locks:
                fields = line.split()
                if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
                    return f"another process (process {fields[4]})"
    except (OSError, IndexError):
        pass
    return "another process"
