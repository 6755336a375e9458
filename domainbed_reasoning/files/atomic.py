"""Files that are whole or not there: written beside their place, then moved into it.

What a killed process was writing stays beside its place, and is removed the next time that the same file is written.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAMED = 40  # characters of the target's name that a temporary name repeats: file systems bound a name's length


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends well, and leaves nothing when it does not.

    The temporary file has a random name, is made new (a link that was planted there is not followed), and is locked
    while it is written, so that it is told from one that a killed process left.

    Args:
        path: of the file, in a folder that exists.
        durable: wait until the disk has it (fsync), so that a machine that goes down does not leave an empty file.

    Raises:
        OSError: it cannot be written.
    """
    remove_stale(path)
    part, file = _open_new(path)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows moves no open file; elsewhere the lock is held until it is moved
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def name_beside(path: Path) -> Path:
    """Return a name for a temporary file that is to become ``path``: hidden, random, and known to `remove_stale`."""
    return path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.part")


def remove_stale(path: Path) -> None:
    """Remove what killed processes left of writing ``path``: temporary files of ours that nobody has locked.

    What cannot be removed, or not be locked on its file system, stays.
    """
    if fcntl is None:
        return
    ours = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if ours.fullmatch(entry.name):
                with suppress(OSError):  # it has gone meanwhile, is locked, or is another user's
                    _remove_unlocked(Path(entry.path))


def sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _prefix(path: Path) -> str:
    return f".{path.name[:_NAMED]}."


def _open_new(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = name_beside(path)
        file = part.open("x+b")
        if _is_locked_in_place(file, part):
            return part, file
        file.close()  # another process took it for a stale one before it was locked


def _is_locked_in_place(file: BinaryIO, part: Path) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(part))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks, where nobody can take it for a stale one either
        return True


def _remove_unlocked(part: Path) -> None:
    descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
    finally:
        os.close(descriptor)
