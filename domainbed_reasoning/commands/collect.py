"""`domainbed-reasoning collect`: a sweep's results as Markdown, LaTeX or CSV, and the jobs that are excluded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_reasoning.commands import arguments
from domainbed_reasoning.terminal import counted

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = """\
  domainbed-reasoning collect sweep
  domainbed-reasoning collect sweep --format latex --output results.tex   for \\input, requires booktabs
  domainbed-reasoning collect sweep --format csv --output cells.csv       mean and standard error, one row per cell
  domainbed-reasoning collect sweep --format trials --output trials.csv   one row per trial
  domainbed-reasoning collect sweep --json                                cells, trials, problems and versions
  domainbed-reasoning collect sweep --format single-source                CSV of single-source jobs, one row per target

Accuracies and model selection are those of DomainBed's collect_results, except that unfinished and duplicate jobs are
listed and excluded; --as-stock includes them. A folder with one sweep per setting gives one table.
In Python: domainbed_reasoning.collect(folder) returns a pandas DataFrame.
"""
_CSV = ("csv", "trials", "single-source")
_FORMATS = ("markdown", "latex", "json", *_CSV)


def add_arguments(parser: arguments.Parser) -> None:
    """Add the folder and the format."""
    parser.add_argument("folder", type=Path, help="--output_dir of DomainBed's sweep, or a folder of several")
    parser.add_argument("--format", choices=_FORMATS, default="markdown", help="default: %(default)s")
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="same as --format json")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--as-stock", action="store_true", help="count what DomainBed's collect_results counts")


def run(args: argparse.Namespace) -> int:
    """Print or write the results."""
    from domainbed_reasoning.results import collect  # imports DomainBed and torch

    frame = collect(args.folder, as_stock=args.as_stock)
    text = _as_text(frame, args)
    if args.output:
        arguments.write_text(args.output, text)
        print(f"Wrote {args.output}.")
    else:
        print(text, end="")
    if frame.attrs["one_source"] and args.format in ("csv", "trials"):
        print("Single-source jobs are not included; use --format single-source.", file=sys.stderr)
    problems = frame.attrs["problems"]
    if problems and args.format != "json" and (args.output or args.format in _CSV):
        for problem in problems:
            print(f"{problem['kind']}: {problem['job']}: {problem['detail']}. {problem['effect']}.", file=sys.stderr)
        print(
            f"{counted(len(problems), 'problem')}. Use --format markdown for details and fixes.",
            file=sys.stderr,
        )
    return 0


def _as_text(frame: pd.DataFrame, args: argparse.Namespace) -> str:
    from domainbed_reasoning.results.all_tables import all_tables, result_tables
    from domainbed_reasoning.results.frame import one_source_frame, summarize
    from domainbed_reasoning.results.render import latex, latex_comments, markdown

    if args.format == "json":
        return arguments.as_json(_as_document(frame)) + "\n"
    if args.format == "single-source":
        return str(one_source_frame(frame).to_csv(index=False))
    if args.format == "trials":
        return str(frame.to_csv(index=False))
    if args.format == "csv":
        return str(summarize(frame).to_csv(index=False))
    if args.format == "latex":
        excluded = [f"{problem['kind']}: {problem['job']}: {problem['detail']}." for problem in frame.attrs["problems"]]
        head = latex_comments(f"domainbed-reasoning collect {args.folder} --format latex", *excluded)
        return "\n".join([*head, "", *map(latex, result_tables(frame))])
    return "\n".join(map(markdown, all_tables(frame)))


def _as_document(frame: pd.DataFrame) -> dict[str, Any]:
    """Return cells (mean and standard error over trials), trials, jobs that need other tables, problems, versions."""
    from domainbed_reasoning.results.frame import one_source_frame, summarize

    tables = {"cells": summarize(frame), "trials": frame, "single_source": one_source_frame(frame)}
    found: dict[str, Any] = {name: table.to_dict("records") for name, table in tables.items()}
    return found | {name: frame.attrs[name] for name in ("domains", "base_to_new", "problems", "versions")}
