"""Images in pages and exports: their pixels only, and none from outside of the dataset."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from domainbed_reasoning.images.decode import ImageFileError, file_below, is_below, read_rgb, without_metadata

Verb = Callable[..., tuple[int, str, str]]
SECRET = b"SECRET"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(SECRET) print\n%%EOF\n"


def picture() -> Image.Image:
    return Image.fromarray(numpy.random.RandomState(0).randint(0, 256, (24, 32, 3), dtype=numpy.uint8))


def save(path: Path) -> Path:
    """Write a picture with a comment, EXIF (turned by a quarter), a profile, and something after its end."""
    exif, text = Image.Exif(), PngInfo()
    exif[0x010E], exif[0x0112] = "SECRET", 6
    text.add_text("Comment", "SECRET")
    text.add_itxt("XML:com.adobe.xmp", "SECRET")
    more: dict[str, dict[str, Any]] = {
        ".jpg": {"comment": SECRET, "exif": exif, "icc_profile": SECRET * 9, "quality": 80, "progressive": True},
        ".png": {"pnginfo": text, "exif": exif, "icc_profile": SECRET * 9}, ".webp": {"exif": exif, "xmp": SECRET},
        ".gif": {"comment": SECRET}, ".tiff": {"exif": exif},
    }  # fmt: skip
    picture().save(path, **more[path.suffix])
    with open(path, "ab") as file:
        file.write(SECRET)
    return path


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "tiff"])
def test_exported_image_contains_only_pixels(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a.{ending}")
    assert SECRET in path.read_bytes()
    data = without_metadata(path)
    before, after = (numpy.asarray(read_rgb(file)).astype(int) for file in (path, data))
    assert SECRET not in data and before.shape == after.shape
    assert (before == after).all() and not Image.open(io.BytesIO(data)).getexif()
    assert Image.open(io.BytesIO(data)).format == ("JPEG" if ending == "jpg" else "PNG")


def test_irregular_image_files_are_not_exported(tmp_path: Path) -> None:
    (tmp_path / "eps.jpg").write_bytes(EPS)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "cut.jpg").write_bytes(save(tmp_path / "a.jpg").read_bytes()[:400])
    for name in ("eps.jpg", "pipe.jpg", "cut.jpg", "gone.jpg", "."):
        with pytest.raises(ImageFileError, match=re.escape(name) if name != "." else "not a regular file"):
            without_metadata(tmp_path / name)


@pytest.mark.parametrize("name", ["../out.png", "/etc/passwd", "link.png", "folder/x.png", "circle", "a\0b"])
def test_name_outside_the_folder_is_rejected(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    picture().save(tmp_path / "out.png")
    (root / "link.png").symlink_to("../out.png")
    (root / "folder").symlink_to("..")
    (root / "circle").symlink_to("circle")
    assert not is_below(root, name)
    with pytest.raises(ImageFileError, match="not in"):
        file_below(root, name)
    picture().save(root / "in.png")
    (root / "within.png").symlink_to("in.png")
    assert file_below(root, "within.png") == root / "within.png"


def test_export_with_images_has_only_pixels_and_follows_no_external_links(
    toy: Path, verb: Verb, tmp_path: Path, chain_text: Callable[..., str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = toy / "toy"
    image = next(path for path in sorted(folder.rglob("*.png")))
    name = image.relative_to(folder).as_posix()
    save(image)
    chains = tmp_path / "chains.jsonl"
    chains.write_text(json.dumps({"image": name, "chain": chain_text("mug")}) + "\n")
    where = ("--format", "messages", "--dataset", "Toy", "--data_dir", toy, "--chains", chains)
    code, out, err = verb("export", tmp_path / "a.parquet", *where)
    assert code == 0 and f"relative to {folder}. Read the file from there or use --embed-images" in out
    assert verb("export", tmp_path / "b.parquet", *where, "--embed-images")[0] == 0
    data = parquet.read_table(tmp_path / "b.parquet").to_pylist()[0]["images"][0]["bytes"]
    assert SECRET not in data and Image.open(io.BytesIO(data)).size == (32, 24)
    private = image.rename(tmp_path / "private.png")
    image.symlink_to(private)
    code, _, err = verb("export", tmp_path / "c.parquet", *where, "--embed-images")
    assert code == 1 and name in err and "links outside it" in err and not (tmp_path / "c.parquet").exists()
    code, out, _ = verb("browse", *where[2:], "--output", tmp_path / "page.html")
    assert code == 0 and f"1 image not shown: symbolic links that leave {folder}" in out
