"""Decodes untrusted image files to RGB; all images for MLLMs are opened here.

The pixels are those of DomainBed's loader (RGB, the first frame, no rotation by EXIF, transparency dropped), except
that 16-bit gray is scaled to 8 bits, which that loader turns white. Only common dataset formats are opened: Pillow
supports others regardless of the extension, and starts a PostScript interpreter for one of them.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from domainbed_reasoning.files.plain import MAX_IMAGE_BYTES, open_plain, read_plain

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")

# Pillow's own decompression-bomb limit: 268 MB as RGB, 9,459 pixels square. The library wilds, which DomainBed's
# datasets import, disables Pillow's in the whole process.
MAX_PIXELS = 89_478_485

# A complete JPEG or PNG has its end marker within this many bytes of its end; some have trailing data.
_TAIL_BYTES = 1024
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}


class ImageFileError(OSError):
    """An unusable image file; the message gives file, problem and fix."""

    def __init__(self, name: str | os.PathLike[str], problem: str):
        super().__init__(f"{os.fspath(name)!r} is not a readable image: {problem}. Replace or remove it.")


def read_rgb(
    file: str | os.PathLike[str] | bytes, name: str | os.PathLike[str] = "image", draft: int | None = None
) -> Any:
    """Return an image file's picture, mode RGB.

    Args:
        file: its path, or its bytes.
        name: for the message, where bytes are given.
        draft: minimum pixels of its longer edge, which speeds up JPEG; None for full resolution.

    Raises:
        ImageFileError: if it has an unsupported format or bit depth, more than `MAX_PIXELS` pixels, or is corrupt; also
            if it is truncated, unless `ImageFile.LOAD_TRUNCATED_IMAGES` is set.
    """
    place = name if isinstance(file, bytes) else file
    with _open(file, place) as picture:
        try:
            if _has_16_bits(picture):
                return _to_8_bits(picture)
            if draft is not None:
                picture.draft("RGB", (draft, draft))
            return picture.convert("RGB")
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise ImageFileError(place, f"{type(error).__name__}: {error}") from error


def is_below(root: str | os.PathLike[str], name: str | os.PathLike[str]) -> bool:
    """Return whether the file ``name`` is in the folder ``root`` after resolving links."""
    try:
        file = Path(root, name).resolve()
        return file.is_relative_to(Path(root).resolve()) and not file.is_symlink()  # a circle's, since Python 3.13
    except (OSError, RuntimeError, ValueError):  # circular links until Python 3.12, a NUL
        return False


def file_below(root: str | os.PathLike[str], name: str | os.PathLike[str]) -> Path:
    """Return the path of the file ``name`` in the folder ``root``; links must not lead out of it.

    Raises:
        ImageFileError: if it resolves to a path outside.
    """
    if not is_below(root, name):
        raise ImageFileError(name, f"it is not in {os.fspath(root)}, or links outside it")
    return Path(root, name)


def without_metadata(path: str | os.PathLike[str]) -> bytes:
    """Return an image file without comments, EXIF, thumbnails or trailing data.

    The pixels are those of `read_rgb`. A JPEG stays one, its compressed data untouched; any other becomes a PNG.

    Raises:
        ImageFileError: as `read_rgb`, truncated images always.
    """
    with reject_truncated_images():
        picture = read_rgb(path)
        with _open(path, path) as original:
            if original.format == "JPEG" and original.mode in ("L", "RGB"):
                with contextlib.suppress(ValueError, IndexError, ImageFileError):  # an unusual structure
                    data = _bare_jpeg(read_plain(path, MAX_IMAGE_BYTES))
                    if read_rgb(data).tobytes() == picture.tobytes():
                        return data
    out = io.BytesIO()
    picture.info.clear()
    picture.save(out, "PNG")
    return out.getvalue()


def _bare_jpeg(data: bytes) -> bytes:
    """Return a JPEG's segments that decoding needs, up to the end of its first image.

    Raises:
        ValueError, IndexError: it is not a JPEG.
    """
    kept, at = bytearray(data[:2]), 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("no marker where a segment should begin")
        while data[at] == 0xFF:
            at += 1
        marker, at = data[at], at + 1
        if marker == 0xD9:  # the end
            return bytes(kept) + b"\xff\xd9"
        start, at = at, at + int.from_bytes(data[at : at + 2], "big")
        segment = data[start:at]
        if segment[2:7] == b"JFIF\0":
            segment = b"\0\x10" + segment[2:14] + b"\0\0"  # without its thumbnail
        is_told = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_told or segment[2:7] in (b"JFIF\0", b"Adobe"):  # these define the color space
            kept += bytes((0xFF, marker)) + segment
        if marker == 0xDA:  # compressed data, up to the next marker that does not belong to them
            start = at
            while data[at] != 0xFF or data[at + 1] in (0x00, *range(0xD0, 0xD8)):
                at += 1
            kept += data[start:at]


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return width and height in pixels, from the header.

    Raises:
        ImageFileError: as `read_rgb`.
    """
    with _open(path, path) as picture:
        width, height = picture.size
    return int(width), int(height)


def check_header(path: str | os.PathLike[str]) -> None:
    """Check a file without decoding its pixels, unless its end marker is missing.

    Raises:
        ImageFileError: as `read_rgb`; files without an end marker are decoded, and rejected if truncated within
            `reject_truncated_images`.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(open_plain(path, MAX_IMAGE_BYTES))
        except OSError as error:
            raise ImageFileError(path, f"{type(error).__name__}: {error}") from error
        with _open(file, path) as picture:
            mark = _END_MARKS.get(picture.format or "")
        if mark is None:
            return
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        if mark in file.read():
            return
    read_rgb(path)


@contextlib.contextmanager
def reject_truncated_images() -> Iterator[None]:
    """Have PIL reject truncated images, which DomainBed's modules let it pad with gray in the whole process."""
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _open(file: str | os.PathLike[str] | bytes | BinaryIO, name: str | os.PathLike[str]) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    with contextlib.ExitStack() as opened:
        try:
            if isinstance(file, str | os.PathLike):
                file = opened.enter_context(open_plain(file, MAX_IMAGE_BYTES))
            content = io.BytesIO(file) if isinstance(file, bytes) else file
            picture = opened.enter_context(Image.open(content, formats=FORMATS))
        except UnidentifiedImageError as error:
            raise ImageFileError(name, f"not one of {', '.join(FORMATS)}") from error
        except Exception as error:
            raise ImageFileError(name, f"{type(error).__name__}: {error}") from error
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ImageFileError(name, f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
        if picture.mode in ("I", "F") and not _has_16_bits(picture):
            raise ImageFileError(name, f"mode {picture.mode!r} (32 bits per pixel) has no defined white level")
        yield picture


def _has_16_bits(picture: Any) -> bool:
    """Return whether an image is gray with 16 bits a pixel; PIL scales a PGM's to these, in mode I."""
    return bool(picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM"))


def _to_8_bits(picture: Any) -> Any:
    import numpy
    from PIL import Image

    gray = numpy.asarray(picture).astype(numpy.uint32)
    return Image.fromarray(((gray + 128) // 257).astype(numpy.uint8)).convert("RGB")
