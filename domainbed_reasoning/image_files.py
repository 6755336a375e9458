"""Image files to RGB pictures, whoever made them: the one way in which files are opened for MLLMs.

The pixels are those of DomainBed's loader (RGB, the first frame, no rotation by EXIF, transparency dropped), except
that 16-bit grey is scaled to 8 bits where that loader makes it white. Only formats that datasets come in are opened:
Pillow would take others too, whatever the file's name says, and start a PostScript interpreter for one of them.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

from domainbed_reasoning.plain_files import MAX_IMAGE_BYTES, open_plain

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")

# Pillow's own bound for a picture that is safe to decode: 268 MB as RGB, 9,459 pixels square. The library wilds, which
# DomainBed's datasets import, takes Pillow's away in the whole process.
MAX_PIXELS = 89_478_485

# How many bytes from the end a whole JPEG or PNG has its end mark at the latest, for some carry a little more.
_TAIL_BYTES = 1024
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}


class ImageFileError(OSError):
    """A file that is no picture that can be used; the message names the file, the fault and the cure."""

    def __init__(self, name: str | os.PathLike[str], fault: str):
        super().__init__(f"{os.fspath(name)!r} is no readable image: {fault}. Replace or remove it.")


def read_rgb(
    file: str | os.PathLike[str] | bytes, name: str | os.PathLike[str] = "image", draft: int | None = None
) -> Any:
    """Return an image file's picture, mode RGB.

    Args:
        file: its path, or its bytes.
        name: for the message, where bytes are given.
        draft: pixels that are enough for its longer edge, which saves time with JPEG; None for the picture as it is.

    Raises:
        ImageFileError: it is no image of a known format, larger than `MAX_PIXELS`, of a depth that has no meaning as
            RGB, or broken; truncated too, unless `ImageFile.LOAD_TRUNCATED_IMAGES` has Pillow fill such images up.
    """
    place = name if isinstance(file, bytes) else file
    with _open(file, place) as picture:
        try:
            if picture.mode.startswith("I;16"):
                return _sixteen_bits(picture)
            if draft is not None:
                picture.draft("RGB", (draft, draft))
            return picture.convert("RGB")
        except Exception as error:  # Pillow's decoders raise whatever they run into
            raise ImageFileError(place, f"{type(error).__name__}: {error}") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return width and height in pixels, from the header.

    Raises:
        ImageFileError: as `read_rgb`.
    """
    with _open(path, path) as picture:
        width, height = picture.size
    return int(width), int(height)


def check_header(path: str | os.PathLike[str]) -> None:
    """Look at a file without decoding its pixels, unless its end mark is missing.

    Raises:
        ImageFileError: as `read_rgb`, which it spares the time of whole files; a truncated one is decoded to be sure,
            within `truncated_images_refused`.
    """
    with _open(path, path) as picture:
        mark = _END_MARKS.get(picture.format or "")
    if mark is not None:
        with open_plain(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            if mark in file.read():
                return
        read_rgb(path)


@contextlib.contextmanager
def truncated_images_refused() -> Iterator[None]:
    """Have PIL refuse truncated images, which DomainBed's modules make it fill up with grey in the whole process."""
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _open(file: str | os.PathLike[str] | bytes, name: str | os.PathLike[str]) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    with contextlib.ExitStack() as opened:
        try:
            content = io.BytesIO(file) if isinstance(file, bytes) else open_plain(file, MAX_IMAGE_BYTES)
            picture = opened.enter_context(Image.open(opened.enter_context(content), formats=FORMATS))
        except UnidentifiedImageError as error:
            raise ImageFileError(name, f"none of {', '.join(FORMATS)}") from error
        except Exception as error:
            raise ImageFileError(name, f"{type(error).__name__}: {error}") from error
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ImageFileError(name, f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
        if picture.mode in ("I", "F"):
            raise ImageFileError(name, f"its mode {picture.mode!r} (32 bits a pixel) says not what is white")
        yield picture


def _sixteen_bits(picture: Any) -> Any:
    import numpy
    from PIL import Image

    grey = numpy.asarray(picture).astype(numpy.uint32)
    return Image.fromarray(((grey + 128) // 257).astype(numpy.uint8)).convert("RGB")
