"""`make demo`: DomainBed train jobs of ERM and RD-MLDG side by side, and DomainBed's tables.

    python -m domainbed_reasoning.sweeps.demo                   four target domains of the embedded dataset
    python -m domainbed_reasoning.sweeps.demo --targets 2       one of them
    python -m domainbed_reasoning.sweeps.demo --dataset PACSReasoning --data_dir ~/data

On the embedded datasets of the study in two regimes, rows have the study's settings and learning rates, each its own,
so their jobs are started together. On other datasets the demo is one stock sweep with the defaults. It prints the
commands that it runs. Rerun it to resume: the remains of incomplete jobs are removed, and only missing jobs start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_reasoning import interrupt
from domainbed_reasoning.bridge import stock, upstream
from domainbed_reasoning.images import creatures
from domainbed_reasoning.registry import RENDERED
from domainbed_reasoning.sweeps.demo_summary import BALANCED, ROWS, finished_runs, print_claims, print_summary
from domainbed_reasoning.sweeps.launchers import jobs
from domainbed_reasoning.sweeps.launchers.forked import forked_launcher
from domainbed_reasoning.sweeps.launchers.parallel import parallel_launcher
from domainbed_reasoning.sweeps.launchers.restart import check_nothing_runs, check_settings, sole_launch
from domainbed_reasoning.sweeps.miniature import regimes, study
from domainbed_reasoning.sweeps.stock import choose_domainbed, run_stock, with_located
from domainbed_reasoning.sweeps.studies.train_jobs import Launcher, TrainJob
from domainbed_reasoning.terminal import printable_streams

DEFAULT = "ClearCreaturesReasoning"
SEED = 0
STEPS_DIVIDED_BY = 2  # the study's 244 updates would take 20 minutes on two cores
CPU_STEPS = 60
# The defaults on real images are those of models with billions of parameters.
TINY_ON_REAL_IMAGES = {"model": "tiny", "max_new_tokens": 64, "eval_batch": 64, "micro_batch": 64}
STOCK_ROWS = [name for name in ROWS if name != BALANCED]
ABOUT_CREATURES = """
What they do not say: anything about InternVL3-8B. A model with 1.4 million parameters learns twelve synthetic classes;
chance is 8%. The regime is the paper's: the model knows the names, and its teacher writes in another style. One seed
and {images} images per cell: cells move by several points from seed to seed. Settings are those of the study in two
regimes (results/regimes), with half of its updates. No setting was chosen by the accuracy on a target domain.
{rates}"""
ABOUT_SHAPES = """
About these numbers: with seven classes, chance is 14%. The background's hue correlates with the class in the source
domains, and with another class in the target domain. In its 121 steps ERM learns little but this hue, so it falls below
chance there (as it does after 550 steps); it has not converged. The tables use the answer that each method is trained
on: the class name for LabelSFT, the chain for the others. One seed, 112 images per cell: differences of 10 points
between the fine-tuned rows are noise."""


@printable_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the jobs, print tables and summary; return 1 if a job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DEFAULT, help="default: %(default)s, which requires no data")
    parser.add_argument("--data_dir", default="", help="DomainBed's data folder, which contains the dataset's folder")
    parser.add_argument("--targets", default="", help='target domains by number, as in "2" or "0 2" (default: all)')
    parser.add_argument("--model", default="", help="a folder or hub id (default: the embedded tiny model)")
    parser.add_argument("--chains", default="", help="a chain file, bundled, or none (default: the dataset's own)")
    parser.add_argument(
        "--steps", type=int, help=f"of every job (default: the dataset's; {CPU_STEPS} for real images on a CPU)"
    )
    parser.add_argument("--output_dir", default="demo_output", help="default: %(default)s")
    parser.add_argument("--stand_in", default="", help="folder of a stand-in, used if DomainBed is missing")
    args = parser.parse_args(argv)
    if args.dataset not in RENDERED and not args.data_dir:
        parser.error(f"{args.dataset} requires --data_dir (make demo DATA_DIR=…), the folder that contains its images")
    if args.dataset in RENDERED and args.chains:
        parser.error(f"{args.dataset} renders its chains with its images: omit --chains (make demo CHAINS=…)")
    interrupt.end_with("Interrupted. Rerun this command to resume.")
    start = time.monotonic()
    domainbed = choose_domainbed(args.stand_in)
    output = Path(args.output_dir).absolute() / args.dataset
    if not args.model:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the embedded model is not on the hub
    sweeps = output
    try:
        if args.dataset in creatures.REGIME_OF and not args.model:
            failed = run_regime(args.dataset, output, args.targets, args.steps, domainbed)
            sweeps = output / creatures.REGIME_OF[args.dataset]
        else:
            failed = run_sweep(args, output, domainbed)
    except ValueError as error:
        parser.error(str(error))
    print(f"\nTotal time: {time.monotonic() - start:.0f} s. DomainBed: {upstream.describe(domainbed)}.")
    for folder in failed:
        print(f"FAILED: {folder / jobs.LOG}")
    program = f"{os.path.relpath(sys.executable)} -m domainbed_reasoning"
    print("More tables, and a page with the paper's numbers beside these:")
    print("\n".join(f"  {program} {verb} {os.path.relpath(sweeps)}" for verb in ("collect", "report")))
    return 1 if failed else 0


def run_regime(dataset: str, output: Path, targets: str, steps: int | None, domainbed: Path) -> list[Path]:
    """Run the rows of the study in two regimes on a dataset, print everything, and return the failed jobs' folders.

    Args:
        dataset: of one of the regimes.
        output: folder of the jobs.
        targets: target domains by number; "" for all.
        steps: of every job; None for half of the study's.
        domainbed: DomainBed's folder.

    Raises:
        ValueError: there is no such target, another process runs these jobs, or the folder has jobs of other settings.
    """
    rows = regime_jobs(dataset, output, target_domains(targets), steps)
    rates = {name: json.loads(own[0].arguments["hparams"]).get("lr") for name, own in rows.items()}
    output.mkdir(parents=True, exist_ok=True)
    check_settings(output, {"steps": steps, "learning rates": rates})
    # The longest jobs first, so that the last ones end together.
    all_jobs = [job for own in reversed(rows.values()) for job in own]
    print(f"{len(all_jobs)} jobs of {len(rows)} rows, such as\n$ {all_jobs[0].command}")
    with contextlib.chdir(domainbed):
        study.run(all_jobs, output, choose_launcher())
    folders = {name: own[0].sweep for name, own in rows.items()}
    for folder in dict.fromkeys(folders.values()):
        if folder != folders["MTCT"]:
            print(f"\n{', '.join(name for name, its in folders.items() if its == folder)}:")
        run_stock("collect_results", "--input_dir", str(folder), cwd=domainbed, environment=os.environ)
    done = {job.folder for job in all_jobs if job.done}
    runs = [*finished_runs(folders["MTCT"]), *finished_runs(folders[BALANCED], BALANCED)]
    runs = [run for run in runs if run.folder in done]
    print_summary(runs, creatures.DOMAINS, list(rows))
    regime = creatures.REGIME_OF[dataset]
    print_claims(runs, regimes.PAPERS_DATASETS[regime])
    print(ABOUT_CREATURES.format(images=round(0.8 * creatures.SIZE_OF_DOMAIN), rates=describe_rates(regime)))
    return [job.folder for job in all_jobs if not job.done]


def regime_jobs(dataset: str, output: Path, targets: Sequence[int], steps: int | None) -> dict[str, list[TrainJob]]:
    """Return the jobs of every row, evaluated after the last step only.

    Args:
        dataset: of one of the regimes.
        output: folder of the jobs.
        targets: numbers of the target domains.
        steps: of every trained row; None for half of the study's.
    """
    found = {}
    for row in regimes.ROWS:
        if row.name in ROWS:
            length = 1 if row.steps == 1 else steps or row.steps // STEPS_DIVIDED_BY
            at_the_end = {"first_evaluation": length} if row.hparams.get("first_evaluation") else {}
            own = replace(row, steps=length, hparams=row.hparams | at_the_end)
            regime = creatures.REGIME_OF[dataset]
            found[row.name] = [
                regimes.job_of(own, regime, target, SEED, output, creatures.PER_CLASS) for target in targets
            ]
    return {name: found[name] for name in ROWS}


def target_domains(chosen: str) -> list[int]:
    """Return the numbers of target domains; all for "".

    Raises:
        ValueError: there is no such domain.
    """
    numbers = chosen.replace(",", " ").split() or [str(number) for number in regimes.TARGETS]
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(creatures.DOMAINS))
    for number in numbers:
        if number not in map(str, regimes.TARGETS):
            raise ValueError(f"no target domain {number!r}; available: {known}")
    return [int(number) for number in dict.fromkeys(numbers)]


def choose_launcher() -> Launcher:
    """Return the launcher with the least overhead that this machine supports."""
    import torch

    if torch.cuda.is_available() or sys.platform != "linux":
        return parallel_launcher
    return forked_launcher


def describe_rates(regime: str) -> str:
    """Return the learning rates by row, and how they were chosen."""
    rates = {name: regimes.rate_of(name, name.split()[0], regime) for name in ROWS if name != "MLLMZeroShot"}
    selected = "selected on the source domains' validation splits by the study's grid"
    how = selected if regimes.learning_rates() else "the middle of the study's grid, none selected yet"
    return f"Learning rates ({how}): {', '.join(f'{name} {rate:g}' for name, rate in rates.items())}."


def run_sweep(args: argparse.Namespace, output: Path, domainbed: Path) -> list[Path]:
    """Run a stock sweep with the defaults, print everything, and return the failed jobs' folders.

    Raises:
        ValueError: another process runs these jobs, or the folder has jobs of other settings.
    """
    environment = {**os.environ, jobs.TARGETS: args.targets}
    sweep = ["--algorithms", *STOCK_ROWS, "--datasets", args.dataset, "--n_hparams", "1", "--n_trials", "1"]
    sweep += ["--single_test_envs", "--command_launcher", "parallel", "--skip_confirmation"]
    sweep += ["--data_dir", str(Path(args.data_dir or output).absolute()), "--output_dir", str(output)]
    hparams: dict[str, Any] = {}
    if args.dataset not in RENDERED or args.model:
        hparams = {"model": args.model} if args.model else TINY_ON_REAL_IMAGES
        if args.chains:
            hparams = hparams | {"chains": args.chains}
        hparams = with_located(hparams)
        sweep += ["--hparams", json.dumps(hparams)]
    if steps := args.steps or choose_steps(args.dataset):
        sweep += ["--steps", str(steps)]
    with sole_launch(output):
        check_nothing_runs(output)
        check_settings(output, {"steps": steps, "hparams": hparams})
        run_stock("sweep", "delete_incomplete", *sweep, cwd=domainbed, environment=environment)
        run_stock("sweep", "launch", *sweep, cwd=domainbed, environment=environment)
    run_stock("collect_results", "--input_dir", str(output), cwd=domainbed, environment=environment)
    print_summary(list(finished_runs(output)), environment_names(args.dataset), STOCK_ROWS)
    if args.dataset == "ShapesReasoning":
        print(ABOUT_SHAPES)
    return sorted(log.parent for log in output.glob(f"*/{jobs.LOG}") if not (log.parent / "done").exists())


def choose_steps(dataset: str) -> int | None:
    """Return a number of steps for a CPU if the dataset's own would take days; else None."""
    import torch

    if dataset in RENDERED or torch.cuda.is_available():
        return None
    print(f"No GPU found: every job is limited to {CPU_STEPS} steps. The tables only show that the pipeline works.")
    return CPU_STEPS


def environment_names(dataset: str) -> Sequence[str]:
    """Return the names of the dataset's domains."""
    datasets = stock.datasets()

    names: Sequence[str] = datasets.get_dataset_class(dataset).ENVIRONMENTS
    return names


if __name__ == "__main__":
    sys.exit(main())
