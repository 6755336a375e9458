"""Which DomainBed is used: the importable one, else the pinned clone in the user's cache folder.

Upstream is on no package registry; its users clone it. `domainbed-reasoning get-domainbed` does so at the commit that
this package was written for.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

COMMIT = "b93c22a1cfc3b2428398272c1a116c8de1f4139e"
URL = "https://github.com/facebookresearch/DomainBed"
VARIABLE = "DOMAINBED_REASONING_DOMAINBED"


def cached_clone() -> Path:
    """Return the folder of the pinned clone, there or not: ``$DOMAINBED_REASONING_DOMAINBED`` or the user's cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "domainbed-reasoning" / f"DomainBed-{COMMIT[:7]}"


def find_cached_spec() -> ModuleSpec | None:
    """Return the import spec of `domainbed` in the cached clone; None where there is none."""
    clone = cached_clone()
    if not (clone / "domainbed" / "__init__.py").is_file():
        return None
    return PathFinder.find_spec("domainbed", [str(clone)])


def importable_domainbed() -> Path | None:
    """Return the folder that holds the `domainbed` package which an import would take, without importing it."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec("domainbed", None) if find_spec else None
        if spec is not None:
            return Path(spec.origin).parent.parent if spec.origin else None
    return None
