"""`domainbed-reasoning card`: a Hugging Face dataset card for a chain file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.annotate.card import render_card
from domainbed_reasoning.annotate.stats import count
from domainbed_reasoning.annotate.teacher import TEACHER_PROMPT_VERSION, q_teacher
from domainbed_reasoning.chains.prompts import PROMPT_VERSION, q_reason
from domainbed_reasoning.chains.store import Record
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.images.catalog import FolderScan, ImageFolder

EXAMPLES = """\
  domainbed-reasoning card --dataset PACS --data-dir DATA
  domainbed-reasoning card --dataset PACS --data-dir DATA --output PACS_card.md --license cc-by-4.0
"""


def add_arguments(parser: arguments.Parser) -> None:
    """Add the dataset and the options of the card."""
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--license", default="other", help="license of the chains (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print or write the card."""
    dataset, on_disk = arguments.open_dataset(args)
    records, unknown = arguments.read_candidates(args, dataset, on_disk)
    card = card_of(dataset, on_disk, args.chains, records, unknown, args.license)
    if unknown:
        print(arguments.unknown_text(args, unknown), file=sys.stderr)
    if args.output:
        arguments.write_text(args.output, card)
        print(f"Wrote {args.output}")
    else:
        print(card, end="")
    return 0


def card_of(
    dataset: ImageFolder, on_disk: FolderScan, chains: Path, records: Sequence[Record], unknown: int, licence: str
) -> str:
    """Return the card of a file of chains; the arguments are those of `render_card`."""
    names = arguments.class_names(dataset, on_disk)
    questions = {
        PROMPT_VERSION: q_reason(names, dataset.subject),
        TEACHER_PROMPT_VERSION: q_teacher(names, dataset.subject),
    }
    groups = count(on_disk.pictures, records)
    return render_card(dataset, on_disk, chains, records, unknown, groups, questions, licence)
