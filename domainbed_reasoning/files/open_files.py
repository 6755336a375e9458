"""What can be told of a file that is open, and saved of it, whatever has become of its name."""

from __future__ import annotations

import os
import shutil
import tempfile


def is_in_place(file: int, path: str) -> bool:
    """Return whether ``path`` still names the file that is open as ``file``."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def save_copy(file: int, path: str) -> tuple[int, str]:
    """Return a new open file with the content of ``file``, and its path.

    Args:
        file: open for reading; it may have no name any more.
        path: that it had; the copy is made beside it, or in the folder for temporary files if its folder is gone.

    Raises:
        OSError: it cannot be made.
    """
    folder, name = os.path.split(os.path.abspath(path))
    copy, place = tempfile.mkstemp(".jsonl", f"{name}.rescued-", folder if os.path.isdir(folder) else None)
    with open(copy, "r+b", closefd=False) as target, open(file, "rb", closefd=False) as source:
        source.seek(0)
        shutil.copyfileobj(source, target)
    os.fsync(copy)
    return copy, place


def lock_holder(inode: int) -> str:
    """Return `` (process 123)`` for the holder of the inode's lock where Linux tells, else nothing."""
    try:
        with open("/proc/locks") as locks:
            for line in locks:
                fields = line.split()
                if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
                    return f" (process {fields[4]})"
    except (OSError, IndexError):
        pass
    return ""


def sync_folder(folder: str) -> None:
    """Put the folder's list of names on the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
