"""The recorded progress of a training job, from which the same job resumes after a kill.

DomainBed starts every job at step 0 and does not keep the folder of an incomplete one. The steps' values and the
evaluations' answers are therefore stored in the user's cache folder, under a key derived from everything that
determines the results. Existing progress is *replayed*: DomainBed draws the same batches again and gets the recorded
values and answers, which loads the images but does not run the model; computation continues from the last saved state.

A state is saved whenever saving takes at most 1% of the time since the last one, and before an evaluation.

The chains of an evaluation are generated before DomainBed requests them, and recorded one by one (`record_ahead`); an
interrupted evaluation resumes with the missing ones.

Files of a job: ``job.json`` (its description), ``log.jsonl`` (a line per step, batch of answers, or chain generated
ahead), ``state.pt`` (tensors and plain values), ``adapters-N.pt`` (the weights of each checkpoint if DomainBed saves
all), ``lock`` (held while the job runs). The state contains the length of the log and the digests of log and adapters:
they are compared before a replay, and the job starts at step 0 if any differs.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from domainbed_reasoning.files import format_version
from domainbed_reasoning.files.atomic import replace_text
from domainbed_reasoning.files.locks import FileLocked
from domainbed_reasoning.jobs.resume_store import JobIsRunning, delete, is_done, lock_folder, progress_folder, prune
from domainbed_reasoning.jobs.sealed import Damaged, check_tensors, line_of, read_lines, read_tensors, write_tensors
from domainbed_reasoning.terminal import get_logger

_logger = get_logger(__name__)

_SHARE_OF_TIME = 0.01  # share of the training time for saving states
_FORMAT = 2  # of state.pt, see `format_version`
# The keys that `Progress` adds to a state, and their types.
_OF_STATE = (("format", int), ("steps", int), ("kept", dict), ("log_bytes", int), ("log_digest", str))


@dataclass(frozen=True)
class Answers:
    """One batch's answers at an evaluation.

    Attributes:
        classes: the class of each image that DomainBed's accuracy counts.
        chains: the generated chains; None if none were generated.
        labels: the classification path's classes; None if not computed.
        state: cache key of the weights that generated the chains; "" if the model does not cache answers.
    """

    classes: list[int]
    chains: list[str] | None
    labels: list[int] | None
    state: str = ""


def key_of(job: Mapping[str, Any]) -> str:
    """Return the key of a job: a digest of ``job``, which must be JSON."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:32]


class Progress:
    """Replays the records of a job's earlier processes, then records this one.

    Args:
        job: everything that determines the results, as JSON; hashed by `key_of`. Its ``args`` are DomainBed's.
        root: folder of all jobs' progress.

    Attributes:
        state: the last saved state of an earlier process; None if the job starts at step 0.

    Raises:
        JobIsRunning: another process is running this job.
        RuntimeError: a newer version of this package saved the progress.
        OSError: the folder cannot be written.
    """

    def __init__(self, job: Mapping[str, Any], root: Path | None = None):
        self.key = key_of(job)
        self.folder = (root or progress_folder()) / self.key
        self.state: dict[str, Any] | None = None
        self._log: int | None = None
        self._lock: int | None = None
        try:
            self._lock = lock_folder(self.folder)
        except FileLocked as error:
            raise JobIsRunning(
                f"This job is already running in {error.holder}, which has locked {self.folder}. Wait for it, choose "
                'another --output_dir, or set the hparam "resume": false.'
            ) from error
        try:
            self._open(job)
        except BaseException:
            self.close()
            raise
        atexit.register(self._tidy_up, job.get("args", {}).get("output_dir"))

    def _open(self, job: Mapping[str, Any]) -> None:
        """Load an earlier process's progress; if any of it is damaged, start with an empty folder."""
        self._reset()
        try:
            self._read()
        except Damaged as error:
            _logger.info("The progress saved in %s cannot be used: %s. Starting from step 0.", self.folder, error)
            self._reset()
        for path in self.folder.iterdir():
            temporary = path.name.startswith(".")  # left by a process that was killed while writing
            if temporary or (self.state is None and path.name != "lock"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._log = os.open(self.folder / "log.jsonl", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.ftruncate(self._log, self._length)
        os.lseek(self._log, self._length, os.SEEK_SET)
        replace_text(self.folder / "job.json", json.dumps(dict(job), indent=1) + "\n")
        self._saved_at, self._cost = time.monotonic(), 0.0
        self._saved_steps = self.state["steps"] if self.state is not None else -1
        prune(self.folder.parent, keep=self.folder)

    def recorded(self) -> dict[str, Any]:
        """Return what a `Replica` needs: tensors and plain values."""
        names = ("key", "folder", "state", "_steps", "_waiting", "ahead")
        return {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """Stop recording and release the lock."""
        for descriptor in (self._log, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._log = self._lock = None

    # -- replaying ------------------------------------------------------------------------------------------------

    @property
    def replays(self) -> bool:
        """Whether recorded events are left to replay."""
        return bool(self._waiting)

    def next_step(self) -> dict[str, float]:
        """Return the values of the next recorded step.

        Raises:
            RuntimeError: an evaluation was recorded at this point.
        """
        return dict(self._next("values")["values"])

    def next_answers(self, count: int) -> Answers:
        """Return the next recorded batch of answers.

        Args:
            count: number of images to answer.

        Raises:
            RuntimeError: something else was recorded at this point.
        """
        answers = Answers(**self._next("answers")["answers"])
        if len(answers.classes) != count:
            raise self._misfit(f"{len(answers.classes)} answers were recorded, {count} requested")
        return answers

    def labeled(self, round: int) -> list[tuple[int, int, str, bool]]:
        """Return the self-labels of a round up to the state: environment, index, chain, whether it was kept."""
        steps = [step for step in self._steps if step["values"]["stage"] == round]
        return [(row[0], row[1], row[2], row[3]) for step in steps for row in step["labelled"]]

    def _next(self, kind: str) -> dict[str, Any]:
        event = self._waiting.popleft()
        if kind not in event:
            raise self._misfit(f"{kind} requested, {', '.join(event)} recorded")
        return event

    def _misfit(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"The recorded progress does not match this job: {how}. Run `domainbed-reasoning jobs --clear "
            f"{self.key[:8]}` and restart the job from step 0."
        )

    def _reset(self) -> None:
        self.state = None
        self._steps: list[dict[str, Any]] = []
        self._waiting: deque[dict[str, Any]] = deque()
        self.ahead: dict[str, dict[str, str]] = {}
        self._kept: dict[str, str] = {}  # digests of the files that `kept` has written
        self._length, self._digest = 0, ""  # of the log

    def _read(self) -> None:
        """Read state and log, and compare all files that a replay needs with their digests.

        Raises:
            Damaged: a file does not match its digest.
            RuntimeError: a newer version of this package wrote it.
            OSError: a file cannot be read.
        """
        path = self.folder / "state.pt"
        if not os.path.lexists(path):
            others = {other.name for other in self.folder.iterdir() if not other.name.startswith(".")}
            if others - {"lock", "job.json", "log.jsonl"} or self._is_logged():
                raise Damaged("state.pt is missing")
            return
        state = read_tensors(path)
        if isinstance(state, dict) and (newer := format_version.newer_than(_FORMAT, state.get("format"))):
            raise RuntimeError(
                f"{path}: {newer}. {format_version.UPGRADE}, or run `domainbed-reasoning jobs --clear {self.key[:8]}` "
                "to discard it and restart the job from step 0."
            )
        if not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in _OF_STATE):
            raise Damaged("state.pt is not a saved state")
        if state["format"] != _FORMAT:
            raise Damaged(f"state.pt has format {state['format']}, this version reads {_FORMAT}")
        for name, digest in state["kept"].items():
            check_tensors(self.folder / name, digest)
        self._read_log(state["log_bytes"], state["log_digest"])
        self.state, self._kept = state, dict(state["kept"])

    def _is_logged(self) -> bool:
        log = self.folder / "log.jsonl"
        return os.path.lexists(log) and (not log.is_file() or log.stat().st_size > 0)

    def _read_log(self, needed: int, digest: str) -> None:
        """Read the part of the log that belongs to the state.

        Raises:
            Damaged: its first ``needed`` bytes do not have this digest.
        """
        sound = needed == 0
        for length, event, running in read_lines(self.folder / "log.jsonl"):
            # After that part, only the answers of the evaluation right after the state can be used.
            if self._length >= needed and not {"answers", "ahead"} & event.keys():
                break
            self._length += length
            self._digest = running
            sound = sound or (self._length == needed and running == digest)
            if "ahead" in event:
                state, picture, chain = event["ahead"]
                self.ahead.setdefault(state, {})[picture] = chain
                continue
            self._waiting.append(event)
            if "values" in event:
                self._steps.append(event)
                self.ahead.clear()  # its evaluation has been answered
        if not sound:
            raise Damaged("log.jsonl is damaged or cut off")

    # -- recording ------------------------------------------------------------------------------------------------

    def record_step(self, values: Mapping[str, float], labeled: Sequence[tuple[int, int, str, bool]]) -> None:
        """Record a step's values and the chains that were self-labeled in it."""
        self._write({"values": dict(values), "labelled": labeled})

    def record_answers(self, answers: Answers) -> None:
        """Record one batch's answers."""
        self._write({"answers": asdict(answers)})

    def record_ahead(self, state: str, picture: str, chain: str) -> None:
        """Record a chain that was generated before its evaluation requested it."""
        self._write({"ahead": [state, picture, chain]})

    def save(self, steps: int, state: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Save the state after ``steps`` steps if it is due and not yet saved.

        Args:
            steps: number of steps so far.
            state: returns the state for the next process's attribute `state`: tensors and plain values.
            now: save even if it takes more than `_SHARE_OF_TIME`.
        """
        started = time.monotonic()
        due = now or started - self._saved_at >= self._cost / _SHARE_OF_TIME
        if self._log is None or steps == self._saved_steps or not due:
            return
        ours = {"format": _FORMAT, "steps": steps, "kept": dict(self._kept)}
        ours |= {"log_bytes": self._length, "log_digest": self._digest}
        try:
            os.fsync(self._log)
            write_tensors(self.folder / "state.pt", {**state(), **ours})
        except (OSError, RuntimeError) as error:  # RuntimeError: of torch, where the disk is not to blame
            self._give_up(error)
            return
        self._saved_at = time.monotonic()
        self._cost, self._saved_steps = self._saved_at - started, steps

    def kept(self, name: str, tensors: dict[str, torch.Tensor], replays: bool) -> dict[str, torch.Tensor]:
        """Return ``tensors`` and save them as ``name``; in a replay, return the saved ones instead.

        Raises:
            RuntimeError: the saved tensors have been removed or changed since the replay began.
        """
        path = self.folder / name
        if replays:
            try:
                return dict(read_tensors(path, self._kept.get(name, "")))
            except Damaged as error:
                raise self._misfit(str(error)) from error
        if self._log is not None and name not in self._kept:
            try:
                self._kept[name] = write_tensors(path, tensors)
            except (OSError, RuntimeError) as error:
                self._give_up(error)
        return tensors

    def _write(self, event: dict[str, Any]) -> None:
        if self._log is None:
            return
        line, digest = line_of(event, self._digest)
        try:
            written = os.write(self._log, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")
        except OSError as error:
            self._give_up(error)
        else:
            self._length += len(line)
            self._digest = digest

    def _give_up(self, error: Exception) -> None:
        """Stop recording: training continues without it."""
        _logger.info(
            "Progress can no longer be saved in %s (%s). Training continues; a restart uses the last saved state.",
            self.folder,
            error,
        )
        if self._log is not None:
            os.close(self._log)
        self._log = None

    def _tidy_up(self, output_dir: str | None) -> None:
        """Delete the progress of a completed job: DomainBed has written ``done``."""
        if is_done(output_dir, self.folder):
            delete(self.folder)


class Replica(Progress):
    """The progress that rank 0 of a job has read, for the other ranks: replays and restores it, and records nothing.

    Args:
        recorded: from `Progress.recorded`.
    """

    def __init__(self, recorded: Mapping[str, Any]):
        self._reset()
        vars(self).update(recorded)
        self._log = self._lock = None

    def save(self, steps: int, state: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Do nothing: rank 0 saves."""

    def kept(self, name: str, tensors: dict[str, torch.Tensor], replays: bool) -> dict[str, torch.Tensor]:
        """Return ``tensors``: rank 0 keeps them."""
        return tensors
