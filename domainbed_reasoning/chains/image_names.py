"""Names of image files: which ones no chain file can hold, and which two spellings are the same name.

A name on disk is any bytes; chains, predictions and exports are UTF-8 and JSON. What could not be written hours later
is refused before anything is asked or trained. The composed and decomposed Unicode forms (NFC, NFD) of a name are the
same name: macOS writes one, most programs the other.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from domainbed_reasoning.chains.record import check_image_path, check_json_value

_SHOWN = 10


def composed(name: str) -> str:
    """Return the composed form (NFC) of a name."""
    return unicodedata.normalize("NFC", name)


def image_name_problems(paths: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with paths below a dataset's folder, one after the other, with the cure.

    Args:
        paths: as on disk, with ``/``; bytes that are no UTF-8 as Python's file functions spell them.
    """
    seen: dict[str, str] = {}
    for path in paths:
        if check_json_value(path):
            yield f"the name {path!r} is not UTF-8. Rename it (`convmv -f latin1 -t utf8 -r --notest FOLDER` does so)."
        elif fault := check_image_path(path):
            yield f"{fault}. Rename the file or folder."
        elif (form := composed(path)) in seen:
            yield f"{seen[form]!r} and {path!r} are the same name in two Unicode forms. Rename or remove one of them."
        else:
            seen[form] = path


def require_image_names(place: object, paths: Iterable[str]) -> None:
    """Refuse images whose names could not be written down.

    Args:
        place: the dataset's folder, for the message.
        paths: of all images, below it.

    Raises:
        ValueError: naming the first few.
    """
    faults = list(image_name_problems(paths))
    if faults:
        more = f" And {len(faults) - _SHOWN} more." if len(faults) > _SHOWN else ""
        raise ValueError(f"{place}: {' '.join(faults[:_SHOWN])}{more}")


class ImageLookup:
    """Finds the image that a name means: the one of that spelling, or of the same name in another Unicode form.

    Args:
        paths: of all images, below the dataset's folder.
    """

    def __init__(self, paths: Iterable[str]):
        self._paths = {path: path for path in paths}
        forms = [(composed(path), path) for path in self._paths if not path.isascii()]
        self._forms = {form: path for form, path in reversed(forms)}

    def find(self, name: str) -> str | None:
        """Return the path on disk that ``name`` means; None for an image that is not there."""
        found = self._paths.get(name)
        return found if found is not None or name.isascii() else self._forms.get(composed(name))

    def with_path_on_disk(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a chain's record with its image's name as on disk; as it is where there is no such image."""
        return {**record, "image": self.find(record["image"]) or record["image"]}
