"""``python -m domainbed_reasoning.sweeps.miniature``; see `regimes`, `variants` and `study`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.sweeps.miniature import regimes, study, table, tiny_model, variants
from domainbed_reasoning.sweeps.miniature.recorded import FOLDER, name_of, recorded
from domainbed_reasoning.sweeps.miniature.study import BETTER_BASE, BETTER_BASE_NOISE, OTHER_BASE, print_design, run
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob

STUDIES: dict[str, Any] = {module.NAME: module for module in (regimes, study)}


def _run(jobs: Iterable[TrainJob], output: Path) -> int:
    """Return 1 if a job failed or, with an error message, if none could be started.

    Jobs that rows share run once, recorded ones not at all.
    """
    elsewhere, distinct = recorded(output), {job.folder: job for job in jobs}
    left = [job for job in distinct.values() if name_of(job, output) not in elsewhere]
    if len(left) < len(distinct):
        print(f"{len(distinct) - len(left)} of {len(distinct)} jobs are recorded in {output / FOLDER}.")
    try:
        return int(run(left, output) > 0)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the design, choose, search, run, test or tabulate; return 1 if a job failed."""
    parser = argparse.ArgumentParser(description=regimes.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--design", action="store_true", help="print the rows and how many of their jobs have completed")
    what.add_argument("--choose", action="store_true", help="run the grids and select by source validation")
    what.add_argument("--base", action="store_true", help="pretrain a second base model that knows the classes better")
    what.add_argument("--run", action="store_true", help="run the remaining jobs")
    what.add_argument("--search", action="store_true", help="run the variants and pick one by source validation")
    what.add_argument("--test", action="store_true", help="run the picked variant on the held-out seeds")
    what.add_argument(
        "--table", action="store_true", help="write rows.csv, choice.csv, table.md and the picked variant"
    )
    parser.add_argument("--study", choices=sorted(STUDIES), default="regimes", help="default: %(default)s")
    parser.add_argument("--output_dir", default="miniature_output", help="of the jobs (default: %(default)s)")
    parser.add_argument("--results_dir", help="of the tables (default: results/ and the study's name)")
    args = parser.parse_args(argv)
    chosen, output = STUDIES[args.study], Path(args.output_dir).absolute()
    try:
        recorded(output)
    except ValueError as error:
        parser.error(str(error))
    if chosen is regimes and (args.run or args.search) and not regimes.learning_rates(output):
        parser.error(f"no learning rates in {output / regimes.RATES_FILE}: run `--choose` first, which writes it")
    if args.search or args.test:
        if chosen is not regimes:
            parser.error("--search and --test need `--study regimes`")
        if args.test and variants.picked(output) is None:
            parser.error(f"no variant in {output / variants.VARIANT_FILE}: run `--search` first, which writes it")
        failed = _run((variants.search_jobs if args.search else variants.test_jobs)(output), output)
        if args.search:
            variants.report(output)
        return failed
    if chosen is regimes and (args.design or args.table):
        chosen = variants.with_picked(output)
    jobs = [(cell[0], chosen.job_of(*cell, output)) for cell in chosen.cells()]
    if args.design:
        print_design(jobs, output)
    elif args.choose:
        failed = _run(chosen.grid_jobs(output), output)
        chosen.report_choice(output)
        return failed
    elif args.base:
        make_better_base(output)
    elif args.run:
        if chosen is study and not (output / BETTER_BASE / "config.json").exists():
            jobs = [(row, job) for row, job in jobs if row not in OTHER_BASE]
            print("Skipping the rows of the second base model: train it with `--base` first.", file=sys.stderr)
        return _run((job for _, job in jobs), output)
    else:
        results = Path(args.results_dir or f"results/{args.study}")
        table.write(output, results, chosen)
        if args.study == regimes.NAME and (picked := output / variants.VARIANT_FILE).exists():
            replace_text(results / variants.VARIANT_FILE, picked.read_text())
    return 0


def make_better_base(output: Path) -> None:
    """Pretrain the embedded model again on lessons with more informative class names; 10 minutes on one core."""
    tiny_model.main(["--output", str(output / BETTER_BASE), "--study-name-noise", str(BETTER_BASE_NOISE)])


if __name__ == "__main__":
    sys.exit(main())
