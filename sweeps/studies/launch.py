"""Launches a study: starts its jobs, resumes them on rerun until all have completed, and prints the tables."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.results import collect
from domainbed_reasoning.results.base_to_new import base_to_new_tables
from domainbed_reasoning.results.job_folders import read_job
from domainbed_reasoning.results.render import markdown
from domainbed_reasoning.results.tables import accuracy_tables, one_source_tables
from domainbed_reasoning.sweeps import stock
from domainbed_reasoning.sweeps.launchers import restart, slurm_queue
from domainbed_reasoning.sweeps.launchers.slurm import WAIT
from domainbed_reasoning.sweeps.studies.single_source import train_jobs
from domainbed_reasoning.sweeps.studies.study import Grid, Settings, Study, collect_commands, sweep_command
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob, remove_dead, start
from domainbed_reasoning.terminal import counted

_PRINTS_ONLY = "dummy"  # this launcher prints commands and starts no jobs


def launch(study: Study, scale: str, settings: Settings) -> int:
    """Run the commands and print the tables; return 1 if a job has not completed.

    Raises:
        ValueError: another process runs these jobs, or the folder contains jobs with other settings.
    """
    output = Path(settings.output_dir)
    datasets, grids = study.at(scale)
    if study.one_source and settings.launcher not in registry.LAUNCHERS:
        raise ValueError(f"{study.name} requires one of the launchers {', '.join(registry.LAUNCHERS)}.")
    domainbed = stock.choose_domainbed()
    if scale == "mini" and not settings.model:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the embedded model needs nothing from the hub
    try:
        with restart.sole_launch(output):
            restart.check_settings(output, _identity(study, settings))
            for grid in grids:
                _clear(study, grid, datasets, settings, domainbed)
            if settings.launcher == "slurm":
                _launch_on_slurm(study, grids, datasets, settings, domainbed)
            else:
                for grid in grids:
                    _launch(study, grid, datasets, settings, domainbed)
    except (KeyboardInterrupt, SystemExit) as ended:
        if not isinstance(getattr(ended, "code", None), str):  # a signal, not a failed command
            print("\nInterrupted. Rerun the command to resume.", flush=True)
        raise
    return _conclude(study, datasets, grids, settings, domainbed)


@contextlib.contextmanager
def _submitting_only() -> Iterator[None]:
    """Keep the launcher slurm from waiting, so that all jobs of a study are queued at once."""
    chosen = os.environ.get(WAIT)
    os.environ[WAIT] = "0"
    try:
        yield
    finally:
        del os.environ[WAIT]
        os.environ |= {} if chosen is None else {WAIT: chosen}


def _identity(study: Study, settings: Settings) -> dict[str, Any]:
    """Return the settings that two launches of the same jobs share; launcher and number of trials may differ."""
    return {
        "study": study.name,
        "--data_dir": settings.data_dir,
        "--model": settings.model,
        "--hparams": dict(settings.hparams),
        "--steps": settings.steps,
    }


def _clear(study: Study, grid: Grid, datasets: Sequence[str], settings: Settings, domainbed: Path) -> None:
    """Remove the folders of a grid's killed and failed jobs, which would not be restarted otherwise."""
    folder = Path(settings.folder_of(grid))
    if settings.launcher == _PRINTS_ONLY or not restart.incomplete_in(folder):
        return
    dead = restart.dead_beside_live(folder) if settings.launcher == "slurm" else None
    if dead is not None:  # DomainBed's delete_incomplete would also remove running jobs
        for job in dead:
            shutil.rmtree(job)
        return
    restart.check_nothing_runs(folder)
    if study.one_source:
        remove_dead(_train_jobs(study, grid, datasets, settings))
    else:
        stock.run_command(sweep_command(grid, datasets, settings, "delete_incomplete"), domainbed, os.environ)


def _launch(study: Study, grid: Grid, datasets: Sequence[str], settings: Settings, domainbed: Path) -> None:
    """Launch the jobs of a grid that have no folder yet."""
    if not study.one_source:
        stock.run_command(sweep_command(grid, datasets, settings), domainbed, os.environ)
        return
    jobs = [job for job in _train_jobs(study, grid, datasets, settings) if not job.folder.exists()]
    print(f"{', '.join(grid.algorithms)}: {len(jobs)} jobs to launch")
    with contextlib.chdir(domainbed):
        start(jobs, registry.load(registry.LAUNCHERS[settings.launcher]))


def _train_jobs(study: Study, grid: Grid, datasets: Sequence[str], settings: Settings) -> list[TrainJob]:
    return [job for dataset in datasets for job in train_jobs(grid, dataset, settings, study.sources)]


def _launch_on_slurm(
    study: Study, grids: Sequence[Grid], datasets: Sequence[str], settings: Settings, domainbed: Path
) -> None:
    """Submit the jobs of all grids, then wait for them."""
    folders = sorted({Path(settings.folder_of(grid)) for grid in grids})
    earlier = {identifier for folder in folders for identifier in slurm_queue.submitted_for(folder)}
    with _submitting_only():
        for grid in grids:
            try:
                _launch(study, grid, datasets, settings, domainbed)
            except (SystemExit, RuntimeError) as error:
                if not isinstance(getattr(error, "code", ""), str) or not _with_slurm(folders):
                    raise
                print(f"{error}\nNot all jobs could be submitted. Continuing with the submitted ones.")
                break
    if os.environ.get(WAIT) != "0":
        slurm_queue.wait_for_sweeps(folders, earlier)


def _with_slurm(folders: Sequence[Path]) -> list[str]:
    """Return Slurm's ids of queued and running jobs; [] if Slurm does not answer."""
    try:
        return [identifier for folder in folders for identifier in slurm_queue.with_slurm(folder)]
    except ConnectionError:
        return []


def _conclude(study: Study, datasets: Sequence[str], grids: Sequence[Grid], settings: Settings, domainbed: Path) -> int:
    """Print the tables, the incomplete jobs and the next commands; return 1 if a job has not completed."""
    folders = sorted({Path(settings.folder_of(grid)) for grid in grids})
    jobs = [job for folder in folders for job in restart.jobs_in(folder)]
    incomplete = [job for folder in folders for job in restart.incomplete_in(folder)]
    if settings.launcher == "slurm" and (left := _with_slurm(folders)):
        arrays = ",".join(sorted({identifier.partition("_")[0] for identifier in left}))
        print(
            f"{len(left)} of {len(jobs)} jobs are queued or running (squeue --jobs={arrays}). Rerun this command when "
            "they have completed to print the tables."
        )
        return 0 if os.environ.get(WAIT) == "0" else 1
    if not study.one_source:
        for command in collect_commands(grids, settings):
            stock.run_command(command, domainbed, os.environ)
    if (study.one_source or len(folders) > 1) and len(incomplete) < len(jobs):
        print(_one_table(settings.output_dir))
    print(f"\n{len(jobs) - len(incomplete)}/{len(jobs)} jobs completed.")
    if incomplete:
        print("\n".join(_described(incomplete)))
        print(_next_command(grids, datasets, settings))
    if len(incomplete) < len(jobs):
        print(f"For more tables and a report, run:\n    domainbed-reasoning collect {shlex.quote(settings.output_dir)}")
        print(f"    domainbed-reasoning report {shlex.quote(settings.output_dir)}")
    return 1 if incomplete else 0


def _one_table(folder: str) -> str:
    """Return the tables that stock lacks: all folders of a study together, one row each, and single-source jobs."""
    frame = collect(folder)
    return "\n".join(map(markdown, [*one_source_tables(frame), *base_to_new_tables(frame), *accuracy_tables(frame)]))


def _described(folders: Sequence[Path]) -> Iterator[str]:
    """Yield one line per started job, and one for all others."""
    waiting = 0
    for folder in folders:
        job = read_job(folder)
        if job.args or job.last_error:
            reason = f": {job.last_error}" if job.last_error else ""
            yield f"INCOMPLETE: {job.name}, {folder}{reason}"
        else:
            waiting += 1
    if waiting:
        yield f"NOT STARTED: {counted(waiting, 'job')}"


def _next_command(grids: Sequence[Grid], datasets: Sequence[str], settings: Settings) -> str:
    if settings.launcher != _PRINTS_ONLY:
        return "Rerun the command to restart them."
    commands = (shlex.join(sweep_command(grid, datasets, settings, "delete_incomplete")) for grid in grids)
    return "\n    ".join(["To launch them with another launcher, remove their folders first:", *commands])
