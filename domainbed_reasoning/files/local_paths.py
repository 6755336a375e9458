"""What is published of local paths: their last part."""

from __future__ import annotations

import pathlib


def without_folders(value: str) -> str:
    """Return the name of a local file or folder without its path; anything else, such as a hub id, as it is."""
    path = pathlib.Path(value)
    is_local = path.is_absolute() or value.startswith("~") or (len(path.parts) > 1 and path.exists())
    return pathlib.PurePath(value).name if is_local else value
