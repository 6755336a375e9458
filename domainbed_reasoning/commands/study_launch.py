"""`domainbed-reasoning study --launch`: a study's commands run, again and again until all its jobs are done."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.commands.arguments import printable
from domainbed_reasoning.results import collect
from domainbed_reasoning.results.job_folders import read_job
from domainbed_reasoning.results.render import markdown
from domainbed_reasoning.results.tables import accuracy_tables, one_source_tables
from domainbed_reasoning.sweeps import stock
from domainbed_reasoning.sweeps.launchers import restart as again
from domainbed_reasoning.sweeps.launchers import slurm_queue
from domainbed_reasoning.sweeps.launchers.slurm import WAIT
from domainbed_reasoning.sweeps.studies.single_source import train_commands
from domainbed_reasoning.sweeps.studies.study import Grid, Settings, Study, collect_commands, sweep_command

_NEVER_RUN = "dummy"  # this launcher's jobs are yet to be started when it has ended


def launch(study: Study, scale: str, settings: Settings) -> int:
    """Run the commands and print the tables; return 1 if a job is not done.

    Raises:
        ValueError: where another process runs these jobs, or the folder holds jobs of other settings.
    """
    output = Path(settings.output_dir)
    datasets, grids = study.at(scale)
    if study.one_source and settings.launcher not in registry.LAUNCHERS:
        raise ValueError(f"{study.name} runs with one of the launchers {', '.join(registry.LAUNCHERS)}.")
    domainbed = stock.choose_domainbed()
    if scale == "mini" and not settings.model:
        os.environ["HF_HUB_OFFLINE"] = "1"  # nothing of the embedded model is on the hub
    try:
        with again.sole_launch(output):
            again.check_settings(output, _identity(study, settings))
            for grid in grids:
                _clear(study, grid, datasets, settings, domainbed)
            if settings.launcher == "slurm":
                _launch_on_slurm(study, grids, datasets, settings, domainbed)
            else:
                for grid in grids:
                    _launch(study, grid, datasets, settings, domainbed)
    except (KeyboardInterrupt, SystemExit) as ended:
        if not isinstance(getattr(ended, "code", None), str):  # a signal, and no command that failed
            print("\nEnded. Called again, the study goes on where it was.", flush=True)
        raise
    return _conclude(study, datasets, grids, settings, domainbed)


@contextlib.contextmanager
def _submitting_only() -> Iterator[None]:
    """Have the launcher slurm wait for nothing, so that all of a study's jobs are in the queue side by side."""
    chosen = os.environ.get(WAIT)
    os.environ[WAIT] = "0"
    try:
        yield
    finally:
        del os.environ[WAIT]
        os.environ |= {} if chosen is None else {WAIT: chosen}


def _identity(study: Study, settings: Settings) -> dict[str, Any]:
    """Return what makes two launches the same jobs; another launcher or number of trials does not unmake it."""
    return {
        "study": study.name,
        "--data_dir": settings.data_dir,
        "--model": settings.model,
        "--hparams": dict(settings.hparams),
        "--steps": settings.steps,
    }


def _clear(study: Study, grid: Grid, datasets: Sequence[str], settings: Settings, domainbed: Path) -> None:
    """Remove what would not be started again: the folders of a grid's jobs that were killed or failed."""
    folder = Path(settings.folder_of(grid))
    if settings.launcher == _NEVER_RUN or not again.incomplete_in(folder):
        return
    dead = again.dead_beside_live(folder) if settings.launcher == "slurm" else None
    if dead is not None:  # stock's own command would remove the live ones, too
        for job in dead:
            shutil.rmtree(job)
        return
    again.check_nothing_runs(folder)
    if study.one_source:
        for dataset in datasets:
            for job in train_commands(grid, dataset, settings):
                if job.exists() and not (job / "done").exists():
                    shutil.rmtree(job)
    else:
        stock.run_command(sweep_command(grid, datasets, settings, "delete_incomplete"), domainbed, os.environ)


def _launch(study: Study, grid: Grid, datasets: Sequence[str], settings: Settings, domainbed: Path) -> None:
    """Hand a grid's jobs that have no folder to the launcher."""
    if not study.one_source:
        stock.run_command(sweep_command(grid, datasets, settings), domainbed, os.environ)
        return
    commands = []
    for dataset in datasets:
        for folder, command in train_commands(grid, dataset, settings).items():
            if not folder.exists():
                folder.mkdir(parents=True)
                commands.append(command)
    print(f"{', '.join(grid.algorithms)}: {len(commands)} jobs to launch")
    if not commands:
        return
    with contextlib.chdir(domainbed):
        registry.load(registry.LAUNCHERS[settings.launcher])(commands)


def _launch_on_slurm(
    study: Study, grids: Sequence[Grid], datasets: Sequence[str], settings: Settings, domainbed: Path
) -> None:
    """Submit the jobs of all grids, then wait for all that Slurm has of them."""
    folders = sorted({Path(settings.folder_of(grid)) for grid in grids})
    earlier = {identifier for folder in folders for identifier in slurm_queue.submitted_for(folder)}
    with _submitting_only():
        for grid in grids:
            try:
                _launch(study, grid, datasets, settings, domainbed)
            except (SystemExit, RuntimeError) as refused:
                if not isinstance(getattr(refused, "code", ""), str) or not _with_slurm(folders):
                    raise
                print(f"{refused}\nNot all jobs could be submitted. The study goes on with those that Slurm has.")
                break
    if os.environ.get(WAIT) != "0":
        slurm_queue.wait_for_sweeps(folders, earlier)


def _with_slurm(folders: Sequence[Path]) -> list[str]:
    """Return Slurm's ids of the jobs that it has not done with; [] where it cannot be asked."""
    try:
        return [identifier for folder in folders for identifier in slurm_queue.with_slurm(folder)]
    except ConnectionError:
        return []


def _conclude(study: Study, datasets: Sequence[str], grids: Sequence[Grid], settings: Settings, domainbed: Path) -> int:
    """Print the tables, what is not done, and what can be asked next; return 1 if a job is not done."""
    folders = sorted({Path(settings.folder_of(grid)) for grid in grids})
    jobs = [job for folder in folders for job in again.jobs_in(folder)]
    unfinished = [job for folder in folders for job in again.incomplete_in(folder)]
    if settings.launcher == "slurm" and (left := _with_slurm(folders)):
        arrays = ",".join(sorted({identifier.partition("_")[0] for identifier in left}))
        print(
            f"{len(left)} of {len(jobs)} jobs are with Slurm (squeue --jobs={arrays}). When they are over, call this "
            "again for the tables."
        )
        return 0 if os.environ.get(WAIT) == "0" else 1
    if not study.one_source:
        for command in collect_commands(grids, settings):
            stock.run_command(command, domainbed, os.environ)
    if (study.one_source or len(folders) > 1) and len(unfinished) < len(jobs):
        print(_one_table(settings.output_dir))
    print(f"\n{len(jobs) - len(unfinished)} of {len(jobs)} jobs are done.")
    if unfinished:
        print("\n".join(_not_done(unfinished)))
        print(_how_to_go_on(grids, datasets, settings))
    if len(unfinished) < len(jobs):
        print(f"More tables, and a page:\n    domainbed-reasoning collect {shlex.quote(settings.output_dir)}")
        print(f"    domainbed-reasoning report {shlex.quote(settings.output_dir)}")
    return 1 if unfinished else 0


def _one_table(folder: str) -> str:
    """Return what stock tables lack: all of a study's folders together, a row a folder, and jobs of one source."""
    frame = collect(folder)
    return "\n".join(map(markdown, [*one_source_tables(frame), *accuracy_tables(frame)]))


def _not_done(folders: Sequence[Path]) -> Iterator[str]:
    """Yield a line for every job that was started, and one for all others."""
    waiting = 0
    for folder in folders:
        job = read_job(folder)
        if job.args or job.last_error:
            said = f": {printable(job.last_error)}" if job.last_error else ""
            yield f"NOT DONE: {printable(job.name)}, {folder}{said}"
        else:
            waiting += 1
    if waiting:
        yield f"NOT STARTED: {waiting} jobs"


def _how_to_go_on(grids: Sequence[Grid], datasets: Sequence[str], settings: Settings) -> str:
    if settings.launcher != _NEVER_RUN:
        return "Call this again to start them again."
    commands = (shlex.join(sweep_command(grid, datasets, settings, "delete_incomplete")) for grid in grids)
    return "\n    ".join(["To launch them otherwise, remove their folders and call this again:", *commands])
