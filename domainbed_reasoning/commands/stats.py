"""`domainbed-reasoning stats`: coverage, acceptance, reasons for rejection, lengths, tokens and cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.annotate.stats import about_strangers, as_csv, as_table, count, known_and_strange
from domainbed_reasoning.chains.store import read_records
from domainbed_reasoning.commands import arguments

_EXAMPLES = """\
  domainbed-reasoning stats --dataset PACS --data_dir DATA
  domainbed-reasoning stats --dataset PACS --data_dir DATA --csv counts.csv
"""


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write the CSV (a row for each domain and class)."""
    parser = arguments.make_parser("stats", __doc__ or "", _EXAMPLES)
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--csv", type=Path, help="write a row for each domain and class to this file")
    given = parser.parse_args(argv)
    _, on_disk = arguments.open_dataset(given)
    records, strangers = known_and_strange(
        on_disk.pictures, (record for _, record in read_records(given.chains, repair=True))
    )
    groups = count(on_disk.pictures, records)
    if given.csv:
        arguments.write_text(given.csv, as_csv(groups))
        print(f"{len(groups):,} rows written to {given.csv}")
    else:
        print(arguments.printable(as_table(groups, on_disk.classes)))
    if strangers:
        print(about_strangers(strangers))
    return 0
