"""Atomic writes: to a temporary file in the same folder, which then replaces the target.

A temporary file that a killed process left is removed the next time that the same target is written.
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

from domainbed_reasoning.files.locks import lock, lock_in_place

_NAME_CHARACTERS = 40  # of the target's name in a temporary name: file systems limit the length of names
_WINDOWS = os.name == "nt"  # where open files can be neither moved nor removed


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block succeeds and is removed when it fails.

    The temporary file has a random name, is opened exclusively (existing links are not followed), and is locked while
    it is written, which distinguishes it from one that a killed process left.

    Args:
        path: the target, in an existing folder.
        durable: flush to disk (fsync), so that a system crash cannot leave an empty file.

    Raises:
        OSError: the file cannot be written.
    """
    remove_stale(path)
    part, file = _open_new(path)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if _WINDOWS:
                file.close()  # elsewhere the lock is held until the file is in place
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
    """Return a hidden, random name for a temporary file that will replace ``path``, recognized by `remove_stale`."""
    return path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.part")


def remove_stale(path: Path) -> None:
    """Remove temporary files of ``path`` that killed processes left, that is, those that are not locked.

    Files that cannot be removed, or are on a file system without locks, are kept.
    """
    if _WINDOWS:
        return
    ours = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if ours.fullmatch(entry.name):
                with suppress(OSError):  # already removed, locked, or owned by another user
                    _remove_unlocked(Path(entry.path))


def sync_folder(folder: Path) -> None:
    """Flush the folder's directory entries to disk, where the system supports it."""
    with suppress(OSError):  # Windows cannot open folders, and some file systems cannot sync them
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _prefix(path: Path) -> str:
    return f".{path.name[:_NAME_CHARACTERS]}."


def _open_new(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = name_beside(path)
        file = part.open("x+b")
        try:
            if lock_in_place(file.fileno(), part):
                return part, file
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks, where no other process can consider it stale
            return part, file
        file.close()  # another process removed it as stale before it was locked


def _remove_unlocked(part: Path) -> None:
    descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            lock(descriptor)
            part.unlink()
    finally:
        os.close(descriptor)
