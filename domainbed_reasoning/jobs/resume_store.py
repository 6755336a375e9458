"""The folders in which unfinished jobs keep their progress: who has which, which may go.

Jobs start and end side by side, on several machines with one home folder: whoever looks at a folder must expect that
another process deletes it meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_reasoning.files.cache import cache_folder
from domainbed_reasoning.files.locks import lock
from domainbed_reasoning.files.plain import read_plain_text

BOUND = "DOMAINBED_REASONING_UNFINISHED_GB"
_DEFAULT_BOUND_GB = 50.0
_PATIENCE = 2.0  # seconds until a lock counts as that of a running job


class JobIsRunning(RuntimeError):
    """Another process runs the very same job."""


def unfinished_folder() -> Path:
    """Return the folder that holds the progress of jobs, there or not."""
    return cache_folder() / "unfinished"


@dataclass(frozen=True)
class Unfinished:
    """A job whose progress is kept.

    Attributes:
        folder: of its progress; the name is the job's key.
        args: DomainBed's arguments of the job.
        steps: taken and saved.
        size: of the folder in bytes.
        changed: when it last went on, seconds since the epoch.
        running: whether a process has it now.
    """

    folder: Path
    args: Mapping[str, Any]
    steps: int
    size: int
    changed: float
    running: bool

    @property
    def done(self) -> bool:
        """Whether DomainBed has ended the job since."""
        return is_done(self.args.get("output_dir"), self.folder)


def unfinished_jobs(root: Path | None = None) -> Iterator[Unfinished]:
    """Yield the jobs whose progress is kept, those that went on last first.

    Other processes may start and end jobs meanwhile: one that ends while it is looked at is left out or incomplete.
    """
    sizes_and_changes = {
        folder: (sum(file.st_size for file in files), max(file.st_mtime for file in files))
        for folder in (root or unfinished_folder()).glob("[!.]*")
        if (files := _files(folder))
    }
    for folder, (size, changed) in sorted(sizes_and_changes.items(), key=lambda job: job[1][1], reverse=True):
        try:
            args = dict(json.loads(read_plain_text(folder / "job.json"))["args"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            args = {}
        yield Unfinished(folder, args, _steps_logged(folder), size, changed, _is_running(folder))


def clear(job: Unfinished) -> None:
    """Delete the progress of a job that does not run.

    Raises:
        JobIsRunning: where it does.
    """
    held = take(job.folder)
    if held is None:
        raise JobIsRunning(f"{job.folder.name[:8]} runs: its progress is not deleted. Stop it first.")
    delete(job.folder)
    os.close(held)


def make_room(root: Path, keep: Path) -> None:
    """Delete the progress of jobs that are done, and of the oldest ones that are over the bound on disk.

    Raises:
        ValueError: where the bound, ``$DOMAINBED_REASONING_UNFINISHED_GB``, is no number.
    """
    said = os.environ.get(BOUND, str(_DEFAULT_BOUND_GB))
    try:
        bound = float(said) * 1e9
    except ValueError as error:
        raise ValueError(f"{BOUND}={said!r} should be a number of gigabytes, as in 50.") from error
    total = 0
    for job in unfinished_jobs(root):
        total += job.size
        if job.folder != keep and not job.running and (job.done or total > bound):
            if not job.done:
                name = f"{job.args.get('algorithm', '?')} on {job.args.get('dataset', '?')}"
                print(f"Deleted the progress of an unfinished job ({name}): more than {said} GB ({BOUND}).", flush=True)
            with suppress(JobIsRunning, OSError):  # since it was looked at; or it is another user's
                clear(job)
                total -= job.size
    for rest in root.glob(".*"):  # what a process that was killed had begun to delete
        shutil.rmtree(rest, ignore_errors=True)


def take(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of a folder, made if need be; None where another process has the job.

    Whoever lists jobs holds every lock for a moment, and a folder may be deleted between the opening of its lock and
    the locking: neither is a process that has the job, and both are over before `_PATIENCE` is.

    Raises:
        OSError: the folder cannot be made, or its file system has no locks.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        fault = None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
            taken = False
            try:
                with suppress(BlockingIOError):
                    lock(descriptor)
                    taken = os.path.samestat(os.fstat(descriptor), os.stat(folder / "lock"))
                    if taken:
                        return descriptor
            finally:
                if not taken:
                    os.close(descriptor)
        except (FileNotFoundError, FileExistsError) as error:  # mkdir finds it there, and looks again when it is gone
            fault = error
        if time.monotonic() >= deadline:
            if fault is not None:
                raise _named(fault, folder)
            return None
        time.sleep(0.01)


def _named(fault: OSError, folder: Path) -> OSError:
    """Return the error that says why a folder cannot be made: a link to nowhere says only that it exists."""
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            return FileNotFoundError(f"{place} is a link to {os.readlink(place)}, which does not exist")
    return fault


def _is_running(folder: Path) -> bool:
    """Return whether a process holds the folder's lock."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY)
    except OSError:  # it has just gone, or is another user's
        return False
    try:
        lock(descriptor, shared=True)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: no job keeps its progress there
        return False
    finally:
        os.close(descriptor)
    return False


def delete(folder: Path) -> None:
    """Delete a folder whose lock is held, all at once: it is renamed first, so that nobody begins in what is left."""
    renamed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with suppress(OSError):
        folder.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def is_done(output_dir: Any, folder: Path) -> bool:
    """Return whether DomainBed has written ``done`` since the job began; False where the folder is no path."""
    try:
        return _modified(Path(output_dir) / "done") >= _modified(folder / "job.json")
    except (OSError, TypeError, ValueError):
        return False


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _steps_logged(folder: Path) -> int:
    try:
        with (folder / "log.jsonl").open("rb") as log:
            return sum(line.startswith(b'{"values"') for line in log)
    except OSError:
        return 0


def _files(folder: Path) -> list[os.stat_result]:
    """Return what is known of the files of a folder that another process may be deleting, or that is another user's."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                found.append(entry.stat())
    return found
