"""`domainbed-reasoning get-domainbed`: a clone of the supported DomainBed commit in the cache folder."""

from __future__ import annotations

import argparse
import sys

from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.commands import doctor
from domainbed_reasoning.commands.arguments import Parser

EXAMPLES = f"""\
  domainbed-reasoning get-domainbed
  domainbed-reasoning get-domainbed --from ~/DomainBed
  domainbed-reasoning get-domainbed --from https://git.example.org/mirrors/DomainBed

The clone is used if no other DomainBed is importable; the working directory and PYTHONPATH take precedence.
${upstream.VARIABLE} sets another folder than the cache folder.
"""


def add_arguments(parser: Parser) -> None:
    """Add the source."""
    parser.add_argument(
        "--from", dest="source", default=upstream.URL, help="URL or path to clone from (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Clone DomainBed, verify the commit, and print the folder."""
    try:
        folder = upstream.fetch_clone(args.source)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"DomainBed at commit {upstream.COMMIT} is in {folder}")
    for finding in doctor.check_extras():
        if finding.text.startswith("domainbed:") and finding.fix:
            print(f"To install what it imports: {finding.fix}")
    return 0
