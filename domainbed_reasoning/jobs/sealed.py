"""Files with checksums: tensors followed by a digest, and a log whose lines are chained by digests.

Digests are SHA-256 in hexadecimal. They detect damage by disks, copies and kills; they are not signatures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from domainbed_reasoning.files.atomic import replacing

_HEX = 64  # characters of a digest
_PART = 1 << 20  # bytes that are read at a time
_SEAL = b', "sha256": "'


class Damaged(Exception):
    """A file is missing or does not match its digest; the message gives file and reason."""


class _Writer:
    """A file whose errors are kept: torch.save makes a RuntimeError of them, of Ctrl-C as well.

    Attributes:
        error: what a write raised, or None.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_tensors(path: Path, value: Any) -> str:
    """Write tensors and plain values, followed by their digest, to the disk, and return the digest.

    Raises:
        OSError: they cannot be written.
    """
    with replacing(path, durable=True) as file:
        writer = _Writer(file)
        try:
            torch.save(value, writer)  # type: ignore[arg-type] # it needs no more of a file
        finally:
            if writer.error is not None:
                raise writer.error
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type] # BinaryIO has no readinto
        file.seek(0, os.SEEK_END)
        file.write(digest.encode())
    return digest


def check_tensors(path: Path, digest: str | None = None) -> None:
    """Compare a file's tensors with the digest that follows them.

    Args:
        path: of the file.
        digest: returned by `write_tensors`; compared as well.

    Raises:
        Damaged: they differ, or there is no such file.
        OSError: it cannot be read.
    """
    check_is_file(path)
    found, left = hashlib.sha256(), path.stat().st_size - _HEX
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, _PART))):
            found.update(part)
            left -= len(part)
        if file.read(_HEX + 1) != found.hexdigest().encode():
            raise Damaged(f"{path.name} does not match its checksum")
    if digest not in (None, found.hexdigest()):
        raise Damaged(f"{path.name} does not belong to the saved state")


def read_tensors(path: Path, digest: str | None = None) -> Any:
    """Return what `write_tensors` wrote, on the CPU.

    Raises:
        Damaged: it is something else; see `check_tensors`.
        OSError: it cannot be read.
    """
    check_tensors(path, digest)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises errors of many types
        raise Damaged(f"{path.name} cannot be read ({type(error).__name__})") from error


def check_is_file(path: Path) -> None:
    """Require a regular file.

    Raises:
        Damaged: it is missing, a folder, a link or a device.
    """
    if path.is_symlink() or not path.is_file():
        raise Damaged(f"{path.name} is {'not a regular file' if os.path.lexists(path) else 'missing'}")


def line_of(event: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """Return a line of the log, which ends in the digest of itself and of all previous lines, and that digest.

    Args:
        event: the content of the line, JSON.
        before: the digest of the previous line; "" for the first.
    """
    body = json.dumps(event).encode()
    digest = hashlib.sha256(before.encode() + body).hexdigest()
    return body[:-1] + _SEAL + digest.encode() + b'"}\n', digest


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield the lines of a log up to the first damaged one: length in bytes, event, digest.

    Raises:
        Damaged: there is no such file.
        OSError: it cannot be read.
    """
    check_is_file(path)
    before = ""
    with path.open("rb") as log:
        for line in log:
            body = line.rpartition(_SEAL)[0] + b"}"
            before = hashlib.sha256(before.encode() + body).hexdigest()
            if line != body[:-1] + _SEAL + before.encode() + b'"}\n':
                return
            try:
                event = json.loads(body)
            except (ValueError, RecursionError):
                return
            yield len(line), event, before
