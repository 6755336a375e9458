"""`domainbed-reasoning report`: an HTML page about a sweep, with the paper's numbers, plots, examples and commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from domainbed_reasoning.commands import arguments

EXAMPLES = """\
  domainbed-reasoning report sweep                        # writes sweep/report.html and sweep/report.md
  domainbed-reasoning report sweep --output page.html --examples 4
  domainbed-reasoning report sweep --data-dir ~/data      # if the images have moved

The page is self-contained and runs no scripts. It includes the files that `analyze` wrote to sweep/analysis. Plots
require matplotlib: pip install 'domainbed-reasoning[plots]'.
"""


def add_arguments(parser: arguments.Parser) -> None:
    """Add the folder and the options of the page."""
    parser.add_argument("folder", type=Path, help="--output_dir of DomainBed's sweep, or a folder of several")
    parser.add_argument("--output", type=Path, help="HTML file (default: FOLDER/report.html); Markdown goes beside it")
    parser.add_argument(
        "--examples",
        type=arguments.non_negative(int),
        default=2,
        help="correct and incorrect chains per target domain (default: %(default)s)",
    )
    parser.add_argument("--data-dir", help="folder that contains the dataset's folder (default: as in the jobs)")
    parser.add_argument("--as-stock", action="store_true", help="count what DomainBed's collect_results counts")


def run(args: argparse.Namespace) -> int:
    """Write the page and its Markdown version."""
    from domainbed_reasoning.results.report import read_report, write_page  # imports DomainBed and torch
    from domainbed_reasoning.results.report.markdown import render_markdown

    if args.output and args.output.suffix.lower() == ".md":
        raise arguments.UsageError("--output names the HTML page, such as report.html; the Markdown goes beside it")
    report = read_report(args.folder, examples=args.examples, data_dir=args.data_dir, as_stock=args.as_stock)
    page = args.output or args.folder / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    size = write_page(page, report)
    arguments.write_text(page.with_suffix(".md"), render_markdown(report))
    print(f"Wrote {page} ({size / 1e6:.1f} MB) and {page.with_suffix('.md').name}. Open the page in a browser.")
    return 0
