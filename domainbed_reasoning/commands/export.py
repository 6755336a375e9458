"""`domainbed-reasoning export`: the chains of a dataset, or with ``--job`` a trained model, in formats of others."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Hand on to the one or the other; return the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if any(argument == "--job" or argument.startswith("--job=") for argument in given):
        from domainbed_reasoning.commands import export_model

        return export_model.main(given)
    from domainbed_reasoning.commands import export_chains

    return export_chains.main(given)
