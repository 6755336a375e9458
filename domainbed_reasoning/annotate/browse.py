"""A self-contained HTML page for browsing images, chains, verdicts and reasons.

The page loads nothing and runs only its own script (Content-Security-Policy with the script's hash). All data are
base64, which cannot end a script element, and are inserted as text, never as markup. Texts are gzipped in chunks that
the browser unpacks on demand, so that 25,000 images with four candidates each remain usable.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.record import is_accepted
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.images.catalog import FolderScan, Picture
from domainbed_reasoning.images.decode import file_below, read_rgb

# Images whose texts and thumbnails are unpacked together.
CHUNK = 200

# (images up to, edge of a thumbnail in pixels, WebP quality): 25,000 thumbnails of 96 pixels are about 50 MB.
_THUMBNAILS = ((2_000, 200, 75), (8_000, 128, 70), (1 << 62, 96, 60))


def write_page(
    path: Path,
    title: str,
    on_disk: FolderScan,
    class_names: Sequence[str],
    records: Iterable[Mapping[str, Any]],
    progress: Any = None,
    only_asked: bool = False,
) -> int:
    """Write the page and return its size in bytes.

    Args:
        path: of the page.
        title: its heading.
        on_disk: the images.
        class_names: as in the prompts, one per class folder.
        records: of the chain file; those of unknown images are left out.
        progress: wraps the iteration over the images, as tqdm does.
        only_asked: leave out images without candidates.
    """
    candidates = _by_image(on_disk.pictures, records)
    if only_asked:
        asked = [(picture, own) for picture, own in zip(on_disk.pictures, candidates, strict=True) if own]
        on_disk = dataclasses.replace(on_disk, pictures=tuple(picture for picture, _ in asked))
        candidates = [own for _, own in asked]
    rules = sorted({_rule(record) for own in candidates for record in own if not is_accepted(record)})
    template = _part("browse.html")
    style, script = _part("browse.css"), _part("browse.js")
    fields = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "policy": html.escape(_policy(style, script)),
    }
    before, _, after = template.partition("{{data}}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(_filled(before, fields).encode())
        index = _index(on_disk, class_names, candidates, rules)
        for block in _blocks(on_disk, candidates, index, progress or (lambda items: items)):
            file.write(block.encode())
        file.write(_filled(after, fields).encode())
    return path.stat().st_size


def _part(name: str) -> str:
    return resources.files("domainbed_reasoning.annotate").joinpath(name).read_text("utf-8").strip()


def _filled(template: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def _policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy that only allows this style, this script and embedded images."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _by_image(pictures: Sequence[Picture], records: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    places = {picture.path: number for number, picture in enumerate(pictures)}
    candidates: list[list[Mapping[str, Any]]] = [[] for _ in pictures]
    for record in records:
        place = places.get(record["image"])
        if place is not None:
            candidates[place].append(record)
    return candidates


def _rule(record: Mapping[str, Any]) -> str:
    return str(record.get("rule") or "unnamed")


def _index(
    on_disk: FolderScan,
    class_names: Sequence[str],
    candidates: Sequence[Sequence[Mapping[str, Any]]],
    rules: Sequence[str],
) -> dict[str, Any]:
    domains = {name: number for number, name in enumerate(on_disk.domains)}
    classes = {name: number for number, name in enumerate(on_disk.classes)}
    numbers = {rule: number for number, rule in enumerate(rules)}
    images = [
        [
            picture.path,
            domains[picture.domain],
            classes[picture.label],
            [-1 if is_accepted(record) else numbers[_rule(record)] for record in own],
        ]
        for picture, own in zip(on_disk.pictures, candidates, strict=True)
    ]
    return {
        "domains": on_disk.domains,
        "classes": on_disk.classes,
        "names": class_names,
        "rules": rules,
        "chunk": CHUNK,
        "images": images,
    }


def _blocks(
    on_disk: FolderScan, candidates: Sequence[Sequence[Mapping[str, Any]]], index: Mapping[str, Any], progress: Any
) -> Iterator[str]:
    """Yield the page's data: the index, then texts and thumbnails, a chunk at a time."""
    yield _block("index", _packed(index))
    pictures = on_disk.pictures
    edge, quality = next((edge, quality) for limit, edge, quality in _THUMBNAILS if len(pictures) <= limit)
    with ThreadPoolExecutor() as pool:
        for number, start in enumerate(progress(range(0, len(pictures), CHUNK))):
            texts = [
                [{key: value for key, value in record.items() if key != "image"} for record in own]
                for own in candidates[start : start + CHUNK]
            ]
            yield _block(f"text{number}", _packed(texts))
            paths = [picture.path for picture in pictures[start : start + CHUNK]]
            thumbnails = pool.map(lambda path: _thumbnail(on_disk.root, path, edge, quality), paths)
            yield _block(f"thumb{number}", "\n".join(thumbnails))


def _block(name: str, text: str) -> str:
    return f'<script type="text/plain" id="{name}">\n{text}\n</script>\n'


def _packed(value: Any) -> str:
    return base64.b64encode(gzip.compress(json.dumps(value, ensure_ascii=False).encode(), 6, mtime=0)).decode()


def _thumbnail(root: Path, name: str, edge: int, quality: int) -> str:
    """Return an image as base64 WebP of at most ``edge`` pixels; ``-`` if it cannot be read, or is a link elsewhere."""
    try:
        small = read_rgb(file_below(root, name), draft=edge)
    except OSError:
        return "-"
    small.thumbnail((edge, edge))
    out = io.BytesIO()
    small.save(out, "WEBP", quality=quality, method=3)
    return base64.b64encode(out.getvalue()).decode()
