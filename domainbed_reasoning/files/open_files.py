"""Copies of open files, even after their name is gone."""

from __future__ import annotations

import os
import shutil
import tempfile


def save_copy(file: int, path: str) -> tuple[int, str]:
    """Copy an open file to a new one.

    Args:
        file: descriptor, open for reading; the file may have been deleted.
        path: its former path; the copy goes to the same folder, or to the temporary folder if that one is gone.

    Returns:
        descriptor and path of the copy.

    Raises:
        OSError: the copy cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    copy, copy_path = tempfile.mkstemp(".jsonl", f"{name}.rescued-", folder if os.path.isdir(folder) else None)
    with open(copy, "r+b", closefd=False) as target, open(file, "rb", closefd=False) as source:
        source.seek(0)
        shutil.copyfileobj(source, target)
    os.fsync(copy)
    return copy, copy_path
