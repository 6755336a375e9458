"""Train and test the small model on a fixed sample of PACS, one domain held out at a time, through the stock scripts.

    python -m examples.real_small.run --model ~/models/real-small --data_dir ~/data --choose    select learning rates
    python -m examples.real_small.run --run      run the remaining jobs and measure their terms; rerun to resume
    python -m examples.real_small.run --table    write results/real_small, also of an unfinished run

The output folder records the settings, so that later calls need none. `rows` has the design.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.sweeps.launchers.restart import SETTINGS, check_settings
from domainbed_reasoning.sweeps.miniature.study import run
from examples.real_small import table, terms
from examples.real_small.rows import ZERO_SHOT, Settings, cells, choose, grid
from examples.real_small.sample import sha256_of, write_sample

DEFAULTS = {"per_class": 8, "steps": 20, "sample_seed": 0}
WEIGHTS = "model.safetensors"


def settings_of(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Return the settings of a run: those of the command, or else the recorded ones, or else the defaults.

    Raises:
        ValueError: they differ from the recorded ones, or the model or the data are unknown.
    """
    path = output / SETTINGS
    recorded = json.loads(path.read_text()) if path.exists() else {}
    chosen = {name: getattr(args, name) for name in ("model", "data_dir", *DEFAULTS)}
    settings = DEFAULTS | recorded | {name: value for name, value in chosen.items() if value is not None}
    for name in ("model", "data_dir"):
        if name not in settings:
            raise ValueError(f"{output} records no {name}. Pass --{name}.")
    for name, least in (("per_class", 2), ("steps", 1)):
        if settings[name] < least:
            raise ValueError(f"--{name} must be {least} or more; got {settings[name]}.")
    model = Path(settings["model"]).expanduser()
    if model.is_dir():
        settings["model"] = str(model.resolve())
    settings["data_dir"] = str(Path(settings["data_dir"]).expanduser().resolve())
    if (model / WEIGHTS).exists():
        settings["model_sha256"] = sha256_of(model / WEIGHTS)
    if recorded:
        check_settings(output, settings)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Choose, run or tabulate; return 1 if a job failed or, with a message, if none could be started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--choose", action="store_true", help="run the grid and select rates by source validation")
    what.add_argument("--run", action="store_true", help="run the remaining jobs")
    what.add_argument("--table", action="store_true", help="write numbers.json, table.md and chains.md")
    parser.add_argument("--model", help="folder that build.py wrote, or any model that this package loads")
    parser.add_argument("--data_dir", help="folder that contains PACS")
    parser.add_argument("--output_dir", default="real_small_output", help="of the jobs (default: %(default)s)")
    parser.add_argument("--results_dir", default="results/real_small", help="of the tables (default: %(default)s)")
    parser.add_argument("--per_class", type=int, help=f"images a class and domain (default: {DEFAULTS['per_class']})")
    parser.add_argument("--steps", type=int, help=f"updates of every trained row (default: {DEFAULTS['steps']})")
    parser.add_argument("--sample_seed", type=int, help=f"of the sample (default: {DEFAULTS['sample_seed']})")
    args = parser.parse_args(argv)
    try:
        return _run(args, Path(args.output_dir).expanduser().resolve())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


def _run(args: argparse.Namespace, output: Path) -> int:
    chosen = settings_of(args, output)
    settings = Settings(chosen["model"], output, chosen["per_class"], chosen["steps"])
    if args.table:
        table.write(settings, Path(args.results_dir))
        return 0
    write_sample(Path(chosen["data_dir"]), output, settings.per_class, chosen["sample_seed"])
    check_settings(output, chosen)
    if args.choose:
        failed = run((job for _, _, job in grid(settings)), output)
        return int(choose(settings) is None or failed > 0)
    jobs = cells(settings)
    failed = run((job for _, _, job in jobs), output)
    for row, _, job in jobs:
        if row is not ZERO_SHOT and job.done:
            terms.measure_job(job.folder, output)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
