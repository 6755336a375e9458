"""`domainbed-reasoning browse`: an HTML page of images, chains, verdicts and reasons."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from domainbed_reasoning.annotate.browse import write_page
from domainbed_reasoning.commands import arguments
from domainbed_reasoning.images.decode import is_below
from domainbed_reasoning.terminal import counted

EXAMPLES = """\
  domainbed-reasoning browse --dataset PACS --data-dir DATA
  domainbed-reasoning browse --dataset PACS --data-dir DATA --output pacs.html --only-asked
  domainbed-reasoning browse --dataset PACS --data-dir DATA --chains bundled

The page is self-contained, thumbnails included. Keys: ← → change the page, / searches.
"""


def add_arguments(parser: arguments.Parser) -> None:
    """Add the dataset and the options of the page."""
    arguments.add_dataset_arguments(parser)
    parser.add_argument("--output", type=Path, help="HTML file (default: DATASET_chains.html in this folder)")
    parser.add_argument("--only-asked", action="store_true", help="omit images without candidates")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    dataset, on_disk = arguments.open_dataset(args)
    from tqdm import tqdm

    records, unknown = arguments.read_candidates(args, dataset, on_disk)
    output = args.output or Path(f"{dataset.name}_chains.html")
    names = arguments.class_names(dataset, on_disk)
    progress = functools.partial(tqdm, file=sys.stderr, unit="chunk", leave=False, disable=None)
    size = write_page(output, f"{dataset.name}: chains", on_disk, names, records, progress, args.only_asked)
    print(f"Wrote {output} ({size / 1e6:.1f} MB). Open it in a browser.")
    if links := sum(not is_below(on_disk.root, picture.path) for picture in on_disk.pictures):
        print(f"{counted(links, 'image')} not shown: symbolic links that leave {on_disk.root}.")
    if unknown:
        print(arguments.unknown_text(args, unknown))
    return 0
