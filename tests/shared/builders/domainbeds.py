"""The DomainBed under test: the stand-in, and upstream where found."""

from pathlib import Path

from domainbed_reasoning.bridge import upstream

STAND_IN = Path(__file__).resolve().parents[2] / "standin"
NO_UPSTREAM = "no upstream DomainBed here: `domainbed-reasoning get-domainbed` fetches it"


def _find_upstream() -> Path | None:
    for folder in (upstream.importable_domainbed(), upstream.cached_clone()):
        if folder and (folder / "domainbed" / "__init__.py").is_file() and not upstream.is_stand_in(folder):
            return folder
    return None


UPSTREAM = _find_upstream()
