"""Untrusted images: correct pixels, or an error that names the file; no crash, decompression bomb or other program."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from domainbed_reasoning.annotate.teacher import MAX_EDGE, read_picture
from domainbed_reasoning.images.decode import ImageFileError, check_header, read_rgb, reject_truncated_images

NOISE = np.random.RandomState(0).randint(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(picture: Image.Image, form: str, **more: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **more)
    return out.getvalue()


def photo() -> Image.Image:
    return Image.fromarray(NOISE)


def png_header(width: int, height: int, depth: int = 1, color: int = 0) -> bytes:
    """A PNG that says it is so large, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo(), "JPEG", exif=exif, quality=95)


def animated(form: str) -> bytes:
    others = [Image.new("RGB", (60, 40), (0, 0, 255)) for _ in range(3)]
    return saved(Image.new("RGB", (60, 40), (255, 0, 0)), form, save_all=True, append_images=others, lossless=True)


def sixteen_bits(form: str) -> bytes:
    ramp = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    return saved(Image.fromarray(ramp), form)


def with_transparency() -> bytes:
    """A palette whose entries have an alpha each."""
    return saved(photo().convert("P"), "PNG", transparency=bytes(range(256)))


def huge_bmp() -> bytes:
    data = saved(photo(), "BMP")
    return data[:18] + struct.pack("<ii", 30_000, 30_000) + data[26:]


# name: (file name, its bytes, size, a test of the pixels or None)
READ: dict[str, tuple[str, Callable[[], bytes], tuple[int, int], Callable[[np.ndarray], bool] | None]] = {
    "JPEG": ("a.jpg", lambda: saved(photo(), "JPEG"), (60, 40), None),
    "CMYK JPEG": ("a.jpg", lambda: saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), (9, 9), None),
    "progressive JPEG": ("a.jpg", lambda: saved(photo(), "JPEG", progressive=True), (60, 40), None),
    "JPEG with 900 bytes after its end": ("a.jpg", lambda: saved(photo(), "JPEG") + bytes(900), (60, 40), None),
    "JPEG with 9,000 bytes after its end": ("a.jpg", lambda: saved(photo(), "JPEG") + b"x" * 9000, (60, 40), None),
    "PNG under the name of a JPEG": ("a.jpg", lambda: saved(photo(), "PNG"), (60, 40), lambda x: (x == NOISE).all()),
    "GIF under the name of a PNG": ("a.png", lambda: saved(photo(), "GIF"), (60, 40), None),
    "palette": ("a.png", lambda: saved(photo().convert("P"), "PNG"), (60, 40), None),
    "palette with transparency": ("a.png", with_transparency, (60, 40), None),
    "two colors": (
        "a.png",
        lambda: saved(photo().convert("1"), "PNG"),
        (60, 40),
        lambda x: set(x.ravel()) == {0, 255},
    ),
    "grey": ("a.png", lambda: saved(photo().convert("L"), "PNG"), (60, 40), None),
    "grey with alpha": (
        "a.png",
        lambda: saved(Image.new("LA", (5, 5), (7, 0)), "PNG"),
        (5, 5),
        lambda x: (x == 7).all(),
    ),
    "RGBA": ("a.png", lambda: saved(photo().convert("RGBA"), "PNG"), (60, 40), lambda x: (x == NOISE).all()),
    "16-bit grey PNG": (
        "a.png",
        lambda: sixteen_bits("PNG"),
        (60, 40),
        lambda x: 120 < x.mean() < 135 and x.std() > 70,
    ),
    "16-bit grey PGM": (
        "a.pgm",
        lambda: b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes(),
        (3, 1),
        lambda x: x[0, :, 0].tolist() == [0, 128, 255],
    ),
    "16-bit grey TIFF": ("a.tif", lambda: sixteen_bits("TIFF"), (60, 40), lambda x: 120 < x.mean() < 135),
    "1 x 1": ("a.png", lambda: saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), (1, 1), None),
    "1 x 20,000": ("a.png", lambda: saved(Image.new("RGB", (1, 20_000)), "PNG"), (1, 20_000), None),
    "20,000 x 1": ("a.bmp", lambda: saved(Image.new("RGB", (20_000, 1)), "BMP"), (20_000, 1), None),
    "rotated by EXIF": ("a.jpg", exif_rotated, (60, 40), None),
    "animated GIF": ("a.png", lambda: animated("GIF"), (60, 40), lambda x: (x[0, 0] == (255, 0, 0)).all()),
    "animated WebP": ("a.webp", lambda: animated("WEBP"), (60, 40), lambda x: (x[0, 0] == (255, 0, 0)).all()),
    "animated PNG": ("a.png", lambda: animated("PNG"), (60, 40), lambda x: (x[0, 0] == (255, 0, 0)).all()),
    "TIFF of pages": ("a.tif", lambda: animated("TIFF"), (60, 40), lambda x: (x[0, 0] == (255, 0, 0)).all()),
    "WebP": ("a.webp", lambda: saved(photo(), "WEBP", lossless=True), (60, 40), lambda x: (x == NOISE).all()),
    "PPM": ("a.ppm", lambda: saved(photo(), "PPM"), (60, 40), lambda x: (x == NOISE).all()),
    "LAB": ("a.tif", lambda: saved(photo().convert("YCbCr"), "TIFF"), (60, 40), None),
    "EXIF of nonsense": ("a.jpg", lambda: saved(photo(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 500), (60, 40), None),
    "ICC profile of nonsense": ("a.png", lambda: saved(photo(), "PNG", icc_profile=b"\xff" * 500), (60, 40), None),
}

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n"

REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("a.jpg", lambda: b"", "not one of JPEG"),
    "HTML": ("a.jpg", lambda: b"<!DOCTYPE html><html>404</html>", "not one of JPEG"),
    "text": ("a.png", lambda: b"not found\n" * 50, "not one of JPEG"),
    "SVG": (
        "a.png",
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "not one of",
    ),
    "PostScript": ("a.jpg", lambda: EPS, "not one of JPEG"),
    "ZIP": ("a.png", lambda: b"PK\x03\x04" + bytes(500), "not one of JPEG"),
    "ICO": ("a.png", lambda: saved(photo(), "ICO", sizes=[(16, 16)]), "not one of JPEG"),
    "PSD": ("a.png", lambda: b"8BPS\0\1" + bytes(200), "not one of JPEG"),
    "half a JPEG": ("a.jpg", lambda: saved(photo(), "JPEG")[:-600], "truncated"),
    "JPEG without its end": ("a.jpg", lambda: saved(photo(), "JPEG")[:-40], "truncated"),
    "a JPEG's header": ("a.jpg", lambda: saved(photo(), "JPEG")[:30], "."),
    "half a PNG": ("a.png", lambda: saved(photo(), "PNG")[:-3000], "truncated|broken"),
    "PNG without its end": ("a.png", lambda: saved(photo(), "PNG")[:-200], "truncated|broken"),
    "half a GIF": ("a.gif.png", lambda: saved(photo(), "GIF")[:-900], "truncated|not processed"),
    "20,000 x 20,000": ("a.png", lambda: png_header(20_000, 20_000), "20000 x 20000 pixels, more than 89,478,485"),
    "60,000 x 60,000": ("a.png", lambda: png_header(60_000, 60_000), "pixels"),
    "2^31 - 1 in both": ("a.png", lambda: png_header(2**31 - 1, 2**31 - 1), "pixels|size"),
    "a little too large": ("a.png", lambda: png_header(9_460, 9_460), "9460 x 9460 pixels, more than 89,478,485"),
    "BMP of 2 GB": ("a.bmp", huge_bmp, "pixels"),
    "PPM of 10^10 pixels": ("a.ppm", lambda: b"P6 100000 100000 255\n" + bytes(99), "pixels"),
    "PNG of no size": ("a.png", lambda: png_header(0, 0), "."),
    "PNG with a wrong checksum": (
        "a.png",
        lambda: saved(photo(), "PNG").replace(b"IHDR\0\0\0\x3c", b"IHDR\0\0\0\x3d"),
        ".",
    ),
    "32-bit grey": (
        "a.tif",
        lambda: saved(Image.fromarray(np.ones((9, 9), np.int32)), "TIFF"),
        "no defined white level",
    ),
    "floats": (
        "a.tif",
        lambda: saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
        "no defined white level",
    ),
}


@pytest.fixture(autouse=True)
def as_domainbed_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules have truncated images filled up, and a library of theirs takes Pillow's bound on sizes away."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**10)


@pytest.mark.parametrize("name", READ)
def test_unusual_images_are_decoded_correctly(tmp_path: Path, name: str) -> None:
    file, make, size, right = READ[name]
    path = tmp_path / file
    path.write_bytes(make())
    with reject_truncated_images():
        check_header(path)
        picture = read_rgb(path)
        sent, _ = read_picture(path)
    assert picture.mode == "RGB" and picture.size == size
    assert right is None or right(np.asarray(picture))
    with Image.open(io.BytesIO(sent)) as jpeg:
        assert jpeg.format == "JPEG" and jpeg.mode == "RGB" and max(jpeg.size) <= MAX_EDGE and not jpeg.getexif()
    if not name.startswith("16"):  # where stock DomainBed's loader makes white of it
        with Image.open(path) as stock:
            assert (np.asarray(stock.convert("RGB")) == np.asarray(picture)).all()


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_images_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file, make, failure = REFUSED[name]
    path = tmp_path / file
    path.write_bytes(make())
    with reject_truncated_images():
        for read in (read_rgb, read_picture):
            with pytest.raises(
                ImageFileError, match=f"(?s)^'.*{file}' is not a readable image: .*({failure}).*Replace"
            ):
                read(path)
        if "checksum" not in name:  # those pixels are looked at when the image is
            with pytest.raises(ImageFileError, match=file):
                check_header(path)


def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    import subprocess

    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    path = tmp_path / "a.jpg"
    path.write_bytes(EPS)
    with pytest.raises(ImageFileError):
        read_rgb(path)


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b]0;owned\x07\n.jpg"
    path.write_bytes(b"x")
    with pytest.raises(ImageFileError) as error:
        read_rgb(path)
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)
