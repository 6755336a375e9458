"""`domainbed-reasoning collect`: a sweep's results as tables, CSV, Markdown and LaTeX, with what does not count."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_reasoning.commands import arguments

if TYPE_CHECKING:
    import pandas as pd

_EXAMPLES = """\
  domainbed-reasoning collect sweep
  domainbed-reasoning collect sweep --format latex --output results.tex   tables to \\input, with the package booktabs
  domainbed-reasoning collect sweep --format csv --output cells.csv       mean and standard error, a row a cell
  domainbed-reasoning collect sweep --format trials --output trials.csv   a row a trial
  domainbed-reasoning collect sweep --format single-source                jobs of one source: CSV, a row a target

The accuracies are those of DomainBed's collect_results, chosen by its own code, save that jobs which did not finish or
ran twice are named and left out; --as-stock counts them. A folder of sweeps, one a setting, makes one table.
From Python: domainbed_reasoning.results.collect(folder) returns a pandas DataFrame.
"""
_CSV = ("csv", "trials", "single-source")
_FORMATS = ("markdown", "latex", *_CSV)


@arguments.ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the results; return the exit code."""
    parser = arguments.make_parser("collect", __doc__ or "", _EXAMPLES)
    parser.add_argument("folder", type=Path, help="the --output_dir of DomainBed's sweep, or a folder of such")
    parser.add_argument("--format", choices=_FORMATS, default="markdown")
    parser.add_argument("--output", type=Path, help="a file (default: standard output)")
    parser.add_argument("--as-stock", action="store_true", help="count what DomainBed's collect_results counts")
    given = parser.parse_args(argv)

    from domainbed_reasoning.results import collect  # DomainBed and torch load when they are needed

    frame = collect(given.folder, as_stock=given.as_stock)
    text = _as_text(frame, given)
    if given.output:
        arguments.write_text(given.output, text)
        print(f"{given.output} written.")
    else:
        print(text, end="")
    if frame.attrs["one_source"] and given.format in ("csv", "trials"):
        print("Jobs with a single source domain are not among these: --format single-source has them.", file=sys.stderr)
    problems = frame.attrs["problems"]
    if problems and (given.output or given.format in _CSV):
        for problem in problems:
            print(f"{problem['kind']}: {problem['job']}: {problem['detail']}. {problem['effect']}.", file=sys.stderr)
        print(f"{len(problems)} problems; --format markdown says where and what to do.", file=sys.stderr)
    return 0


def _as_text(frame: pd.DataFrame, given: argparse.Namespace) -> str:
    from domainbed_reasoning.results.frame import one_source_frame, summarize
    from domainbed_reasoning.results.render import latex, latex_comments, markdown
    from domainbed_reasoning.results.tables import all_tables, result_tables

    if given.format == "single-source":
        return str(one_source_frame(frame).to_csv(index=False))
    if given.format == "trials":
        return str(frame.to_csv(index=False))
    if given.format == "csv":
        return str(summarize(frame).to_csv(index=False))
    if given.format == "latex":
        left_out = [f"{problem['kind']}: {problem['job']}: {problem['detail']}." for problem in frame.attrs["problems"]]
        head = latex_comments(f"domainbed-reasoning collect {given.folder} --format latex", *left_out)
        return "\n".join([*head, "", *map(latex, result_tables(frame))])
    return "\n".join(map(markdown, all_tables(frame)))
