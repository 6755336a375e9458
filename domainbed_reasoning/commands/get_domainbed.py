"""`domainbed-reasoning get-domainbed`: the pinned DomainBed into the user's cache folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from domainbed_reasoning.bridge import upstream

_EXAMPLES = """examples:
  domainbed-reasoning get-domainbed
  domainbed-reasoning get-domainbed --from ~/DomainBed
  domainbed-reasoning get-domainbed --from https://git.example.org/mirrors/DomainBed

The clone is used wherever no other DomainBed is importable; one that is the working directory or on PYTHONPATH wins.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Clone, check, and say where; return the exit code."""
    try:
        place = upstream.cached_clone()
    except OSError as error:
        print(f"There is no folder to clone to: {error}.", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(
        prog="domainbed-reasoning get-domainbed",
        description=f"Clone DomainBed at commit {upstream.COMMIT} and check it by its hash.",
        epilog=f"{_EXAMPLES}${upstream.VARIABLE} names another folder than {place}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from", dest="source", default=upstream.URL, help="URL or path of a clone (default: %(default)s)"
    )
    given = parser.parse_args(argv)
    try:
        folder = upstream.fetch_clone(given.source)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"DomainBed, commit {upstream.COMMIT}, is in {folder}")
    return 0
