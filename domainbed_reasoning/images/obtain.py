"""Writes a dataset's folders as DomainBed expects them, from images whose paths name domain and class.

Everything is written into a hidden folder beside the final one, which takes its place when the counts are the
published ones. Each image is written whole or not at all; an interrupted run is resumed from the same source.

Counts per class: PACS and VLCS, as commonly printed; they add up to those per domain in `catalog`. None are published
for OfficeHome and TerraIncognita, of which every class must have images in every domain.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.files.locks import lock
from domainbed_reasoning.files.plain import read_plain_text
from domainbed_reasoning.images.catalog import FolderScan, ImageFolder, scan
from domainbed_reasoning.images.sources import SourceError, SourceImage

DATASETS = ("PACS", "VLCS", "OfficeHome", "TerraIncognita")
_OFFICE_HOME = (
    "Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer Couch "
    "Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer Helmet "
    "Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil "
    "Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda Speaker "
    "Spoon TV Table Telephone ToothBrush Toys Trash_Can Webcam"
).split()
# Other names of domain folders, as copies of the datasets have them.
_ALIASES = {
    "PACS": {"art": "art_painting"},
    "VLCS": {"caltech": "Caltech101", "sun": "SUN09", "voc": "VOC2007", "pascal": "VOC2007", "pascalvoc": "VOC2007"},
    "OfficeHome": {"real": "Real World"},
    "TerraIncognita": {f"{start}{number}": f"location_{number}" for number in (38, 43, 46, 100) for start in ("", "l")},
}
# Images by domain, in the order of the classes.
_PER_CLASS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "PACS": {
        "art_painting": (379, 255, 285, 184, 201, 295, 449),
        "cartoon": (389, 457, 346, 135, 324, 288, 405),
        "photo": (189, 202, 182, 186, 199, 280, 432),
        "sketch": (772, 740, 753, 608, 816, 80, 160),
    },
    "VLCS": {
        "Caltech101": (237, 123, 118, 67, 870),
        "LabelMe": (80, 1209, 89, 43, 1235),
        "SUN09": (21, 933, 1036, 31, 1261),
        "VOC2007": (330, 699, 428, 420, 1499),
    },
}


class Places:
    """Where an image of a dataset belongs.

    Args:
        dataset: one of `DATASETS`.
    """

    def __init__(self, dataset: ImageFolder):
        names = dataset.classes or (_OFFICE_HOME if dataset.name == "OfficeHome" else ())
        self.classes = {_plain(name): name for name in names}
        self.domains = {_plain(name): name for name in dataset.domains} | _ALIASES[dataset.name]

    def of(self, path: str) -> tuple[str, str, str] | None:
        """Return domain folder, class folder and file name of an image, or None if its path names no such pair."""
        steps = path.replace("\\", "/").split("/")
        for place in range(len(steps) - 2):
            found = self.find(steps[place], steps[place + 1])
            if found is not None:
                return *found, "_".join(steps[place + 2 :])
        return None

    def find(self, domain: str, label: str) -> tuple[str, str] | None:
        """Return the folders of a domain and a class by any of their names, or None."""
        found = self.domains.get(_plain(domain)), self.classes.get(_plain(label))
        return None if found[0] is None or found[1] is None else (found[0], found[1])


def _plain(name: str) -> str:
    return re.sub(r"[^0-9a-z]", "", name.lower())


class Writer:
    """The hidden folder that a dataset is written into.

    Args:
        dataset: one of `DATASETS`.
        data_dir: in which its folder will be.
        source: what tells the source from others; a folder of another source is not continued.

    Attributes:
        folder: the hidden one.
        final: the dataset's.
        written: number of images that this run has written.
        kept: number that an earlier run had written.

    Raises:
        FileExistsError: the dataset's folder exists.
        SourceError: the hidden folder is of another source.
        OSError: it cannot be written, or another process writes it.
    """

    def __init__(self, dataset: ImageFolder, data_dir: Path, source: str):
        self.dataset, self.final = dataset, data_dir / dataset.folder
        self.folder = data_dir / f".{dataset.folder}.partial"
        self.written = self.kept = 0
        self._seen: set[Path] = set()
        if self.final.exists():
            raise FileExistsError(
                f"{self.final} exists. Check it with `domainbed-reasoning check --dataset {dataset.name}`, or move it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(self._lock)
            marker = self.folder / ".source"
            before = read_plain_text(marker) if marker.exists() else source
            if before != source:
                raise SourceError(
                    f"{self.folder} was written from {before!r:.300}. Pass the same --from to continue, or remove the "
                    "folder."
                )
            replace_text(marker, source)
        except BaseException:
            self.close()
            raise

    def add(self, domain: str, label: str, name: str, size: int | None, read: Callable[[], bytes]) -> None:
        """Write an image unless an earlier run has; a second one of that name gets a number.

        Args:
            domain: its folder.
            label: its class folder.
            name: of the file.
            size: in bytes; None if it is not known before it is read.
            read: returns its bytes.
        """
        path = self.folder / domain / label / name
        count = 1
        while path in self._seen:
            count += 1
            path = path.with_name(f"{Path(name).stem}-{count}{Path(name).suffix}")
        self._seen.add(path)
        if size is not None and path.is_file() and path.stat().st_size == size:
            self.kept += 1
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = self.folder / ".part"  # of the one process that holds the lock
        part.write_bytes(read())
        os.replace(part, path)
        self.written += 1

    def scan(self) -> FolderScan:
        """Return what has been written."""
        return scan(dataclasses.replace(self.dataset, folder=self.folder.name), self.folder.parent)

    def finish(self) -> None:
        """Give the folder its final name."""
        for name in (".source", ".part", ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        os.rename(self.folder, self.final)

    def close(self) -> None:
        """Let others write the folder."""
        os.close(self._lock)


def place_all(writer: Writer, images: Iterable[SourceImage]) -> int:
    """Write every image whose path names a domain and a class, and return the number of the others."""
    places, others = Places(writer.dataset), 0
    for image in images:
        found = places.of(image.path)
        if found is None:
            others += 1
        else:
            writer.add(*found, image.size, image.read)
    return others


def place_annotated(
    writer: Writer, images: Iterable[SourceImage], annotated: Mapping[str, Sequence[tuple[str, str]]]
) -> int:
    """Write every image whose file name is annotated, and return the number of the others.

    Args:
        writer: of the dataset.
        images: of the source.
        annotated: domain and class folders by file name; an image is written into each.
    """
    others = 0
    for image in images:
        name = image.path.replace("\\", "/").rpartition("/")[2]
        read = functools.cache(image.read)
        for domain, label in annotated.get(name, ()):
            writer.add(domain, label, name, image.size, read)
        others += name not in annotated
    return others


def count_problems(dataset: ImageFolder, on_disk: FolderScan) -> Iterator[str]:
    """Yield where domains or classes have other numbers of images than published."""
    if len(on_disk.pictures) in dict(dataset.other_totals):
        return
    found = Counter((picture.domain, picture.label) for picture in on_disk.pictures)
    published = _PER_CLASS.get(dataset.name, {})
    for domain, total in dataset.domains.items():
        count = on_disk.per_domain()[domain]
        if total is not None and count != total:
            yield f"{domain}: {count:,} images; {total:,} published."
        for label, expected in zip(dataset.classes, published.get(domain, ()), strict=False):
            if found[domain, label] != expected:
                yield f"{domain}/{label}: {found[domain, label]:,} images; {expected:,} published."
