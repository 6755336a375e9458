"""Open a chain file for a single writer, without its partial last line."""

from __future__ import annotations

import os
import stat

from domainbed_reasoning.chains.record import MAX_LINE_BYTES, ChainFileError, parse_json
from domainbed_reasoning.files.locks import FileLocked, lock_in_place


def open_locked(path: str) -> int:
    """Open the file at ``path``, created if missing, and lock it.

    Raises:
        ChainFileError: another process is writing to it.
        OSError: it cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ChainFileError(path, None, "not a regular file", "Pass a regular file or a new path")
            if lock(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # replaced between opening and locking


def cut_torn_line(file: int, path: str) -> int:
    """Remove a partial last line, or complete a missing newline, and return the number of bytes removed.

    Raises:
        ChainFileError: if it is not a chain file, which is left unchanged.
    """
    size = os.fstat(file).st_size
    start = max(0, size - MAX_LINE_BYTES - 1)
    before, newline, last = os.pread(file, size - start, start).rpartition(b"\n")
    if not last:
        return 0
    if not last.strip():
        os.write(file, b"\n")
        return 0
    try:
        whole = isinstance(parse_json(last.decode("utf-8-sig")), dict)
    except ValueError:
        whole = False
    if whole:
        os.write(file, b"\n")
        return 0
    # A power failure may leave zeros in place of a line.
    head = os.pread(file, 4, 0).removeprefix(b"\xef\xbb\xbf").lstrip()
    if (start and not newline) or not head.startswith((b"{", b"\0")) or last.strip(b"\0")[:1] not in (b"{", b""):
        fix = "Pass a chain file or a new path; this file was left unchanged"
        raise ChainFileError(path, None, "not a chain file: its last line is not a record, even a partial one", fix)
    os.ftruncate(file, size - len(last))
    os.fsync(file)
    return len(last)


def lock(file: int, path: str) -> bool:
    """Lock the file until it is closed, and return whether ``path`` still refers to it."""
    try:
        return lock_in_place(file, path)
    except FileLocked as error:
        fix = "Wait for it to end, or pass another file with --chains"
        raise ChainFileError(path, None, f"{error.holder} is writing to it", fix) from error
