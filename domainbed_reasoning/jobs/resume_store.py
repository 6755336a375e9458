"""The folders of jobs' saved progress: locking, listing and pruning.

Jobs start and end concurrently, possibly on several machines that share a home folder: another process may delete a
folder at any time.
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
from domainbed_reasoning.files.locks import FileLocked, is_locked, lock_in_place
from domainbed_reasoning.files.plain import read_plain_text
from domainbed_reasoning.terminal import get_logger

LIMIT = "DOMAINBED_REASONING_UNFINISHED_GB"
_DEFAULT_LIMIT_GB = 50.0
_PATIENCE = 2.0  # seconds after which a held lock counts as that of a running job
_log = get_logger(__name__)


class JobIsRunning(RuntimeError):
    """Another process is running the same job."""


def progress_folder() -> Path:
    """Return the folder of all jobs' progress, which may not exist yet."""
    return cache_folder() / "unfinished"


@dataclass(frozen=True)
class SavedProgress:
    """The saved progress of one job.

    Attributes:
        folder: its folder, named after the job's key.
        args: DomainBed's arguments of the job.
        steps: recorded training steps.
        size: of the folder in bytes.
        changed: time of the last change, seconds since the epoch.
        running: whether a process is running the job.
    """

    folder: Path
    args: Mapping[str, Any]
    steps: int
    size: int
    changed: float
    running: bool

    @property
    def done(self) -> bool:
        """Whether the job has completed since."""
        return is_done(self.args.get("output_dir"), self.folder)


def list_progress(root: Path | None = None) -> Iterator[SavedProgress]:
    """Yield the saved progress of all jobs, last changed first.

    A job that ends meanwhile is left out or incomplete.
    """
    sizes_and_changes = {
        folder: (sum(file.st_size for file in files), max(file.st_mtime for file in files))
        for folder in (root or progress_folder()).glob("[!.]*")
        if (files := _files(folder))
    }
    for folder, (size, changed) in sorted(sizes_and_changes.items(), key=lambda job: job[1][1], reverse=True):
        try:
            args = dict(json.loads(read_plain_text(folder / "job.json"))["args"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            args = {}
        yield SavedProgress(folder, args, _steps_logged(folder), size, changed, is_locked(folder / "lock"))


def clear(job: SavedProgress) -> None:
    """Delete the progress of a job.

    Raises:
        JobIsRunning: a process is running it.
        OSError: its folder cannot be locked.
    """
    try:
        lock = lock_folder(job.folder)
    except FileLocked as error:
        raise JobIsRunning(
            f"Job {job.folder.name[:8]} is running in {error.holder}; its progress was not deleted. Stop it first."
        ) from error
    delete(job.folder)
    os.close(lock)


def prune(root: Path, keep: Path) -> None:
    """Delete the progress of completed jobs, and of the oldest ones beyond the disk limit.

    Args:
        root: folder of all jobs' progress.
        keep: progress that is not deleted.

    Raises:
        ValueError: the limit, ``$DOMAINBED_REASONING_UNFINISHED_GB``, is not a number.
    """
    value = os.environ.get(LIMIT, str(_DEFAULT_LIMIT_GB))
    try:
        limit = float(value) * 1e9
    except ValueError as error:
        raise ValueError(f"{LIMIT} must be a number of gigabytes, e.g. 50; got {value!r}.") from error
    total = 0
    for job in list_progress(root):
        total += job.size
        if job.folder != keep and not job.running and (job.done or total > limit):
            if not job.done:
                name = f"{job.args.get('algorithm', '?')} on {job.args.get('dataset', '?')}"
                _log.info("Deleted the progress of an interrupted job (%s): %s GB limit (%s).", name, value, LIMIT)
            with suppress(JobIsRunning, OSError):  # started meanwhile, or owned by another user
                clear(job)
                total -= job.size
    for rest in root.glob(".*"):  # from interrupted deletions
        shutil.rmtree(rest, ignore_errors=True)


def lock_folder(folder: Path) -> int:
    """Lock a folder, created if missing, and return the descriptor that holds the lock.

    Listing jobs takes each lock for a moment, and a folder may be deleted between opening and locking its lock file;
    both are over well before `_PATIENCE` is.

    Raises:
        FileLocked: another process is running the job.
        OSError: the folder cannot be created, or its file system does not support locks.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                if lock_in_place(descriptor, folder / "lock"):
                    return descriptor
                raise FileNotFoundError(f"{folder} was deleted while it was being locked")
            except BaseException:
                os.close(descriptor)
                raise
        except (FileLocked, FileNotFoundError, FileExistsError) as error:
            if time.monotonic() >= deadline:
                raise _naming_dangling_link(error, folder) from error
        time.sleep(0.01)


def _naming_dangling_link(error: OSError, folder: Path) -> OSError:
    """Return an error for a dangling link, which the system only reports as existing."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            return FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    return error


def delete(folder: Path) -> None:
    """Delete a locked folder at once: it is renamed first, so that no job starts in its remains."""
    renamed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with suppress(OSError):
        folder.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def is_done(output_dir: Any, folder: Path) -> bool:
    """Return whether DomainBed has written ``done`` since the job began; False if ``output_dir`` is not a path."""
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
    """Return the status of a folder's files; some may be disappearing or belong to another user."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                found.append(entry.stat())
    return found
