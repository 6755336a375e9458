"""A study that is launched again: with the settings of the first time, by one process, and without dead jobs.

The stock sweep makes the folders of all its jobs before it starts the first, and afterwards launches only jobs without
a folder: killed, it would start none again. Its `delete_incomplete` removes the folders without `done`, those of
running jobs too. So it has to be known that none runs, or waits in a queue that outlives its launcher.
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
from domainbed_reasoning.files.locks import lock
from domainbed_reasoning.sweeps.launchers import slurm_queue
from domainbed_reasoning.sweeps.launchers.jobs import parse_job

SETTINGS = "study.json"
_LOCK = ".launching"
_SCRIPT = "domainbed.scripts."
_NAMED = 5  # jobs with Slurm that an error names


def jobs_in(folder: Path) -> list[Path]:
    """Return the folders of a sweep's jobs, in order."""
    return sorted(job for job in folder.glob("*/") if NAME_OF_JOB.fullmatch(job.name))


def incomplete_in(folder: Path) -> list[Path]:
    """Return the folders of jobs without `done`."""
    return [job for job in jobs_in(folder) if not (job / "done").exists()]


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings in the study's folder, or compare them with those of the first time.

    Args:
        folder: of the study.
        settings: that decide what its jobs are, as JSON has them.

    Raises:
        ValueError: for others than the first time's, which would make two jobs a cell.
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
        raise ValueError(f"{path} is damaged: remove it, or give another --output_dir.")
    differing = [name for name in settings if before.get(name, settings[name]) != settings[name]]
    if differing:
        said = ", ".join(f"{name} {_said(before.get(name))} (now {_said(settings[name])})" for name in differing)
        raise ValueError(
            f"{folder} holds jobs of other settings: {said}. Both would be in one table: give another --output_dir, "
            "the same settings, or remove that folder."
        )


def _said(value: Any) -> str:
    return "not given" if value in (None, "", {}) else str(value) if isinstance(value, str) else json.dumps(value)


@contextmanager
def sole_launch(folder: Path) -> Iterator[None]:
    """Hold the study's folder while its jobs are launched. Forked jobs hold it as long as they run.

    Raises:
        ValueError: another process has it, naming that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+", encoding="utf-8") as file:
        try:
            lock(file.fileno())
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{folder} is being launched by process {file.read().strip() or 'unknown'}: wait for it, or end it."
            ) from None
        except OSError as error:
            raise ValueError(
                f"{folder / _LOCK} cannot be locked ({error.strerror}): its file system has no locks. Give an "
                "--output_dir on another one."
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_nothing_runs(folder: Path) -> None:
    """Look for processes of this machine that launch or run jobs below a folder, and for its jobs with Slurm.

    Args:
        folder: of a sweep.

    Raises:
        ValueError: naming them; or where jobs have been submitted to Slurm, which cannot be asked for them here.
    """
    _check_no_process_runs(folder)
    states = _with_slurm(folder)
    if not states:
        return
    named = [f"{identifier} {state}" for identifier, state in sorted(states.items())]
    named = [*named[:_NAMED], "…"] if len(named) > _NAMED else named
    numbers = sorted({int(identifier.partition("_")[0]) for identifier in states})
    raise ValueError(
        f"Slurm still has {len(states)} jobs in {folder}, which would be removed: {', '.join(named)}. Wait for them "
        f"(squeue --jobs={','.join(map(str, numbers))}), end them (scancel {' '.join(map(str, numbers))}), or use the "
        "launcher slurm, which leaves them."
    )


def dead_beside_live(folder: Path) -> list[Path] | None:
    """Return a sweep's folders that can go though Slurm still has some of its jobs; None where it has none.

    These are folders of jobs that were with Slurm, and empty ones, which a sweep made for jobs that it never submitted.

    Args:
        folder: of the sweep.

    Raises:
        ValueError: where Slurm cannot be asked here, or processes of this machine launch or run jobs there, too.
    """
    states = _with_slurm(folder)
    if not states:
        return None
    jobs = slurm_queue.submitted_for(folder)
    if not states.keys() <= jobs.keys():  # a launcher was killed between submitting and noting: which they are is lost
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
            f"Jobs in {folder} were submitted to Slurm, and would be removed though they may wait or run: it cannot be "
            f"asked ({error}). Call this where Slurm's commands are; or, if you know that all are over, say so by "
            f"removing {slurm_queue.folder_of(folder)}."
        ) from error
    return states


def _check_no_process_runs(folder: Path, but: Collection[Path] = ()) -> None:
    found = [f"    {pid}  {' '.join(words)[:100]}" for pid, words in _stock_processes(folder, but)]
    if found:
        raise ValueError(f"Jobs in {folder} run already:\n" + "\n".join(found) + "\nWait for them, or end them.")


def _stock_processes(folder: Path, but: Collection[Path]) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield process id and command of DomainBed's scripts that write below a folder, but not below some in it.

    Our own ancestors are left out.
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
