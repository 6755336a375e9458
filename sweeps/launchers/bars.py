"""Progress bars of a launcher: one for all jobs, and one for each running job."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

from domainbed_reasoning.jobs import progress
from domainbed_reasoning.sweeps.launchers.jobs import Failure, Job


class Bars:
    """Bars on standard error if that is a terminal; otherwise nothing but failures is printed.

    Args:
        jobs: all jobs.
    """

    def __init__(self, jobs: Sequence[Job]):
        self._numbers = {job.folder: number for number, job in enumerate(jobs)}
        self._all = tqdm(total=len(jobs), unit="job", dynamic_ncols=True, file=sys.stderr, disable=None)
        self._running: dict[Path, tuple[str, tqdm[NoReturn]]] = {}  # by folder: the job's name and its bar
        self._files = tempfile.TemporaryDirectory(prefix="progress-")

    def __enter__(self) -> Bars:
        """Show the bars until the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bars."""
        for bar in (*(bar for _, bar in self._running.values()), self._all):
            bar.close()
        self._files.cleanup()

    @property
    def shown(self) -> bool:
        """Whether there is a terminal, so that `refresh` should be called about once a second."""
        return not self._all.disable

    def start(self, job: Job, waiting: int) -> dict[str, str]:
        """Add a job's bar; return the environment variable through which the job reports its progress."""
        if self.shown:
            shown: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "file": sys.stderr}
            bar = tqdm(
                total=1, desc=job.name, bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}", **shown
            )
            self._running[job.folder] = job.name, bar
        self._all.set_postfix_str(f"{len(self._running)} running, {waiting} waiting")
        return {progress.VARIABLE: str(self._file_of(job.folder))}

    def refresh(self) -> None:
        """Update the bars of the running jobs and the elapsed time."""
        for folder, (name, bar) in self._running.items():
            with suppress(FileNotFoundError):  # a baseline reports nothing, and other jobs nothing at first
                now = json.loads(self._file_of(folder).read_text())
                bar.total, bar.n = now["total"], now["done"]
                bar.set_description_str(f"{name}: {now['task']}", refresh=False)
            bar.refresh()
        self._all.refresh()

    def end(self, job: Job, failure: Failure | None) -> None:
        """Remove a job's bar and count it; print its failure."""
        if job.folder in self._running:
            self._running.pop(job.folder)[1].close()
        if failure is not None:
            self._all.write(f"FAILED: {job.name} ({failure.cause})", file=sys.stderr)
        self._all.update()

    def _file_of(self, folder: Path) -> Path:
        return Path(self._files.name) / str(self._numbers[folder])
