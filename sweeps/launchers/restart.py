"""Relaunching a study: with its original settings, by one process at a time, without the remains of dead jobs.

The stock sweep creates the folders of all its jobs before it starts the first, and then launches only jobs without a
folder, so a killed sweep would never start the rest. Its `delete_incomplete` removes all folders without `done`, even
those of running jobs. Before calling it, we check that no job is running or waiting in a queue.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge.train_args import NAME_OF_JOB
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.files.locks import FileLocked, lock
from domainbed_reasoning.sweeps.launchers import slurm_queue
from domainbed_reasoning.sweeps.launchers.jobs import parse_job

SETTINGS = "study.json"
_LOCK = ".launching"
_SCRIPT = "domainbed.scripts."
_MAX_LISTED = 5  # Slurm jobs in an error


def jobs_in(folder: Path) -> list[Path]:
    """Return the folders of a sweep's jobs, sorted."""
    return sorted(job for job in folder.glob("*/") if NAME_OF_JOB.fullmatch(job.name))


def incomplete_in(folder: Path) -> list[Path]:
    """Return the folders of jobs without `done`."""
    return [job for job in jobs_in(folder) if not (job / "done").exists()]


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Save the settings in the study's folder, or compare them with the saved ones.

    Args:
        folder: of the study.
        settings: that determine its jobs, JSON values.

    Raises:
        ValueError: the settings differ, which would give two jobs per cell of the table.
    """
    path = folder / SETTINGS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        replace_text(path, json.dumps(settings, indent=1) + "\n")
        return
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{path} is not valid JSON. Remove it, or choose another --output_dir.")
    differing = [name for name in settings if before.get(name, settings[name]) != settings[name]]
    if differing:
        changes = ", ".join(f"{name}: {_shown(before.get(name))} -> {_shown(settings[name])}" for name in differing)
        raise ValueError(
            f"{folder} contains jobs with different settings ({changes}), which would be mixed in one table. Choose "
            "another --output_dir, use the same settings, or remove that folder."
        )


def _shown(value: Any) -> str:
    return "not set" if value in (None, "", {}) else str(value) if isinstance(value, str) else json.dumps(value)


@contextmanager
def sole_launch(folder: Path) -> Iterator[None]:
    """Lock the study's folder while its jobs are launched; forked jobs keep the lock until they end.

    Raises:
        ValueError: another process holds the lock, or the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "ab") as file:
        try:
            lock(file.fileno())
        except FileLocked as error:
            raise ValueError(f"{folder} is being launched by {error.holder}. Wait for it, or stop it.") from None
        except OSError as error:
            raise ValueError(
                f"{folder / _LOCK} cannot be locked ({error.strerror}): its file system does not support locks. Choose "
                "an --output_dir on another one."
            ) from error
        yield


def check_nothing_runs(folder: Path) -> None:
    """Check that no process of this machine launches or runs jobs below a folder, and that Slurm has none of them.

    Args:
        folder: of a sweep.

    Raises:
        ValueError: some are running or queued, or jobs were submitted to Slurm, which cannot be queried from here.
    """
    _check_no_process_runs(folder)
    states = _with_slurm(folder)
    if not states:
        return
    named = [f"{identifier} {state}" for identifier, state in sorted(states.items())]
    named = [*named[:_MAX_LISTED], "…"] if len(named) > _MAX_LISTED else named
    numbers = sorted({int(identifier.partition("_")[0]) for identifier in states})
    raise ValueError(
        f"Slurm still has {len(states)} jobs in {folder}, whose folders would be removed: {', '.join(named)}. Wait for "
        f"them (squeue --jobs={','.join(map(str, numbers))}), cancel them (scancel {' '.join(map(str, numbers))}), or "
        "use the launcher slurm, which keeps them."
    )


def dead_beside_live(folder: Path) -> list[Path] | None:
    """Return the job folders that can be removed while Slurm still has other jobs of the sweep; None if it has none.

    These are folders of jobs that Slurm has finished with, and empty ones, whose jobs were never submitted.

    Args:
        folder: of the sweep.

    Raises:
        ValueError: Slurm cannot be queried from here, or processes of this machine launch or run jobs there too.
    """
    states = _with_slurm(folder)
    if not states:
        return None
    jobs = slurm_queue.submitted_for(folder)
    if not states.keys() <= jobs.keys():  # a launcher was killed before it could record which jobs these are
        return []
    alive = {jobs[identifier].folder for identifier in states}
    _check_no_process_runs(folder, alive)  # Slurm may run them on this machine
    gone = {job.folder for job in jobs.values()} - alive
    return [job for job in incomplete_in(folder) if job in gone or (job not in alive and not any(job.iterdir()))]


def _with_slurm(folder: Path) -> dict[str, str]:
    try:
        states: dict[str, str] = slurm_queue.with_slurm(folder)
    except ConnectionError as error:
        raise ValueError(
            f"Jobs in {folder} were submitted to Slurm and may still be queued or running, but Slurm cannot be queried "
            f"({error}). Rerun this where Slurm's commands are available; if all jobs have ended, confirm that by "
            f"removing {slurm_queue.folder_of(folder)}."
        ) from error
    return states


def _check_no_process_runs(folder: Path, but: Collection[Path] = ()) -> None:
    found = [f"    {pid}  {' '.join(words)[:100]}" for pid, words in _stock_processes(folder, but)]
    if found:
        raise ValueError(
            f"Jobs in {folder} are already running:\n" + "\n".join(found) + "\nWait for them, or stop them."
        )


def _stock_processes(folder: Path, but: Collection[Path]) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield process id and command of DomainBed's scripts that write below a folder, except below some in it.

    Ancestors of this process are left out.
    """
    import psutil

    folder = folder.resolve()
    spared = {path.resolve() for path in but}
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if process.pid in own or not any(word.startswith(_SCRIPT) for word in words):
                continue
            output = Path(process.cwd(), *parse_job(shlex.join(words)).options.get("output_dir", ())).resolve()
        except (psutil.Error, OSError):
            continue
        if folder in (output, *output.parents) and spared.isdisjoint((output, *output.parents)):
            yield process.pid, words
