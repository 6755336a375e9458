"""One attempt at a job: a retried one leaves no record twice.

    python -m domainbed_reasoning.sweeps.launchers.attempts --command "python -m domainbed.scripts.train …"

The stock train script appends to the `results.jsonl` that it finds, and stock `collect_results` counts what it finds
there twice. So the records of an attempt that died are moved aside before the next one starts, and put together with
the next one's afterwards, by one rule: **a record of step s replaces all earlier ones of steps from s on**. An attempt
that starts at step 0 thereby replaces all; one that resumes continues.

A queue also starts a job again when it no longer hears of its node, which may live on, the first attempt with it. So
each attempt has a file in the job's folder, and the next one writes there that it is to end, and waits for that.

As a process it ends its train command when its standard input ends: when whoever started it is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.sweeps.launchers.jobs import Job, parse_job
from domainbed_reasoning.sweeps.launchers.processes import end, ended_by_sigterm, start

RECORDS = "results.jsonl"
RETRIES = "DOMAINBED_REASONING_RETRIES"
DEFAULT_RETRIES = 1
_POLL_SECONDS = 0.1
# How often an attempt looks whether it has been replaced, and how long the next one waits for it: one look, the grace
# of its train process, and some. An attempt that has died with its node costs the next one this long.
_RETRY_SECONDS = 2
_REPLACE_SECONDS = 20
_RUNS, _REPLACED = "runs", "replaced by a later attempt"


class Attempt:
    """A job that runs once, from what earlier attempts left.

    Args:
        job: what to run.
        said: what its log calls it, as in "attempt 2 of 2".
        environment: all its variables.
    """

    def __init__(self, job: Job, said: str, environment: Mapping[str, str]):
        self.job = job
        self.said = said
        self.environment = environment
        self.ended = False  # on purpose
        self.replaced = False  # by a later attempt at the same job
        self._file = job.folder / f"attempt-{uuid.uuid4().hex[:8]}.running"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Run it to its end and return its exit code (negative: the signal that ended it).

        A job that has ended well already, before its queue started it once more, is left as it is.
        """
        folder = self.job.folder
        if (folder / "done").exists():
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._replace_others()
            if (folder / "done").exists():  # by the one that was replaced
                join_records(folder)
                return 0
            set_aside(folder)
            self.say(f"--- {self.said}, {datetime.now(UTC).isoformat(timespec='seconds')}, on {socket.gethostname()}")
            try:
                return self._run_train_command()
            finally:
                if not self.replaced:
                    join_records(folder)
        finally:
            self._file.unlink(missing_ok=True)

    def _run_train_command(self) -> int:
        self._process = start(self.job, self.environment)
        try:
            if self.ended:  # meanwhile
                self.end()
            look = 0.0
            while (exit_code := self._process.poll()) is None:
                time.sleep(_POLL_SECONDS)
                if not self.replaced and time.monotonic() - look > _RETRY_SECONDS:
                    look = time.monotonic()
                    self.replaced = self._is_replaced()
                    if self.replaced:
                        self.say(f"--- {self.said}: {_REPLACED}, ended")
                        self.end()
        finally:
            end([self._process])
        return exit_code

    def _replace_others(self) -> None:
        """Tell other attempts at this job to end, and wait until they have, or are dead for all that is known."""
        others = list(self.job.folder.glob("attempt-*.running"))
        self._file.write_text(_RUNS)
        for other in others:
            try:
                with other.open("r+") as file:  # not anew, should it have gone
                    file.write(_REPLACED)
            except FileNotFoundError:
                pass
        deadline = time.monotonic() + _REPLACE_SECONDS
        while not self.ended and any(other.exists() for other in others) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for other in others:
            other.unlink(missing_ok=True)

    def _is_replaced(self) -> bool:
        """Return what its file says. It is read, since network file systems keep other answers for a minute."""
        try:
            said: str = self._file.read_text()
        except FileNotFoundError:
            return True
        except OSError:  # the file system is away for a while
            return False
        return said != _RUNS

    def say(self, line: str) -> None:
        """Write a line to the job's log."""
        with self.job.log.open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")

    def end(self, grace: float = 10) -> None:
        """End it, its children too: SIGTERM, and SIGKILL after ``grace`` seconds."""
        self.ended = True
        if self._process is not None:
            end([self._process], grace)


def set_aside(folder: Path) -> None:
    """Move the records of a dead attempt out of `collect_results`' sight, into a file with a number."""
    if (folder / RECORDS).exists():
        number = len(_aside(folder)) + 1
        os.replace(folder / RECORDS, folder / f"{RECORDS}.attempt-{number}")


def join_records(folder: Path) -> None:
    """Write the records of all attempts as those of one, atomically; leave the file alone where it is right already."""
    records = folder / RECORDS
    there = records.read_text(encoding="utf-8", errors="replace") if records.exists() else ""
    lines = [
        line for path in _aside(folder) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    joined = "".join(f"{line}\n" for line in without_repeats([*lines, *there.splitlines()]))
    if joined != there:
        replace_text(records, joined)


def without_repeats(lines: Iterable[str]) -> list[str]:
    """Return records in which every step stands once: one of step s replaces all earlier ones of steps from s on.

    Lines that a kill cut short are dropped.
    """
    kept: list[tuple[int, str]] = []
    for line in lines:
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
        kept = [(earlier, text) for earlier, text in kept if earlier < step]
        kept.append((step, line))
    return [text for _, text in kept]


def _aside(folder: Path) -> list[Path]:
    """Return the files of earlier attempts, the first one first."""
    found = [(re.fullmatch(rf"{RECORDS}\.attempt-(\d+)", path.name), path) for path in folder.glob(f"{RECORDS}.*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt and return its exit code, 128 + n for a job that signal n ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", required=True, help="as DomainBed's sweep hands it to a launcher")
    parser.add_argument("--said", default="attempt 1", help="what the log calls it (default: %(default)s)")
    given = parser.parse_args(argv)
    attempt = Attempt(parse_job(given.command), given.said, os.environ)

    def wait_for_the_end_of_input() -> None:
        while os.read(0, 4096):
            pass
        attempt.end()

    threading.Thread(target=wait_for_the_end_of_input, daemon=True).start()
    with ended_by_sigterm():
        exit_code = attempt.run()
    return exit_code if exit_code >= 0 else 128 - exit_code


if __name__ == "__main__":
    sys.exit(main())
