"""Names of image files: validation before a run, and lookup across Unicode normal forms.

A name on disk is any bytes; chains, predictions and exports are UTF-8 JSON. Names that cannot be written there are
rejected before any request or training. The composed and decomposed Unicode forms (NFC, NFD) of a name are equal:
macOS writes one, most programs the other.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from domainbed_reasoning.chains.record import check_image_path, check_json_value

_SHOWN = 10


def composed(name: str) -> str:
    """Return the composed form (NFC) of a name; UTF-8 that Python read as another encoding (LC_ALL=C) is decoded."""
    if not name.isascii():
        with contextlib.suppress(UnicodeError):
            name = os.fsencode(name).decode("utf-8")
    return unicodedata.normalize("NFC", name)


def image_name_problems(paths: Iterable[str]) -> Iterator[str]:
    """Yield the problems of paths below a dataset's folder, each with its fix.

    Args:
        paths: as on disk, with ``/``; bytes that are not UTF-8 as surrogate escapes.
    """
    seen: dict[str, str] = {}
    for path in paths:
        is_plain = path.isascii() and path.isprintable()  # most are, and a million take a second
        if not is_plain and check_json_value(composed(path)):
            yield f"the name {path!r} is not UTF-8. Rename it (`convmv -f latin1 -t utf8 -r --notest FOLDER`)."
        elif problem := check_image_path(path):
            yield f"{problem}. Rename the file or folder."
        elif (form := composed(path)) in seen:
            yield f"{seen[form]!r} and {path!r} are the same name in two Unicode forms. Rename or remove one of them."
        else:
            seen[form] = path


def require_image_names(place: object, paths: Iterable[str]) -> None:
    """Check that the names of all images can be stored.

    Args:
        place: the dataset's folder, for the message.
        paths: of all images, below it.

    Raises:
        ValueError: listing the first invalid names.
    """
    problems = list(image_name_problems(paths))
    if problems:
        more = f" And {len(problems) - _SHOWN} more." if len(problems) > _SHOWN else ""
        raise ValueError(f"{place}: {' '.join(problems[:_SHOWN])}{more}")


class ImageLookup:
    """Looks up images by path, exactly or up to the Unicode normal form.

    Args:
        paths: of all images, below the dataset's folder.
    """

    def __init__(self, paths: Iterable[str]):
        self._paths = {path: path for path in paths}
        forms = [(composed(path), path) for path in self._paths if not path.isascii()]
        self._forms = {form: path for form, path in reversed(forms)}

    def find(self, name: str) -> str | None:
        """Return the path on disk of ``name``; None if there is no such image."""
        found = self._paths.get(name)
        return found if found is not None or name.isascii() else self._forms.get(composed(name))

    def with_path_on_disk(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with its image's path as on disk; unchanged if there is no such image."""
        return {**record, "image": self.find(record["image"]) or record["image"]}
