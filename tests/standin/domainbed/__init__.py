"""A stand-in for DomainBed: the part of its public interface that a plug-in and its users touch, written anew.

It is for tests and demonstrations on machines that cannot reach the real library. The contract tests in
``tests/contract`` hold it to the behavior of the real one wherever that is present.
"""

import sys

STANDIN = True


def announce(command: str) -> None:
    """Say on stderr, which no table is read from, that ``command`` is the stand-in's."""
    print(f"stand-in for DomainBed: {command} is not the real library's command", file=sys.stderr)
