"""Images of a dataset in a folder or an archive, wherever they lie in it; nothing is unpacked that is not an image.

Archives are read in order, within bounds on the number and size of their entries. Links, devices, hidden files and
names that lead out of the folder are skipped. Whatever comes before the domain's folder in a path is ignored.
"""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from domainbed_reasoning.files.plain import open_plain, read_plain
from domainbed_reasoning.images.catalog import IMAGE_EXTENSIONS

MAX_FILE_BYTES = 64 << 20  # of an image
MAX_BYTES = 64 << 30  # of an archive's entries; TerraIncognita's images are 6 GB
MAX_ENTRIES = 1_000_000


class SourceError(ValueError):
    """A source of images that cannot be read, or exceeds the bounds."""


@dataclass(frozen=True)
class SourceImage:
    """An image in a source.

    Attributes:
        path: in the source, with ``/``.
        size: in bytes, as the source says.
        read: returns the bytes; valid until the next image is taken.
    """

    path: str
    size: int
    read: Callable[[], bytes]


def open_source(path: Path, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> Iterator[SourceImage]:
    """Yield the images of a folder, a zip file or a tar file, compressed or not.

    Args:
        path: of the source.
        endings: of the names of files that are yielded.

    Raises:
        SourceError: it is none of these, damaged, or exceeds the bounds.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _of_folder(path, endings)
    with open_plain(path) as file:
        is_zip = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    return _of_zip(path, endings) if is_zip else _of_tar(path, endings)


def identity(path: Path) -> str:
    """Return what tells a source from others: path, and an archive's size and time."""
    found = path.stat()
    is_file = stat.S_ISREG(found.st_mode)
    return str(path.absolute()) + (f" {found.st_size} {found.st_mtime_ns}" if is_file else "")


def _of_folder(root: Path, endings: tuple[str, ...]) -> Iterator[SourceImage]:
    for place, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            found = path.lstat()
            shown = path.relative_to(root).as_posix()
            if stat.S_ISREG(found.st_mode) and _is_wanted(shown, endings):
                yield SourceImage(shown, found.st_size, _reader(path))


def _reader(path: Path) -> Callable[[], bytes]:
    return lambda: read_plain(path, MAX_FILE_BYTES)


def _of_zip(path: Path, endings: tuple[str, ...]) -> Iterator[SourceImage]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check(path, len(entries), sum(entry.file_size for entry in entries))
            for entry in entries:
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if not entry.is_dir() and kind in (0, stat.S_IFREG) and _is_wanted(entry.filename, endings):
                    yield SourceImage(entry.filename, entry.file_size, _zip_reader(path, archive, entry))
    except (zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _zip_reader(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        with archive.open(entry) as file:
            return _bounded(path, entry.filename, file, entry.file_size)

    return read


def _of_tar(path: Path, endings: tuple[str, ...]) -> Iterator[SourceImage]:
    count = total = 0
    try:
        with open_plain(path) as file, tarfile.open(fileobj=file, mode="r:*") as archive:
            for entry in archive:
                count, total = count + 1, total + entry.size
                _check(path, count, total)
                archive.members = []  # type: ignore[attr-defined]  # of entries that have been read nothing is needed
                if entry.isreg() and _is_wanted(entry.name, endings):
                    yield SourceImage(entry.name, entry.size, _tar_reader(path, archive, entry))
    except (tarfile.TarError, lzma.LZMAError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:  # others are a decompressor's
            raise
        raise _damaged(path, error) from error


def _tar_reader(path: Path, archive: tarfile.TarFile, entry: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        file = archive.extractfile(entry)
        assert file is not None  # of a regular file
        return _bounded(path, entry.name, file, entry.size)

    return read


def _bounded(path: Path, name: str, file: IO[bytes], size: int) -> bytes:
    data = file.read(MAX_FILE_BYTES + 1) if size <= MAX_FILE_BYTES else b""
    if size > MAX_FILE_BYTES or len(data) > MAX_FILE_BYTES:
        raise SourceError(f"{path}: {name!r:.200} is larger than {MAX_FILE_BYTES:,} bytes, too large for an image.")
    return data


def _check(path: Path, count: int, total: int) -> None:
    if count > MAX_ENTRIES or total > MAX_BYTES:
        raise SourceError(
            f"{path} has more than {MAX_ENTRIES:,} entries or {MAX_BYTES:,} bytes. Unpack it yourself, and pass the "
            "folder."
        )


def _damaged(path: Path, error: Exception) -> SourceError:
    detail = f"{type(error).__name__}: {str(error):.200}"
    return SourceError(f"{path} is not a folder, zip or tar file, or is damaged ({detail}). Download it again.")


def _is_wanted(path: str, endings: tuple[str, ...]) -> bool:
    """Return whether a path has one of the endings, and stays below whatever folder it is taken to lie in."""
    steps = [step for step in path.replace("\\", "/").split("/") if step != "."]
    plain = all(step.isprintable() and not step.startswith(".") and step for step in steps)
    return plain and ":" not in path and path.lower().endswith(endings)
