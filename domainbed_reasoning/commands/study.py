"""`domainbed-reasoning study`: prints or runs the DomainBed commands for the paper's tables."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.chains.bundled import BUNDLED
from domainbed_reasoning.chains.training_chains import NONE
from domainbed_reasoning.commands.arguments import Parser, UsageError, add_json, json_object, positive, print_json
from domainbed_reasoning.commands.plan import schedule_of
from domainbed_reasoning.hparam_checks import check_values
from domainbed_reasoning.images import catalog
from domainbed_reasoning.images import user_datasets as custom
from domainbed_reasoning.results import published
from domainbed_reasoning.sweeps.stock import located, with_located
from domainbed_reasoning.sweeps.studies.study import (
    EMBEDDED,
    STUDIES,
    Grid,
    Settings,
    Study,
    collect_commands,
    jobs_of,
    load_study,
    sweep_command,
)

EXAMPLES = """\
  domainbed-reasoning study                                                       # list the studies
  domainbed-reasoning study ablation --data-dir ~/data                            # print commands, hours and claim
  domainbed-reasoning study ablation --scale mini --launch                        # on a laptop, needs no data
  domainbed-reasoning study ablation --data-dir ~/data --launch --launcher slurm --model ~/models/InternVL3-8B-hf

Rerun a study to resume: it starts the jobs that are missing, failed or were killed. The exit code is 1 if a job has not
completed.
"""
_STOCK_LAUNCHERS = ("local", "multi_gpu", "dummy")
# `make demo DATASET=ShapesReasoning`: 24 jobs of our algorithms and ERM in 420 s on 2 cores.
_MINI_CORE_SECONDS = 35
_CHAIN_TOKENS = 250  # the paper's chains


def add_arguments(parser: Parser) -> None:
    """Add the study, what to do with it, and the settings of its jobs."""
    parser.add_argument("name", nargs="?", help="name of the study (default: list the studies)")
    add_json(parser)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--print", action="store_true", help="print claim, commands and expected hours (default)")
    action.add_argument("--launch", action="store_true", help="run the commands, then collect_results")
    parser.add_argument("--scale", choices=("paper", "mini"), default="paper", help=f"mini: {EMBEDDED}, tiny model")
    parser.add_argument("--data-dir", help="folder that contains the datasets' folders")
    parser.add_argument(
        "--datasets", nargs="+", metavar="DATASET", help="instead of the study's: ours or yours, e.g. CameraBaseToNew"
    )
    parser.add_argument("--output-dir", help="default: study_output/<name>-<scale>")
    parser.add_argument("--launcher", default="parallel", help="parallel (default), ray, slurm, local, …")
    parser.add_argument("--model", default="", help="folder or hub id of the multimodal LLM")
    parser.add_argument(
        "--hparams",
        type=json_object,
        default="{}",
        help="JSON, overrides the study's for algorithms on a multimodal LLM; clip_… for those on CLIP",
    )
    parser.add_argument("--steps", type=positive(int), help="DomainBed's --steps, for all jobs")
    parser.add_argument("--n-trials", type=positive(int), help="number of trial seeds (default: the study's)")
    parser.add_argument("--gpu", default="H200", help="for the expected hours (default: %(default)s)")
    parser.add_argument("--gpus", type=positive(int), default=1, help="number of GPUs (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """List the studies, print one, or run it; return 1 if a job has not completed."""
    if args.launch and args.json:
        raise UsageError("--json prints a study; it cannot be combined with --launch")
    if args.name is None:
        if args.launch:
            raise UsageError("--launch requires the name of a study")
        if args.json:
            print_json([{"name": name, "title": load_study(name).title} for name in STUDIES])
            return 0
        print(listing())
        return 0
    study = _on_datasets(load_study(args.name), args)
    settings = _settings(study, args)
    if args.json:
        print_json(as_dict(study, args.scale, settings, args.gpu, args.gpus))
        return 0
    if not args.launch:
        print(describe(study, args.scale, settings, args.gpu, args.gpus))
        return 0
    if args.scale == "paper":
        _check_data(study, args.data_dir, settings)
    from domainbed_reasoning.sweeps.studies.launch import launch

    code: int = launch(study, args.scale, settings)
    return code


def listing() -> str:
    """Return one line per study."""
    lines = [f"  {name:<22}{load_study(name).title}" for name in STUDIES]
    return "\n".join(["studies", *lines, "", "Run `domainbed-reasoning study NAME` for claim, commands and hours."])


def _on_datasets(study: Study, args: argparse.Namespace) -> Study:
    """Return the study on the datasets of ``--datasets``, if there are any.

    Raises:
        ValueError: for an unknown dataset, or one that does not fit the study.
    """
    if not args.datasets:
        return study
    if args.scale == "mini":
        raise UsageError(f"--datasets requires --scale paper; --scale mini uses {study.embedded}")
    own = custom.custom_datasets()
    known = (registry.DATASETS.keys() - set(registry.RENDERED)) | (custom.targets(own).keys() - own.keys())
    halved = {name for name in known if name.endswith(registry.BASE_TO_NEW)}
    fitting = halved if study.name == "base_to_new" else known - halved
    for name in args.datasets:
        if name not in fitting:
            raise registry.unknown(f"dataset of {study.name}", name, fitting)
    return dataclasses.replace(study, datasets=tuple(args.datasets))


def _settings(study: Study, args: argparse.Namespace) -> Settings:
    if args.launcher not in {*registry.LAUNCHERS, *_STOCK_LAUNCHERS}:
        raise registry.unknown("launcher", args.launcher, {*registry.LAUNCHERS, *_STOCK_LAUNCHERS})
    hparams = with_located(args.hparams)
    output = Path(args.output_dir or f"study_output/{study.name}-{args.scale}").expanduser().absolute()
    if args.data_dir:
        data = str(Path(args.data_dir).expanduser().absolute())
    else:
        data = str(output) if args.scale == "mini" else "DATA_DIR"
    return Settings(data, str(output), args.launcher, located(args.model), hparams, args.steps, args.n_trials)


def _check_data(study: Study, data_dir: str | None, settings: Settings) -> None:
    """Check that the data exist before starting hours of jobs.

    Raises:
        ValueError: the options do not provide data and chains for each dataset.
        FileNotFoundError: a folder or a chain file is missing.
    """
    if not data_dir:
        raise ValueError(
            f"{study.name} requires --data-dir, the folder that contains {', '.join(study.datasets)}. "
            "--scale mini needs no data."
        )
    own_chains = settings.hparams.get("chains")
    if own_chains not in (None, BUNDLED, NONE) and len(study.datasets) > 1:
        raise ValueError(
            f"--hparams sets one chain file, {own_chains}, but {study.name} has {len(study.datasets)} datasets. Put "
            f"the chains of each dataset in <data_dir>/<folder>/{catalog.CHAIN_FILE}."
        )
    for name in study.datasets:
        dataset = custom.find(name)
        root = Path(settings.data_dir) / dataset.folder
        if not root.is_dir():
            raise FileNotFoundError(f"{name}: the folder {root} does not exist. {dataset.obtain}")
        needed = {algorithm for grid in study.grids for algorithm in grid.algorithms} & registry.READ_CHAINS
        if needed and not own_chains and not dataset.bundle and not (root / catalog.CHAIN_FILE).exists():
            other = ", or set another file with --hparams '{\"chains\": …}'" if len(study.datasets) == 1 else ""
            raise FileNotFoundError(
                f"{name}: {', '.join(sorted(needed))} require chains, but {root / catalog.CHAIN_FILE} does not exist. "
                f"Run `domainbed-reasoning annotate --dataset {dataset.name} --data-dir {settings.data_dir} --teacher "
                f"…` or `import`{other}."
            )


def describe(study: Study, scale: str, settings: Settings, gpu: str, gpus: int) -> str:
    """Return claim, published numbers, the exact commands and the expected hours.

    Raises:
        ValueError: unknown GPU.
    """
    datasets, grids = study.at(scale)
    lines = [f"{study.name}: {study.title}", "", *_wrapped("claim", study.claim), *_wrapped("paper", study.paper), ""]
    total = 0
    for grid in grids:
        jobs = sum(jobs_of(study, grid, dataset, settings) for dataset in datasets) * len(grid.algorithms)
        total += jobs
        lines.append(f"# {jobs} jobs: {', '.join(grid.algorithms)} on {', '.join(datasets)}")
        lines += [shlex.join(command) for command in _launch_commands(study, grid, datasets, settings)]
    if not study.one_source:
        lines += [shlex.join(command) for command in collect_commands(grids, settings)]
    lines.append("")
    if scale == "mini":
        cores = os.cpu_count() or 1
        minutes = total * _MINI_CORE_SECONDS / cores / 60
        measured = "`make demo DATASET=ShapesReasoning`: 24 jobs, 420 s on 2 cores"
        about = f"about {_MINI_CORE_SECONDS} core-seconds each ({measured})"
        lines.append(f"{total} jobs, {about}: {minutes:.0f} minutes on {cores} cores")
    else:
        try:
            lines += _hours_lines(study, datasets, grids, settings, gpu, gpus)
        except ModuleNotFoundError as error:
            lines.append(
                f"{total} jobs of unknown duration: {error}. Run `domainbed-reasoning doctor` to see what is missing."
            )
    return "\n".join(lines)


def as_dict(study: Study, scale: str, settings: Settings, gpu: str, gpus: int) -> dict[str, Any]:
    """Return what `describe` does, for --json; hours are null where the cost model covers no algorithm.

    Raises:
        ValueError: unknown GPU.
    """
    datasets, grids = study.at(scale)
    commands = [command for grid in grids for command in _launch_commands(study, grid, datasets, settings)]
    commands += [] if study.one_source else collect_commands(grids, settings)
    jobs = sum(jobs_of(study, grid, dataset, settings) * len(grid.algorithms) for grid in grids for dataset in datasets)
    found = {"name": study.name, "title": study.title, "claim": study.claim, "paper": study.paper, "jobs": jobs}
    found["commands"] = list(map(shlex.join, commands))
    if scale == "mini":
        return found | {"core_seconds": jobs * _MINI_CORE_SECONDS}
    rows, total, days = _hours_table(study, datasets, grids, settings, gpu, gpus)
    hours = [{"algorithm": label, "hours": dict(zip(datasets, row, strict=True))} for label, row in rows]
    return found | {"gpu": gpu, "gpus": gpus, "job_hours": hours, "hours": total, "days": days}


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=f"{name:<8}", subsequent_indent=" " * 8)


def _launch_commands(study: Study, grid: Grid, datasets: Sequence[str], settings: Settings) -> list[list[str]]:
    if not study.one_source:
        return [sweep_command(grid, datasets, settings)]
    from domainbed_reasoning.sweeps.studies.single_source import train_jobs

    return [
        shlex.split(job.command) for dataset in datasets for job in train_jobs(grid, dataset, settings, study.sources)
    ]


def _hours_lines(
    study: Study, datasets: Sequence[str], grids: Sequence[Grid], settings: Settings, gpu: str, gpus: int
) -> list[str]:
    rows, total, days = _hours_table(study, datasets, grids, settings, gpu, gpus)
    short = list(map(registry.plain_name, datasets))
    lines = [f"{f'hours a job on one {gpu}':<34}" + "".join(f"{name:>16}" for name in short)]
    for label, row in rows:
        shown = [f"{hours:>16.1f}" if hours is not None else f"{'-':>16}" for hours in row]
        lines.append(f"  {label:<32}" + "".join(shown))
    lines.append(f"{total:.0f} hours in total, {days:.1f} days on {gpus} x {gpu}, within a factor of 2 (see `plan`)")
    if any(hours is None for _, row in rows for hours in row):
        lines.append(
            "-: not in the cost model (networks without a language model, which are far smaller; your own datasets)"
        )
    return lines


def _hours_table(
    study: Study, datasets: Sequence[str], grids: Sequence[Grid], settings: Settings, gpu: str, gpus: int
) -> tuple[list[tuple[str, list[float | None]]], float, float]:
    """Return the hours of a job per algorithm and dataset, the hours of all jobs, and their days on ``gpus``."""
    published.find_gpu(gpu)
    rows: list[tuple[str, list[float | None]]] = []
    total = days = longest_of_all = 0.0
    for grid in grids:
        of_grid, longest = 0.0, 0.0
        for algorithm in grid.algorithms:
            row = [_hours(study, algorithm, dataset, grid, settings, gpu) for dataset in datasets]
            rows.append((algorithm + (f" ({grid.folder})" if grid.folder else ""), row))
            for dataset, hours in zip(datasets, row, strict=True):
                of_grid += (hours or 0.0) * jobs_of(study, grid, dataset, settings)
                longest = max(longest, hours or 0.0)
        total += of_grid
        days += max(of_grid / gpus, longest) / 24  # sweeps run sequentially
        longest_of_all = max(longest_of_all, longest)
    if settings.launcher == "slurm":  # all sweeps are queued together
        days = max(total / gpus, longest_of_all) / 24
    return rows, total, days


def _hours(study: Study, algorithm: str, dataset: str, grid: Grid, settings: Settings, gpu: str) -> float | None:
    """Return the hours of one job; None if the cost model does not cover the algorithm."""
    from domainbed_reasoning.sweeps import costs
    from domainbed_reasoning.sweeps.hours import hours_of

    data = published.data_of(dataset)
    if not grid.mllm or data is None:
        return None
    cls: Any = registry.load(registry.ALGORITHMS[algorithm])
    check_values(settings.hparams_of(grid), cls.HPARAMS)
    hparams = {name: hparam.default for name, hparam in cls.HPARAMS.items()} | settings.hparams_of(grid)
    hours = hours_of(
        _shape(*(hparams[name] for name in ("model", "max_tiles", "revision", "trust_remote_code", "tiling"))),
        costs.lengths_for(data.classes, _CHAIN_TOKENS),
        data,
        published.find_gpu(gpu),
        hparams,
        schedule_of(cls, hparams, data, settings.steps_of(grid)),
        (cls.LABEL_PATH, cls.CHAIN_PATH),
    )
    if study.one_source:  # the cost model assumes all domains but one as sources
        return float((hours.training + hours.labeling) / (data.domains - 1) + hours.evaluation)
    return float(hours.total)


@functools.cache
def _shape(model: str, max_tiles: int, revision: str | None, trust_remote_code: bool, tiling: str) -> Any:
    from domainbed_reasoning.sweeps import costs

    return costs.shape_of(model, max_tiles, revision, trust_remote_code, tiling)
