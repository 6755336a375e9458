"""`domainbed-reasoning card`: the datasheet of a chain file, as a Hugging Face dataset card."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.annotate.card import render_card
from domainbed_reasoning.annotate.stats import about_strangers, count, known_and_strange
from domainbed_reasoning.annotate.teacher import TEACHER_PROMPT_VERSION, q_teacher
from domainbed_reasoning.chains.prompts import PROMPT_VERSION, q_reason
from domainbed_reasoning.chains.store import read_records
from domainbed_reasoning.commands import arguments

_EXAMPLES = """\
  domainbed-reasoning card --dataset PACS --data_dir DATA
  domainbed-reasoning card --dataset PACS --data_dir DATA --output README.md --licence cc-by-4.0
"""


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Print the card, or write it."""
    parser = arguments.make_parser("card", __doc__ or "", _EXAMPLES)
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--licence", "--license", default="other", help="of the chains (default: %(default)s)")
    given = parser.parse_args(argv)
    dataset, on_disk = arguments.open_dataset(given)
    records, strangers = known_and_strange(
        on_disk.pictures, (record for _, record in read_records(given.chains, repair=True))
    )
    names = arguments.class_names(dataset, on_disk)
    questions = {
        PROMPT_VERSION: q_reason(names, dataset.subject),
        TEACHER_PROMPT_VERSION: q_teacher(names, dataset.subject),
    }
    groups = count(on_disk.pictures, records)
    card = render_card(dataset, on_disk, given.chains, records, strangers, groups, questions, given.licence)
    if strangers:
        print(about_strangers(strangers), file=sys.stderr)
    if given.output:
        arguments.write_text(given.output, card)
        print(f"The card is in {given.output}")
    else:
        print(card, end="")
    return 0
