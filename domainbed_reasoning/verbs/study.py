"""`domainbed-reasoning study`: the tables of the paper, each by its stock commands, printed or run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning import catalog, published, registry
from domainbed_reasoning.sweeps.stock import located, with_located
from domainbed_reasoning.sweeps.study import (
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
from domainbed_reasoning.verbs.arguments import ends_with_message, json_object, make_parser, printable
from domainbed_reasoning.verbs.plan import schedule_of

_EXAMPLES = """  domainbed-reasoning study                                                       # which there are
  domainbed-reasoning study ablation --data_dir ~/data                            # its commands, hours and claim
  domainbed-reasoning study ablation --scale mini --launch                        # on a laptop, no data needed
  domainbed-reasoning study ablation --data_dir ~/data --launch --launcher slurm --model ~/models/InternVL3-8B-hf

Called again it goes on: with the jobs that were not started, failed or were killed.
"""
_STOCK_LAUNCHERS = ("local", "multi_gpu", "dummy")
_OUTLIVED = ("slurm", "dummy")  # jobs go on, or are yet to be started, when these launchers have ended
# `make demo`: 24 jobs of all our algorithms and ERM in 420 s on 2 cores.
_MINI_CORE_SECONDS = 35
_CHAIN_TOKENS = 250  # the paper's chains
_NEED_CHAINS = frozenset({"ReasoningSFT", "MTCT", "SARR", "RDMLDG"})


@ends_with_message
def main(argv: Sequence[str] | None = None) -> int:
    """List the studies, print one, or run it; return the exit code: 1 if a job did not end well."""
    parser = make_parser("study", "Reproduce a table of the paper with DomainBed's own commands.", _EXAMPLES)
    parser.add_argument("name", nargs="?", help="of the study; without it they are listed")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="its claim, commands and expected hours (the default)")
    what.add_argument("--launch", action="store_true", help="run the commands, then collect_results")
    parser.add_argument("--scale", choices=("paper", "mini"), default="paper", help=f"mini: {EMBEDDED}, tiny model")
    parser.add_argument("--data_dir", "--data-dir", help="the folder that holds the datasets' folders")
    parser.add_argument("--output_dir", help="default: study_output/<name>-<scale>")
    parser.add_argument("--launcher", default="parallel", help="parallel (default), ray, slurm, local, …")
    parser.add_argument("--model", default="", help="folder or hub id for the algorithms on a multimodal LLM")
    parser.add_argument(
        "--hparams", default="{}", help="JSON for the same algorithms, over the study's; clip_… for those on CLIP"
    )
    parser.add_argument("--steps", type=int, help="DomainBed's --steps, of every job")
    parser.add_argument("--n_trials", type=int, help="seeds of the splits (default: the study's)")
    parser.add_argument("--gpu", default="H200", help="for the expected hours (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="that work side by side (default: 1)")
    given = parser.parse_args(argv)
    if given.name is None:
        print(listing())
        return 0
    study = load_study(given.name)
    settings = _settings(study, given)
    if not given.launch:
        print(describe(study, given.scale, settings, given.gpu, given.gpus))
        return 0
    if given.scale == "paper":
        _check_data(study, given.data_dir, settings)
    return launch(study, given.scale, settings)


def listing() -> str:
    """Return a line a study."""
    lines = [f"  {name:<22}{load_study(name).title}" for name in STUDIES]
    return "\n".join(["studies", *lines, "", "`domainbed-reasoning study NAME` prints its claim, commands and hours."])


def _settings(study: Study, given: argparse.Namespace) -> Settings:
    if given.launcher not in {*registry.LAUNCHERS, *_STOCK_LAUNCHERS}:
        raise registry.unknown("launcher", given.launcher, {*registry.LAUNCHERS, *_STOCK_LAUNCHERS})
    hparams = with_located(json_object("--hparams", given.hparams))
    output = Path(given.output_dir or f"study_output/{study.name}-{given.scale}").expanduser().absolute()
    if given.data_dir:
        data = str(Path(given.data_dir).expanduser().absolute())
    else:
        data = str(output) if given.scale == "mini" else "DATA_DIR"
    return Settings(data, str(output), given.launcher, located(given.model), hparams, given.steps, given.n_trials)


def _check_data(study: Study, data_dir: str | None, settings: Settings) -> None:
    """Refuse to start hours of jobs on data that are not there."""
    if not data_dir:
        raise ValueError(
            f"{study.name} at the scale of the paper needs --data_dir, the folder that holds "
            f"{', '.join(study.datasets)}; --scale mini needs no data."
        )
    own_chains = settings.hparams.get("chains")
    if own_chains and len(study.datasets) > 1:
        raise ValueError(
            f"--hparams chains {own_chains}: one file, and {study.name} has {len(study.datasets)} datasets. Put each "
            f"one's chains beside its domains, as <data_dir>/<folder>/{catalog.CHAIN_FILE}."
        )
    for name in study.datasets:
        dataset = catalog.STOCK[registry.TWINS[name]]
        root = Path(settings.data_dir) / dataset.folder
        if not root.is_dir():
            raise FileNotFoundError(f"{name}: there is no folder {root}. {dataset.obtain}")
        needed = {algorithm for grid in study.grids for algorithm in grid.algorithms} & _NEED_CHAINS
        if needed and not own_chains and not (root / catalog.CHAIN_FILE).exists():
            other = ", `--hparams '{\"chains\": …}'` names another file" if len(study.datasets) == 1 else ""
            raise FileNotFoundError(
                f"{name}: {', '.join(sorted(needed))} train on chains, and there is no {root / catalog.CHAIN_FILE}. "
                f"`domainbed-reasoning annotate --dataset {dataset.name} --data_dir {settings.data_dir} --teacher …` "
                f"gets them, `import` takes others' over{other}."
            )


def describe(study: Study, scale: str, settings: Settings, gpu: str, gpus: int) -> str:
    """Return claim, published numbers, the exact commands and the expected hours.

    Raises:
        ValueError: for a GPU that is not known.
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
        about = f"about {_MINI_CORE_SECONDS} core-seconds each (`make demo`: 24 jobs, 420 s on 2 cores)"
        lines.append(f"{total} jobs, {about}: {minutes:.0f} minutes on {cores} cores")
    else:
        try:
            lines += _hours_lines(study, datasets, grids, settings, gpu, gpus)
        except ModuleNotFoundError as error:
            lines.append(
                f"{total} jobs; their hours are not known: {error}. `domainbed-reasoning doctor` says the cure."
            )
    return "\n".join(lines)


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=f"{name:<8}", subsequent_indent=" " * 8)


def _launch_commands(study: Study, grid: Grid, datasets: Sequence[str], settings: Settings) -> list[list[str]]:
    if not study.one_source:
        return [sweep_command(grid, datasets, settings)]
    from domainbed_reasoning.sweeps.single_source import train_commands

    return [shlex.split(one) for dataset in datasets for one in train_commands(grid, dataset, settings).values()]


def _hours_lines(
    study: Study, datasets: Sequence[str], grids: Sequence[Grid], settings: Settings, gpu: str, gpus: int
) -> list[str]:
    published.gpu_named(gpu)
    short = [dataset.removesuffix("Reasoning") for dataset in datasets]
    lines = [f"{f'hours a job on one {gpu}':<34}" + "".join(f"{name:>16}" for name in short)]
    total, days, uncounted = 0.0, 0.0, False
    for grid in grids:
        of_grid, longest = 0.0, 0.0
        for algorithm in grid.algorithms:
            row = [_hours(study, algorithm, dataset, grid, settings, gpu) for dataset in datasets]
            shown = [f"{hours:>16.1f}" if hours is not None else f"{'-':>16}" for hours in row]
            lines.append(f"  {algorithm + (f' ({grid.folder})' if grid.folder else ''):<32}" + "".join(shown))
            for dataset, hours in zip(datasets, row, strict=True):
                uncounted |= hours is None
                of_grid += (hours or 0.0) * jobs_of(study, grid, dataset, settings)
                longest = max(longest, hours or 0.0)
        total += of_grid
        days += max(of_grid / gpus, longest) / 24  # the next sweep starts when this one has ended
    lines.append(f"{total:.0f} hours in all, {days:.1f} days on {gpus} x {gpu}; within a factor of 2, see `plan`")
    if uncounted:
        lines.append("- is not in the cost model: networks without a language model, which are far smaller")
    return lines


def _hours(study: Study, algorithm: str, dataset: str, grid: Grid, settings: Settings, gpu: str) -> float | None:
    """Return the hours of one job; None for what the cost model does not know."""
    from domainbed_reasoning import costs

    cls: Any = registry.load(registry.ALGORITHMS[algorithm]) if grid.mllm else None
    if cls is None:
        return None
    data = published.DATA[registry.TWINS[dataset]]
    hparams = {name: hparam.default for name, hparam in cls.HPARAMS.items()} | settings.hparams_of(grid)
    hours = costs.hours_of(
        _shape(hparams["model"], hparams["max_tiles"]),
        costs.lengths_for(data.classes, _CHAIN_TOKENS),
        data,
        published.gpu_named(gpu),
        hparams,
        schedule_of(cls, hparams, data, settings.steps),
        (cls.LABEL_PATH, cls.CHAIN_PATH),
    )
    if study.one_source:  # the model counts all domains but one as sources
        return (hours.training + hours.labelling) / (data.domains - 1) + hours.evaluation
    return hours.total


@functools.cache
def _shape(model: str, max_tiles: int) -> Any:
    from domainbed_reasoning import costs

    return costs.shape_of(model, max_tiles)


def launch(study: Study, scale: str, settings: Settings) -> int:
    """Run the commands and print the tables; return 1 if a job is not done.

    Raises:
        ValueError: where another process runs these jobs, or the folder holds jobs of other settings.
    """
    from domainbed_reasoning.sweeps import again, stock

    output = Path(settings.output_dir)
    datasets, grids = study.at(scale)
    domainbed = stock.choose_domainbed()
    if scale == "mini" and not settings.model:
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing of the embedded model is on the hub
    try:
        with again.sole_launch(output):
            again.check_settings(output, _identity(settings))
            for grid in grids:
                if study.one_source:
                    _launch_one_source(grid, datasets, settings, domainbed)
                else:
                    _clear_incomplete(grid, datasets, settings, domainbed)
                    stock.run_command(sweep_command(grid, datasets, settings), domainbed, os.environ)
    except (KeyboardInterrupt, SystemExit) as ended:
        if not isinstance(getattr(ended, "code", None), str):  # a signal, and no command that failed
            print("\nEnded. Called again, the study goes on where it was.", flush=True)
        raise
    return _conclude(study, datasets, grids, settings, domainbed)


def _identity(settings: Settings) -> dict[str, Any]:
    """Return what makes two launches the same jobs; another launcher or number of trials does not unmake it."""
    return {
        "--data_dir": settings.data_dir,
        "--model": settings.model,
        "--hparams": dict(settings.hparams),
        "--steps": settings.steps,
    }


def _clear_incomplete(grid: Grid, datasets: Sequence[str], settings: Settings, domainbed: Path) -> None:
    """Have the stock sweep remove what it would not start again: the folders of jobs that were killed or failed."""
    from domainbed_reasoning.sweeps import again, stock

    folder = Path(settings.folder_of(grid))
    if settings.launcher in _OUTLIVED or not again.incomplete_in(folder):
        return
    again.check_nothing_runs(folder)
    stock.run_command(sweep_command(grid, datasets, settings, "delete_incomplete"), domainbed, os.environ)


def _launch_one_source(grid: Grid, datasets: Sequence[str], settings: Settings, domainbed: Path) -> None:
    """Hand the train commands whose jobs are not done to the launcher, as the stock sweep does."""
    from domainbed_reasoning.sweeps import again
    from domainbed_reasoning.sweeps.single_source import train_commands

    if settings.launcher not in registry.LAUNCHERS:
        raise ValueError(f"single_source runs with one of the launchers {', '.join(registry.LAUNCHERS)}.")
    if settings.launcher not in _OUTLIVED and again.incomplete_in(Path(settings.folder_of(grid))):
        again.check_nothing_runs(Path(settings.folder_of(grid)))
    commands = []
    for dataset in datasets:
        for folder, command in train_commands(grid, dataset, settings).items():
            if settings.launcher not in _OUTLIVED and folder.exists() and not (folder / "done").exists():
                shutil.rmtree(folder)
            if not folder.exists():
                folder.mkdir(parents=True)
                commands.append(command)
    print(f"{', '.join(grid.algorithms)}: {len(commands)} jobs to launch")
    if not commands:
        return
    with contextlib.chdir(domainbed):
        registry.load(registry.LAUNCHERS[settings.launcher])(commands)


def _conclude(study: Study, datasets: Sequence[str], grids: Sequence[Grid], settings: Settings, domainbed: Path) -> int:
    """Print the tables, what is not done, and what can be asked next; return 1 if a job is not done."""
    from domainbed_reasoning.sweeps import again, slurm_launcher, stock

    folders = sorted({Path(settings.folder_of(grid)) for grid in grids})
    jobs = [job for folder in folders for job in again.jobs_in(folder)]
    unfinished = [job for folder in folders for job in again.incomplete_in(folder)]
    if unfinished and settings.launcher == "slurm" and os.environ.get(slurm_launcher.WAIT) == "0":
        print(
            f"{len(unfinished)} of {len(jobs)} jobs are with Slurm. When they are done, call this again for the tables."
        )
        return 0
    if not study.one_source:
        for command in collect_commands(grids, settings):
            stock.run_command(command, domainbed, os.environ)
    if (study.one_source or len(folders) > 1) and len(unfinished) < len(jobs):
        print(_one_table(settings.output_dir))
    print(f"\n{len(jobs) - len(unfinished)} of {len(jobs)} jobs are done.")
    if unfinished:
        print("\n".join(_not_done(unfinished)))
        print(_how_to_go_on(grids, datasets, settings, study.one_source))
    if len(unfinished) < len(jobs):
        print(f"More tables, and a page:\n    domainbed-reasoning collect {shlex.quote(settings.output_dir)}")
        print(f"    domainbed-reasoning report {shlex.quote(settings.output_dir)}")
    return 1 if unfinished else 0


def _one_table(folder: str) -> str:
    """Return what stock tables lack: all of a study's folders together, a row a folder, and jobs of one source."""
    from domainbed_reasoning.collect import collect
    from domainbed_reasoning.collect.render import markdown
    from domainbed_reasoning.collect.tables import accuracy_tables, one_source_tables

    frame = collect(folder)
    return "\n".join(map(markdown, [*one_source_tables(frame), *accuracy_tables(frame)]))


def _not_done(folders: Sequence[Path]) -> Iterator[str]:
    """Yield a line for every job that was started, and one for all others."""
    from domainbed_reasoning.collect.jobs import read_job

    waiting = 0
    for folder in folders:
        job = read_job(folder)
        if job.args or job.last_words:
            said = f": {printable(job.last_words)}" if job.last_words else ""
            yield f"NOT DONE: {printable(job.name)}, {folder}{said}"
        else:
            waiting += 1
    if waiting:
        yield f"NOT STARTED: {waiting} jobs"


def _how_to_go_on(grids: Sequence[Grid], datasets: Sequence[str], settings: Settings, one_source: bool) -> str:
    if settings.launcher not in _OUTLIVED:
        return "Call this again to start them again."
    said = f"The launcher {settings.launcher} may still run them. When it does not, remove their folders"
    if one_source:
        return f"{said} and call this again."
    commands = (shlex.join(sweep_command(grid, datasets, settings, "delete_incomplete")) for grid in grids)
    return "\n    ".join([f"{said}, and call this again:", *commands])
