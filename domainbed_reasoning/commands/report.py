"""`domainbed-reasoning report`: one page about a sweep, beside the paper, with plots, examples and commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.commands import arguments

_EXAMPLES = """\
  domainbed-reasoning report sweep                                sweep/report.html and sweep/report.md
  domainbed-reasoning report sweep --output page.html --examples 4
  domainbed-reasoning report sweep --data_dir ~/data              where the images lie now

The page holds everything, loads nothing, runs no script and can be sent to others. What analyses left in
sweep/analysis (CSV and PNG files) is taken in. Plots need matplotlib: pip install 'domainbed-reasoning[plots]'.
"""


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Write page and Markdown; return the exit code."""
    parser = arguments.make_parser("report", __doc__ or "", _EXAMPLES)
    parser.add_argument("folder", type=Path, help="the --output_dir of DomainBed's sweep, or a folder of such")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the folder); .md goes beside it")
    parser.add_argument("--examples", type=int, default=2, help="right and wrong chains a target domain (default: 2)")
    parser.add_argument("--data_dir", "--data-dir", help="where the images are, if not where the jobs found them")
    parser.add_argument("--as-stock", action="store_true", help="count what DomainBed's collect_results counts")
    given = parser.parse_args(argv)

    from domainbed_reasoning.results.report import (  # DomainBed and torch load when they are needed
        read_report,
        write_page,
    )
    from domainbed_reasoning.results.report.markdown import render_markdown

    report = read_report(given.folder, examples=given.examples, data_dir=given.data_dir, as_stock=given.as_stock)
    page = given.output or given.folder / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    size = write_page(page, report)
    arguments.write_text(page.with_suffix(".md"), render_markdown(report))
    print(f"{page} ({size / 1e6:.1f} MB) and {page.with_suffix('.md').name}; open the page in a browser.")
    return 0
