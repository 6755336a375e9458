"""Where this package keeps what it can make or fetch again, one folder a user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/domainbed-reasoning`` or ``~/.cache/domainbed-reasoning``, there or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "domainbed-reasoning"
