"""Named pictures in four styles, and what the vision tower sees of them.

Emoji of three vendors (OpenMoji in color and in black lines, Google's, Twitter's) and, where the clone is there, a
photograph of each ImageNet class. PACS has no part in any of them.
"""

from __future__ import annotations

import io
import json
import pathlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from domainbed_reasoning.files.atomic import replacing
from examples.real_small.compose import EDGE

VIEWS = 2  # of each picture: as it is, and moved, mirrored and cropped
CHUNK = 256  # pictures in a file of features
_WITHOUT = ("flags", "extras-openmoji", "extras-unicode", "symbols", "component")  # groups that show no thing
# Ranges of ImageNet's classes that have a common name, last class included. Breeds and species alone teach few words.
KINDS = (
    (0, 6, "fish"), (7, 24, "bird"), (30, 32, "frog"), (33, 37, "turtle"), (38, 48, "lizard"), (52, 68, "snake"),
    (72, 77, "spider"), (80, 100, "bird"), (118, 121, "crab"), (127, 146, "bird"), (151, 268, "dog"),
    (269, 272, "wolf"), (277, 280, "fox"), (281, 285, "cat"), (294, 297, "bear"), (300, 307, "beetle"),
    (321, 326, "butterfly"), (330, 332, "rabbit"), (369, 382, "monkey"), (385, 386, "elephant"), (389, 397, "fish"),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        path: an SVG drawing, a PNG or a JPEG file.
        name: of what it shows, lower case.
        style: as a caption calls it.
        tags: words that go with it.
        kind: the more general name; empty where there is none.
    """

    path: pathlib.Path
    name: str
    style: str
    tags: tuple[str, ...] = ()
    kind: str = ""


def emoji(openmoji: pathlib.Path, vendors: Sequence[pathlib.Path]) -> list[Picture]:
    """Return the pictures of things among the emoji, in their order in OpenMoji.

    Args:
        openmoji: its unpacked npm package, which has names and tags for all vendors.
        vendors: unpacked packages ``emoji-datasource-*``.
    """
    found = []
    for entry in json.loads(next(openmoji.rglob("openmoji.json")).read_text()):
        if entry["skintone"] or entry["group"] in _WITHOUT:
            continue
        code, name = entry["hexcode"], entry["annotation"].lower()
        tags = tuple(tag.strip() for tag in entry["tags"].split(",") if tag.strip())
        for folder, style in (("color", "colored drawing"), ("black", "line drawing")):
            path = openmoji / "package" / folder / "svg" / f"{code}.svg"
            if path.is_file():
                found.append(Picture(path, name, style, tags))
        for vendor in vendors:
            images = next(vendor.glob("package/img/*/64"))
            for path in (images / f"{code.lower()}.png", images / f"{code.lower()}-fe0f.png"):
                if path.is_file():
                    found.append(Picture(path, name, "cartoon", tags))
                    break
    return found


def photographs(clone: pathlib.Path) -> list[Picture]:
    """Return the ImageNet samples, one a class, in the order of the classes; ``n02085620_Chihuahua.JPEG`` and so on."""
    found = []
    for index, path in enumerate(sorted(clone.glob("n*.JPEG"))):
        name = " ".join(path.stem.split("_")[1:]).lower()
        kind = next((kind for first, last, kind in KINDS if first <= index <= last), "")
        found.append(Picture(path, name, "photo", kind=kind))
    return found


def draw(path: pathlib.Path, view: int, rng: random.Random) -> Image.Image:
    """Return a view of a picture, RGB, ``EDGE`` x ``EDGE`` pixels.

    Args:
        path: of the picture.
        view: 0 for the whole picture in the middle, squeezed to a square as the package does it, else a random one.
        rng: what randomness comes from.
    """
    if path.suffix == ".svg":
        import resvg_py

        opened = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=EDGE, height=EDGE))))
    else:
        opened = Image.open(path)
    if path.suffix == ".JPEG":
        picture = opened.convert("RGB")
        if view:
            width, height = (round(side * rng.uniform(0.7, 1)) for side in picture.size)
            left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
            picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    else:
        paper = tuple(rng.randint(120, 255) for _ in range(3)) if view else (255, 255, 255)
        size = rng.randint(EDGE // 2, EDGE - 8) if view else EDGE * 7 // 8
        corner = (rng.randint(0, EDGE - size), rng.randint(0, EDGE - size)) if view else ((EDGE - size) // 2,) * 2
        drawing = opened.convert("RGBA").resize((size, size), Image.Resampling.BICUBIC)
        picture = Image.new("RGB", (EDGE, EDGE), paper)
        picture.paste(drawing, corner, drawing)
    return ImageOps.mirror(picture) if view and rng.random() < 0.5 else picture


@torch.no_grad()
def features(
    tower: Callable[[torch.Tensor], torch.Tensor], pictures: Sequence[Picture], folder: pathlib.Path, seed: int
) -> torch.Tensor:
    """Return what the tower sees of every view of every picture; chunks that ``folder`` has are not computed again.

    Args:
        tower: pixels in [-1, 1], ``(n, 3, EDGE, EDGE)``, to feature maps ``(n, C, h, w)``.
        pictures: P of them.
        folder: where chunks are kept.
        seed: of the random views.

    Returns:
        ``(P, VIEWS, h w, C)``, bfloat16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in tqdm(range(0, len(pictures), CHUNK), desc="features", unit="chunk"):
        file = folder / f"{start:05}.pt"
        if not file.is_file():
            rows = []
            for at, picture in enumerate(pictures[start : start + CHUNK], start):
                views = [draw(picture.path, view, random.Random(f"{seed} {at} {view}")) for view in range(VIEWS)]
                pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views])).permute(0, 3, 1, 2)
                maps = tower((pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last))
                rows.append(maps.flatten(2).transpose(1, 2).to(torch.bfloat16))
            with replacing(file) as opened:
                torch.save(torch.stack(rows), opened)
        chunks.append(torch.load(file))
    return torch.cat(chunks)
