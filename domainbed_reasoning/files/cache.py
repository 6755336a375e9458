"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


class NoCacheFolder(OSError):
    """The user has no home folder."""


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/domainbed-reasoning`` or ``~/.cache/domainbed-reasoning``, which may not exist yet.

    Raises:
        NoCacheFolder: this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "domainbed-reasoning"
    except RuntimeError as error:
        raise NoCacheFolder("this user has no home folder: set HOME, or XDG_CACHE_HOME to a folder") from error
