"""`domainbed-reasoning stats`: counts of a chain file and its rejection rates by rule, as tables or CSV."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from domainbed_reasoning.annotate.rule_rates import measure_rules, rates_as_text
from domainbed_reasoning.annotate.stats import as_csv, as_dicts, as_table, count
from domainbed_reasoning.commands import arguments

EXAMPLES = """\
  domainbed-reasoning stats --dataset PACS --data-dir DATA
  domainbed-reasoning stats --dataset PACS --data-dir DATA --csv counts.csv
  domainbed-reasoning stats --dataset PACS --data-dir DATA --chains bundled

The table of rules shows how often each rule rejects chains that conclude the label (it should not), other chains, and
chains that conclude the label after their conclusion is replaced by another class.
"""


def add_arguments(parser: arguments.Parser) -> None:
    """Add the dataset and --csv."""
    arguments.add_dataset_arguments(parser)
    arguments.add_json(parser)
    parser.add_argument("--csv", type=Path, help="write one row per domain and class to this file instead")


def run(args: argparse.Namespace) -> int:
    """Print the table, or write the CSV file."""
    dataset, on_disk = arguments.open_dataset(args)
    records, unknown = arguments.read_candidates(args, dataset, on_disk)
    groups = count(on_disk.pictures, records)
    if args.csv and args.json:
        raise arguments.UsageError("--json prints the counts; it cannot be combined with --csv")
    if args.csv:
        arguments.write_text(args.csv, as_csv(groups))
        print(f"Wrote {len(groups):,} rows to {args.csv}")
    else:
        from tqdm import tqdm

        judged = tqdm(records, "judging", unit="chain", leave=False, disable=None, file=sys.stderr)
        names = arguments.class_names(dataset, on_disk)
        rates = measure_rules(judged, on_disk.labels(), names)
        if args.json:
            found = {"groups": as_dicts(groups), "rules": dataclasses.asdict(rates), "unknown": unknown}
            arguments.print_json(found)
            return 0
        print(as_table(groups, on_disk.classes), "", rates_as_text(rates), sep="\n")
    if unknown:
        print(arguments.unknown_text(args, unknown))
    return 0
