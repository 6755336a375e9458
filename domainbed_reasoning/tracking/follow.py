"""Follows the files of one job and logs them to a tracker, in a process of its own.

The process reads the job from its standard input and ends when that is closed, or when the training process has been
killed. ``tracking.json`` in the job's folder has what was logged. A resumed job repeats its earlier records, which are
logged already, and goes on in the same run; one whose records differ, because it restarted from other weights, gets a
run of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.files.locks import FileLocked, lock
from domainbed_reasoning.files.plain import read_plain_text
from domainbed_reasoning.jobs.job_files import RESULTS, numbered_lines
from domainbed_reasoning.jobs.results_file import MEASURED, add_record
from domainbed_reasoning.jobs.stage_file import STAGES
from domainbed_reasoning.jobs.values import ACCURACY, is_evaluated
from domainbed_reasoning.tracking.tools import TRACKERS, Run, Tracker

STATE = "tracking.json"
LOG = "tracking.log"
_LOCK = ".tracking.lock"
_POLL_SECONDS = 1.0
_WAIT_SECONDS = 60.0  # for the process that followed a job before it was killed
_EXAMPLES = 8
_EXAMPLE_COLUMNS = ("image", "domain", "label", "kept", "chain")
_ANSWER_COLUMNS = ("image", "label", "label_answer", "chain_answer", "chain")


class Follower:
    """Logs what a job has written and what is not logged yet.

    Args:
        folder: of the job.
        args: DomainBed's, with which its records are marked.
        tool: a key of `TRACKERS`.
        is_of_sweep: whether the folder is one of a sweep's.
    """

    def __init__(self, folder: Path, args: Mapping[str, Any], tool: str, is_of_sweep: bool):
        self.folder, self.args, self.tool = folder, args, tool
        self.sweep = folder.parent if is_of_sweep else folder
        self.tracker: Tracker | None = None
        key = json.dumps([str(folder), args], sort_keys=True)
        self.id = hashlib.sha256(key.encode()).hexdigest()[:12]
        self.state = self._read_state()
        self._stamps: list[tuple[int, int]] = []  # of the files as they were last read
        self._last: Mapping[str, Any] | None = None  # record
        self._unsaved: list[tuple[float, str]] = []  # when it was logged, and the state then

    def catch_up(self) -> None:
        """Log new records and stages, and save as logged what would survive a kill."""
        stamps = [_stamp(self.folder / name) for name in (RESULTS, STAGES)]
        if stamps != self._stamps:
            self._log_new()
            self._stamps = stamps
        self._save_flushed()

    def _log_new(self) -> None:
        run: list[Mapping[str, Any]] = []
        for found in self._objects(RESULTS):
            if found.get("args") == self.args and isinstance(found.get("step"), int):
                run = add_record(run, found)
        if any(self._differs(record) for record in run):
            self._restart()
        self._last = run[-1] if run else None
        stages = list(self._objects(STAGES))
        for record in run:
            step = record["step"]
            known = self.state["logged"].setdefault(str(step), {})
            new = {name: value for name, value in self._numbers_of(record).items() if name not in known}
            if new:
                self._open(record).log(step, new)
                known |= new
                self.state["rows"] += 1
                self._save()
            for stage in stages:
                if stage["last"] <= step and stage["name"] not in self.state["tables"]:
                    self._log_stage(self._open(record), step, stage)

    def finish(self) -> None:
        """Log what is left, and close the run; also one of which only this is left."""
        finished = self._is_finished()
        if finished:
            self._stamps = []  # only now the last record is known to be the last
        self.catch_up()
        if finished and not self.state["finished"] and self._last is not None:
            self._log_answers(self._open(self._last))
            self.state["finished"] = True
            self._save()
        if self.tracker is not None:
            self.tracker.close(finished)
            self.tracker = None
        self._save_flushed()

    def _log_stage(self, tracker: Tracker, step: int, stage: Mapping[str, Any]) -> None:
        """Log a stage at the first record after its end: its means and its examples."""
        tracker.log(step, {f"stage_{key}": value for key, value in _numbers(stage["values"]).items()})
        if stage["examples"]:
            rows = _cells(stage["examples"], _EXAMPLE_COLUMNS)
            tracker.table(step, f"chains/{stage['name']}", _EXAMPLE_COLUMNS, rows)
        self._mark(stage["name"])

    def _log_answers(self, tracker: Tracker) -> None:
        """Log some answers of the last evaluation in target domains."""
        targets = self.args.get("test_envs") or []
        rows = [row for row in self._objects("predictions.jsonl") if row.get("env") in targets]
        if rows and "answers" not in self.state["tables"]:
            shown = rows[:: max(1, len(rows) // _EXAMPLES)][:_EXAMPLES]
            step = max(map(int, self.state["logged"]), default=0)
            tracker.table(step, "chains/target domains", _ANSWER_COLUMNS, _cells(shown, _ANSWER_COLUMNS))
            self._mark("answers")

    def _open(self, record: Mapping[str, Any]) -> Tracker:
        if self.tracker is None:
            attempt = self.state["attempt"]
            args, again = self.args, f"-{attempt}" if attempt > 1 else ""
            targets = ",".join(map(str, args.get("test_envs") or []))
            seeds = f"hparams {args.get('hparams_seed', 0)} trial {args.get('trial_seed', 0)}"
            name = f"{args['algorithm']} {args['dataset']} {targets} {seeds}{again}"
            config = {**args, **{f"hparams/{name}": value for name, value in dict(record.get("hparams") or {}).items()}}
            config.pop("hparams", None)
            run = Run(f"{self.id}{again}", name, self.sweep.name, self.folder, self.sweep, config, self.state["rows"])
            self.tracker = TRACKERS[self.tool](run)
        assert self.tracker is not None
        return self.tracker

    def _is_finished(self) -> bool:
        return (self.folder / "done").is_file()

    def _numbers_of(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return a record's numbers, without accuracies that were not measured."""
        measured = is_evaluated(record) or (record is self._last and self._is_finished())
        numbers = _numbers(record)
        return numbers if measured else {name: numbers[name] for name in numbers if not ACCURACY.fullmatch(name)}

    def _differs(self, record: Mapping[str, Any]) -> bool:
        known = self.state["logged"].get(str(record["step"]), {})
        values = _numbers(record)
        return any(name in values and repr(values[name]) != repr(known[name]) for name in known if name not in MEASURED)

    def _restart(self) -> None:
        """Begin another run."""
        if self.tracker is not None:
            self.tracker.close(False)
            self.tracker = None
        self.state |= {"attempt": self.state["attempt"] + 1, "rows": 0, "logged": {}, "tables": [], "finished": False}
        self._save()

    def _mark(self, table: str) -> None:
        self.state["tables"].append(table)
        self.state["rows"] += 2  # at most: means and table
        self._save()

    def _save(self) -> None:
        self._unsaved.append((time.monotonic(), json.dumps(self.state)))

    def _save_flushed(self) -> None:
        """Save the newest state that the tracker has flushed: a killed process logs the rest again."""
        seconds = self.tracker.FLUSH_SECONDS if self.tracker is not None else 0.0
        limit = time.monotonic() - seconds
        if flushed := [state for logged, state in self._unsaved if logged <= limit]:
            self._unsaved = self._unsaved[len(flushed) :]
            replace_text(self.folder / STATE, flushed[-1] + "\n")

    def _read_state(self) -> dict[str, Any]:
        new: dict[str, Any] = {"id": self.id, "tool": self.tool, "attempt": 1, "rows": 0, "logged": {}, "tables": []}
        new["finished"] = False
        with contextlib.suppress(OSError, ValueError, RecursionError):
            state = parse_json(read_plain_text(self.folder / STATE))
            state = {"finished": False, **state} if isinstance(state, dict) else None
            if state is not None and all(type(state.get(name)) is type(value) for name, value in new.items()):
                return state if (state["id"], state["tool"]) == (self.id, self.tool) else new
        return new

    def _objects(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the objects in a file's complete lines."""
        for _, line in numbered_lines(self.folder / name, []):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                if line.endswith("\n") and isinstance(value, dict):
                    yield value


def _stamp(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and time of change in nanoseconds; zeros if there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    return [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for the process that followed the job before it was killed, and hold the job's lock."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        limit = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                lock(descriptor)
                break
            except FileLocked as error:
                if time.monotonic() > limit:
                    raise TimeoutError(f"another process still tracks this job ({error})") from error
                time.sleep(_POLL_SECONDS / 4)
        yield
    finally:
        os.close(descriptor)


def _until(parent: int) -> Callable[[], bool]:
    """Return a function that waits a moment and returns whether the training process has ended."""

    def is_over() -> bool:
        return bool(select.select([sys.stdin], [], [], _POLL_SECONDS)[0]) or os.getppid() != parent

    return is_over


def main() -> int:
    """Follow the job that standard input describes; a failure is one warning on standard error."""
    job = json.loads(sys.stdin.readline())
    folder, tool = Path(job["folder"]), job["tool"]
    told = os.fdopen(os.dup(2), "w")
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)  # trackers print
    os.dup2(log, 2)
    is_over = _until(job["process"])
    try:
        with _alone(folder):
            follower = Follower(folder, job["args"], tool, job["is_of_sweep"])
            while not is_over():
                follower.catch_up()
            follower.finish()
    except Exception as error:  # whatever a tracker raises
        traceback.print_exc()
        cause = " ".join(str(error).split())[:300]
        print(
            f"WARNING: tracking with {tool} failed ({type(error).__name__}: {cause}). The job continues untracked; "
            f"details: {folder / LOG}",
            file=told,
            flush=True,
        )
        return 1
    return 0
