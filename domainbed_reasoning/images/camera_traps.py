"""Annotations of Caltech Camera Traps as LILA publishes them: which of its images are TerraIncognita's, and where.

The files are in COCO's format: ``images`` with ``id``, ``file_name`` and ``location``; ``annotations`` with
``image_id`` and ``category_id``; ``categories`` with ``id`` and ``name``. As in DomainBed, an image with annotations
of several classes belongs to each of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.images.catalog import ImageFolder
from domainbed_reasoning.images.sources import SourceError, open_source

_LISTS = {
    "images": ("id", "file_name", "location"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}


def read_annotations(path: Path, dataset: ImageFolder) -> dict[str, list[tuple[str, str]]]:
    """Return the domain and class folders of each annotated image of a dataset, by file name.

    Args:
        path: a folder or an archive with JSON files.
        dataset: whose domains are called ``location_38`` and so on.

    Raises:
        SourceError: there is no such file, or one is not in COCO's format.
        OSError: it cannot be read.
    """
    names: dict[str, str] = {}
    domains: dict[str, tuple[str, str]] = {}  # by image: its file's name and its domain
    categories: defaultdict[str, set[str]] = defaultdict(set)
    for file, found in _files(path):
        for one in found["categories"]:
            if names.setdefault(str(one["id"]), str(one["name"])) != str(one["name"]):
                raise SourceError(f"{file}: the category {one['id']!r:.80} has another name than in the other files.")
        for one in found["images"]:
            domain = f"location_{one['location']}"
            if domain in dataset.domains:
                domains[str(one["id"])] = str(one["file_name"]), domain
        for one in found["annotations"]:
            categories[str(one["image_id"])].add(str(one["category_id"]))
    places: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for image, (name, domain) in domains.items():
        labels = {names.get(category) for category in categories[image]}
        for label in dataset.classes:
            if label in labels and (domain, label) not in places[name]:
                places[name].append((domain, label))
    return dict(places)


def _files(path: Path) -> Iterator[tuple[str, Mapping[str, list[dict[str, Any]]]]]:
    """Yield each annotation file: its name, and its lists."""
    count = 0
    for source in open_source(path, (".json",)):
        file, count = f"{path}: {source.path}", count + 1
        try:
            found = parse_json(source.read().decode())
        except ValueError as error:
            raise SourceError(f"{file} is not JSON ({str(error):.200}).") from error
        for name, keys in _LISTS.items():
            rows = found.get(name) if isinstance(found, dict) else None
            if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= set(row) for row in rows):
                raise SourceError(f"{file} needs a list {name!r} of objects with {', '.join(keys)} (COCO's format).")
        yield file, found
    if not count:
        raise SourceError(f"{path} has no JSON file. Pass LILA's eccv_18_annotations.tar.gz, or the folder in it.")
