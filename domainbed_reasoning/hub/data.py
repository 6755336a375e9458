"""Images of a dataset in a repository of the Hub: Parquet files with an image, its domain and its class in each row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from domainbed_reasoning.chains.parquet import read_features, read_parquet
from domainbed_reasoning.hub.fetch import Remote, download_to_cache
from domainbed_reasoning.hub.publish import HubError
from domainbed_reasoning.images.catalog import IMAGE_EXTENSIONS
from domainbed_reasoning.images.obtain import Places, Writer
from domainbed_reasoning.images.sources import MAX_FILE_BYTES

_IMAGE, _DOMAIN = ("image", "img"), ("domain", "environment", "env", "location", "style")
_CLASS = ("label", "class", "labels", "category", "class_name")
_STARTS = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"BM", ".bmp"), (b"II*", ".tif"))
_PLAIN_NAME = re.compile(r"[\w ()+,-][\w ().+,-]*")


def place_remote(writer: Writer, remote: Remote) -> None:
    """Write the images of every Parquet file of a repository, one file after the other.

    Raises:
        HubError: a file's rows lack image, domain or class, or name one that the dataset does not have.
        ParquetError: a file cannot be read.
        OSError: the Hub cannot be reached.
    """
    for file in remote.files:
        path = download_to_cache(remote, file)
        features = read_features(path)
        for number, row in enumerate(read_parquet(path), 1):
            try:
                _place(writer, row, features, file.name)
            except HubError as error:
                raise HubError(f"{remote.repo_id}, {file.name}, row {number}: {error}") from None


def _place(writer: Writer, row: Mapping[str, Any], features: Mapping[str, Any], file: str) -> None:
    name, image = _column(row, _IMAGE)
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes) or len(data) > MAX_FILE_BYTES:
        raise HubError(f"the column {name!r} has no image of at most {MAX_FILE_BYTES:,} bytes.")
    label = _text(row, _CLASS, features)
    if not any(column in row for column in _DOMAIN):  # a file per domain, as in data/photo-00000-of-00001.parquet
        domain = re.split(r"-\d{5}-of-", PurePosixPath(file).stem)[0]
    else:
        domain = _text(row, _DOMAIN, features)
    found = Places(writer.dataset).find(domain, label)
    if found is None:
        raise HubError(f"{writer.dataset.name} has no domain {domain!r:.80} with a class {label!r:.80}.")
    writer.add(*found, _name(image, data, writer), len(data), lambda: data)


def _column(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise HubError(f"it has none of the columns {', '.join(names)}, but {', '.join(row):.200}.")
    return name, row[name]


def _text(row: Mapping[str, Any], names: tuple[str, ...], features: Mapping[str, Any]) -> str:
    """Return the text in a column, of a number the name that the file's features give it."""
    name, value = _column(row, names)
    if isinstance(value, str):
        return value
    feature = features.get(name)
    classes = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(value, int) or not isinstance(classes, list) or not 0 <= value < len(classes):
        raise HubError(f"the column {name!r} has {value!r:.80}, and the file has no names for its numbers.")
    return str(classes[value])


def _name(image: Any, data: bytes, writer: Writer) -> str:
    """Return the name of the image's file: its own where it has one, else its number."""
    given = image.get("path") if isinstance(image, dict) else None
    name = Path(given.replace("\\", "/")).name if isinstance(given, str) else ""
    if _PLAIN_NAME.fullmatch(name) and name.lower().endswith(IMAGE_EXTENSIONS) and len(name) < 200:
        return name
    ending = next((ending for start, ending in _STARTS if data.startswith(start)), None)
    if ending is None:
        raise HubError("its bytes are no JPEG, PNG, WebP, BMP or TIFF.")
    return f"{writer.kept + writer.written:06d}{ending}"
