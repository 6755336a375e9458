"""One attempt at a job, such that retries leave no duplicate records.

    python -m domainbed_reasoning.sweeps.launchers.attempts --command "python -m domainbed.scripts.train …"

The records of earlier attempts are set aside before an attempt and joined with its own afterwards; see `results_file`.

A queue restarts a job when it loses contact with a node, on which the first attempt may still be running. Each attempt
therefore has a file in the job's folder, where the next one requests its end and waits for it.

Run as a module, it stops its train command when standard input closes, that is, when the process that started it dies.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from domainbed_reasoning.jobs.results_file import join_earlier, set_aside
from domainbed_reasoning.sweeps.launchers.jobs import Job, parse_job
from domainbed_reasoning.sweeps.launchers.processes import end, ended_by_sigterm, start

RETRIES = "DOMAINBED_REASONING_RETRIES"
DEFAULT_RETRIES = 1
_POLL_SECONDS = 0.1
# How often an attempt checks whether it has been replaced, and how long the next one waits for it: one check, the grace
# period of its train process, and a margin. An attempt that died with its node delays the next one by this long.
_CHECK_SECONDS = 2
_REPLACE_SECONDS = 20
_RUNS, _REPLACED = "runs", "replaced by a later attempt"


class Attempt:
    """One run of a job.

    Args:
        job: what to run.
        name: in the log, e.g. "attempt 2 of 2".
        environment: variables of the train process.
    """

    def __init__(self, job: Job, name: str, environment: Mapping[str, str]):
        self.job = job
        self.name = name
        self.environment = environment
        self.ended = False  # by `end`
        self.replaced = False  # by a later attempt at the same job
        self._file = job.folder / f"attempt-{uuid.uuid4().hex[:8]}.running"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run the job and return its exit code; negative for a signal.

        A completed job is not run again.
        """
        folder = self.job.folder
        if self.job.is_done:
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._replace_others()
            if self.job.is_done:  # by the one that was replaced
                join_earlier(folder)
                return 0
            set_aside(folder)
            self.write_log(
                f"--- {self.name}, {datetime.now(UTC).isoformat(timespec='seconds')}, on {socket.gethostname()}"
            )
            try:
                return self._run_train_command()
            finally:
                if not self.replaced:
                    join_earlier(folder)
        finally:
            self._file.unlink(missing_ok=True)

    def _run_train_command(self) -> int:
        self._process = start(self.job, self.environment)
        try:
            if self.ended:  # meanwhile
                self.end()
            checked = 0.0
            while (exit_code := self._process.poll()) is None:
                time.sleep(_POLL_SECONDS)
                if not self.replaced and time.monotonic() - checked > _CHECK_SECONDS:
                    checked = time.monotonic()
                    self.replaced = self._is_replaced()
                    if self.replaced:
                        self.write_log(f"--- {self.name}: {_REPLACED}, ended")
                        self.end()
        finally:
            end([self._process])
        return exit_code

    def _replace_others(self) -> None:
        """Request the end of other attempts at this job, and wait until they have ended or are presumed dead."""
        others = list(self.job.folder.glob("attempt-*.running"))
        self._file.write_text(_RUNS)
        for other in others:
            try:
                with other.open("r+") as file:  # fails if it has been removed
                    file.write(_REPLACED)
            except FileNotFoundError:
                pass
        deadline = time.monotonic() + _REPLACE_SECONDS
        while not self.ended and any(other.exists() for other in others) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for other in others:
            other.unlink(missing_ok=True)

    def _is_replaced(self) -> bool:
        """Return whether a later attempt has requested the end; read, as network file systems cache file status."""
        try:
            state: str = self._file.read_text()
        except FileNotFoundError:
            return True
        except OSError:  # the file system is temporarily unavailable
            return False
        return state != _RUNS

    def write_log(self, line: str) -> None:
        """Write a line to the job's log."""
        with self.job.log.open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")

    def end(self) -> None:
        """Stop the train process and its children."""
        self.ended = True
        if self._process is not None:
            end([self._process])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt and return its exit code; 128 + n for signal n."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", required=True, help="train command of DomainBed's sweep")
    parser.add_argument("--name", default="attempt 1", help="in the log (default: %(default)s)")
    args = parser.parse_args(argv)
    attempt = Attempt(parse_job(args.command), args.name, os.environ)

    def end_with_stdin() -> None:
        while os.read(0, 4096):
            pass
        attempt.end()

    threading.Thread(target=end_with_stdin, daemon=True).start()
    with ended_by_sigterm():
        exit_code = attempt.run()
    return exit_code if exit_code >= 0 else 128 - exit_code


if __name__ == "__main__":
    sys.exit(main())
