"""`domainbed-reasoning browse`: one HTML page to look through images, chains, verdicts and reasons."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.annotate.browse import write_page
from domainbed_reasoning.annotate.stats import about_strangers, known_and_strange
from domainbed_reasoning.chains.store import read_records
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.images.decode import is_below

_EXAMPLES = """\
  domainbed-reasoning browse --dataset PACS --data_dir DATA
  domainbed-reasoning browse --dataset PACS --data_dir DATA --output pacs.html --only-asked

The page holds everything, thumbnails too, loads nothing and can be sent to others. Keys: ← → pages, / search.
"""


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and say where it is."""
    parser = arguments.make_parser("browse", __doc__ or "", _EXAMPLES)
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--output", type=Path, help="the page (default: DATASET_chains.html in this folder)")
    parser.add_argument("--only-asked", action="store_true", help="leave out images without a candidate")
    given = parser.parse_args(argv)
    dataset, on_disk = arguments.open_dataset(given)
    from tqdm import tqdm

    records, strangers = known_and_strange(
        on_disk.pictures, (record for _, record in read_records(given.chains, repair=True))
    )
    output = given.output or Path(f"{dataset.name}_chains.html")
    names = arguments.class_names(dataset, on_disk)
    progress = functools.partial(tqdm, file=sys.stderr, unit="chunk", leave=False)
    size = write_page(output, f"{dataset.name}: chains", on_disk, names, records, progress, given.only_asked)
    print(f"{output} ({size / 1e6:.1f} MB); open it in a browser.")
    if links := sum(not is_below(on_disk.root, picture.path) for picture in on_disk.pictures):
        print(f"{arguments.counted(links, 'image')} not shown: links out of {on_disk.root}, which the page keeps to.")
    if strangers:
        print(about_strangers(strangers))
    return 0
