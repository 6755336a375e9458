"""The fixed sample of PACS that the real run trains and tests on, as a data folder of its own."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.images.catalog import IMAGE_EXTENSIONS

FOLDER = "PACS"
RECORD = "sample.json"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def images_in(folder: Path) -> list[Path]:
    """Return the images of a class folder, as DomainBed counts them, sorted."""
    return sorted(path for path in folder.iterdir() if path.name.lower().endswith(IMAGE_EXTENSIONS))


def draw_sample(source: Path, per_class: int, seed: int) -> list[Path]:
    """Return equally many images of each domain and class, as paths below ``source``, sorted.

    Args:
        source: ``<domain>/<class>/<image>``.
        per_class: images of each class and domain.
        seed: of the choice. A class's choice depends on its own files alone.

    Raises:
        ValueError: if ``source`` has no such folders, or a class has too few images.
    """
    classes = sorted(path for path in source.glob("*/*") if path.is_dir())
    if not classes:
        raise ValueError(f"{source} has no folders <domain>/<class>. --data_dir must contain {FOLDER}.")
    drawn: list[Path] = []
    for folder in classes:
        files = images_in(folder)
        if len(files) < per_class:
            raise ValueError(f"{folder} has {len(files)} images, fewer than --per_class {per_class}.")
        name = folder.relative_to(source).as_posix()
        drawn += sorted(random.Random(f"{seed}/{name}").sample(files, per_class))
    return [path.relative_to(source) for path in drawn]


def write_sample(data_dir: Path, output: Path, per_class: int, seed: int) -> Path:
    """Copy the sample into ``output/data`` and record it; a recorded sample is kept.

    The record, ``sample.json``, lists the images with their SHA-256 and is written last.

    Args:
        data_dir: contains ``PACS``.
        output: of the run.
        per_class: images of each class and domain.
        seed: of the choice.

    Returns:
        The folder for DomainBed's ``--data_dir``.

    Raises:
        ValueError: see `draw_sample`.
    """
    folder, record = output / "data", output / RECORD
    if record.exists():
        return folder
    source, images = data_dir / FOLDER, []
    chosen = draw_sample(source, per_class, seed)
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted copy
    for path in chosen:
        copy = folder / FOLDER / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, copy)
        images.append({"image": path.as_posix(), "sha256": sha256_of(copy)})
    content = {"per_class": per_class, "seed": seed, "images": images}
    replace_text(record, json.dumps(content, indent=1) + "\n")
    return folder
