"""`domainbed-reasoning stats`: counts of a chain file, as a table or as CSV."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.annotate.stats import as_csv, as_table, count, describe_unknown
from domainbed_reasoning.commands import arguments

EXAMPLES = """\
  domainbed-reasoning stats --dataset PACS --data-dir DATA
  domainbed-reasoning stats --dataset PACS --data-dir DATA --csv counts.csv
"""


def add_arguments(parser: arguments.Parser) -> None:
    """Add the dataset and --csv."""
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--csv", type=Path, help="write one row per domain and class to this file instead")


def run(args: argparse.Namespace) -> int:
    """Print the table, or write the CSV file."""
    _, on_disk = arguments.open_dataset(args)
    records, unknown = arguments.read_candidates(args, on_disk)
    groups = count(on_disk.pictures, records)
    if args.csv:
        arguments.write_text(args.csv, as_csv(groups))
        print(f"Wrote {len(groups):,} rows to {args.csv}")
    else:
        print(as_table(groups, on_disk.classes))
    if unknown:
        print(describe_unknown(unknown))
    return 0
