"""Matches a bundle's lines to images on disk: by path, else by the SHA-256 of the file.

Copies of a dataset may name their images differently. Only images without a line for their path are read and hashed.
If one of them has the content of a line that another image matched by path, that image is hashed as well, and the
content takes precedence.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from domainbed_reasoning.chains.image_names import ImageLookup, composed
from domainbed_reasoning.chains.record import Record
from domainbed_reasoning.files.plain import open_plain
from domainbed_reasoning.terminal import is_terminal


@dataclass(frozen=True)
class Matches:
    """Images on disk and the bundle's images that they match.

    Attributes:
        by_path: image on disk → its name in the bundle.
        by_digest: likewise, including copies of an image that has a line.
        copies: (image, its copy): files with the same content and class folder. Both get the chains.
        elsewhere: (image on disk, name in the bundle): same content in another class folder. It gets no chain.
        renamed: images on disk at a path of the bundle, but with the content of another image.
        absent: names in the bundle without an image on disk.
    """

    by_path: dict[str, str]
    by_digest: dict[str, str]
    copies: tuple[tuple[str, str], ...]
    elsewhere: tuple[tuple[str, str], ...]
    renamed: tuple[str, ...]
    absent: tuple[str, ...]

    def lines(self, lines: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
        """Yield the bundle's numbered lines of images on disk, with their paths on disk."""
        images: dict[str, list[str]] = {}
        for image, name in (self.by_path | self.by_digest).items():
            images.setdefault(name, []).append(image)
        for line, record in lines:
            for image in images.get(record["image"], ()):
                yield line, {**record, "image": image}

    def notes(self) -> Iterator[str]:
        """Yield a sentence about each kind of irregularity, with the first example."""
        if self.copies:
            image, copy = self.copies[0]
            files = "file is a copy of another and shares its chain"
            if len(self.copies) > 1:
                files = "files are copies of others and share their chains"
            yield f"{len(self.copies):,} {files} ({copy!r} and {image!r})."
        if self.elsewhere:
            image, name = self.elsewhere[0]
            images = "image is in another class folder than in the bundle and gets"
            if len(self.elsewhere) > 1:
                images = "images are in other class folders than in the bundle and get"
            yield f"{len(self.elsewhere):,} {images} no bundled chain ({image!r}, in the bundle {name!r})."
        if self.renamed:
            images = "image has" if len(self.renamed) == 1 else "images have"
            path = f"the path of another image in the bundle and are matched by content ({self.renamed[0]!r})"
            yield f"{len(self.renamed):,} {images} {path}."


def match_images(
    lines: Iterable[tuple[int, Record]], images: Sequence[str], root: Path, by_folder: bool = True
) -> Matches:
    """Match the bundle's lines to images on disk.

    Args:
        lines: of the bundle.
        images: paths on disk, below the dataset's folder.
        root: the dataset's folder.
        by_folder: whether paths are ``<domain>/<class>/…``, so that equal files of other classes can be told. Where a
            table names the classes, the content alone counts.
    """
    digests: dict[str, str] = {}  # name in the bundle → SHA-256
    for _, record in lines:
        digests.setdefault(record["image"], str(record.get("sha256") or ""))
    names = ImageLookup(images)
    held = {name: image for name in digests if (image := names.find(name)) is not None}
    by_path = {image: name for name, image in held.items()}
    by_digest: dict[str, str] = {}
    copies, elsewhere, renamed = [], [], []
    named = {digest: name for name, digest in reversed(digests.items()) if digest}
    left = deque(image for image in images if image not in by_path) if named else deque()
    hashed = dict(zip(left, _digests(root, left), strict=True))
    while left:
        image = left.popleft()
        name = named.get(hashed[image])
        if name is None:
            continue
        if by_folder and _class_of(image) != _class_of(name):
            elsewhere.append((image, name))
            continue
        holder = held.get(name)
        if holder is not None and holder not in hashed:
            hashed[holder] = _digest(root / holder)
        if holder is None or hashed[holder] != digests[name]:
            held[name] = image
            if holder is not None:
                del by_path[holder]
                renamed.append(holder)
                left.append(holder)
        else:
            copies.append((holder, image))
        by_digest[image] = name
    absent = tuple(name for name in digests if name not in held)
    return Matches(by_path, by_digest, tuple(copies), tuple(elsewhere), tuple(renamed), absent)


def _class_of(path: str) -> str:
    """Return the class folder in ``<domain>/<class>/…``."""
    return composed(path.split("/")[1]) if path.count("/") > 1 else ""


def _digests(root: Path, images: Sequence[str]) -> list[str]:
    if not images:
        return []
    from tqdm import tqdm

    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [root / image for image in images])
        return list(
            tqdm(
                digests, "matching images", len(images), unit="image", leave=False, disable=not is_terminal(sys.stderr)
            )
        )


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file; "" if it cannot be read, which decoding reports later."""
    try:
        with open_plain(path) as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except OSError:
        return ""
