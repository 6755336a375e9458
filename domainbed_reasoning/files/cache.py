"""Where this package keeps what it can make or fetch again, one folder a user."""

from __future__ import annotations

import os
from pathlib import Path


class NoCacheFolder(OSError):
    """There is no place for a cache."""


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/domainbed-reasoning`` or ``~/.cache/domainbed-reasoning``, there or not.

    Raises:
        NoCacheFolder: this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "domainbed-reasoning"
    except RuntimeError as error:
        raise NoCacheFolder("this user has no home folder: set HOME, or XDG_CACHE_HOME to a folder") from error
