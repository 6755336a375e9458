"""What a training job has done so far, kept so that the same job, started again, goes on where it was killed.

DomainBed starts every job at step 0 and does not keep the folder of an incomplete one. So the steps' values and the
evaluations' answers are kept in the user's cache folder, under a key made of everything that decides the job's numbers.
A job that finds its own is *replayed*: DomainBed draws the same batches again and gets the recorded values and answers
for them, which costs the loading of the images but no model; from the last saved state on, everything is computed.

A state is saved whenever that has taken at most one hundredth of the time since the last, and before an evaluation.

Files of a job: ``job.json`` (what it is), ``log.jsonl`` (a line a step or a batch of answers), ``state.pt`` (tensors
and plain values, with the length of the log that it belongs to), ``lock`` (held while the job runs).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from domainbed_reasoning.atomic import replace_text, replacing
from domainbed_reasoning.unfinished import JobIsRunning, delete, is_done, make_room, take, unfinished_folder

_SHARE_OF_TIME = 0.01  # of training that may go into saving states
_FORMAT = 1


@dataclass(frozen=True)
class Answers:
    """One batch's answers at an evaluation.

    Attributes:
        classes: the class of each image that DomainBed's accuracy counts.
        chains: the generated chains; None where none were asked for, or where they play no further part.
        labels: the classification path's classes; None where not asked for.
        state: which weights wrote the chains, as the model calls it; "" where it does not remember what it wrote.
    """

    classes: list[int]
    chains: list[str] | None
    labels: list[int] | None
    state: str = ""


def key_of(job: Mapping[str, Any]) -> str:
    """Return the key of a job: a digest of everything in ``job``, which must be JSON."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:32]


class Progress:
    """The recorded past of a job, then the recording of what it does.

    Args:
        job: what decides the job's numbers, as JSON; `key_of` makes it the key. Its ``args`` are DomainBed's.
        root: folder of all jobs' progress.

    Attributes:
        state: what `save` was given last by the earlier process; None where the job starts from nothing.

    Raises:
        JobIsRunning: where another process has this job.
        OSError: where nothing can be kept there.
    """

    def __init__(self, job: Mapping[str, Any], root: Path | None = None):
        self.key = key_of(job)
        self.folder = (root or unfinished_folder()) / self.key
        self._lock = take(self.folder)
        if self._lock is None:
            raise JobIsRunning(
                f"This job runs in another process already (its progress, {self.folder}, is locked): wait for it, or "
                'give this one another --output_dir, or the hparam "resume": false.'
            )
        for part in self.folder.glob(".*"):  # of a file that was being written when the earlier process was killed
            part.unlink()
        self.state = self._read_state()
        self._steps: list[dict[str, Any]] = []
        self._waiting: deque[dict[str, Any]] = deque()
        self._open_log()
        replace_text(self.folder / "job.json", json.dumps(dict(job), indent=1) + "\n")
        self._saved_at, self._cost, self._saved_steps = time.monotonic(), 0.0, -1
        if self.state is not None:
            self._saved_steps = self.state["steps"]
        atexit.register(self._tidy_up, job.get("args", {}).get("output_dir"))
        make_room(self.folder.parent, keep=self.folder)

    # -- the past -------------------------------------------------------------------------------------------------

    @property
    def replays(self) -> bool:
        """Whether something recorded is still to be handed out."""
        return bool(self._waiting)

    def next_step(self) -> dict[str, float]:
        """Return the values of the next recorded step.

        Raises:
            RuntimeError: where an evaluation was recorded at this point.
        """
        return dict(self._next("values")["values"])

    def next_answers(self, count: int) -> Answers:
        """Return the next recorded batch of answers.

        Args:
            count: of images that are asked about.

        Raises:
            RuntimeError: where something else was recorded at this point.
        """
        answers = Answers(**self._next("answers")["answers"])
        if len(answers.classes) != count:
            raise self._misfit(f"{len(answers.classes)} answers were recorded where {count} are asked for")
        return answers

    def labelled(self, round: int) -> list[tuple[int, int, str, bool]]:
        """Return what was self-labelled in a round up to the state: environment, index, chain, whether kept."""
        steps = [step for step in self._steps if step["values"]["stage"] == round]
        return [(row[0], row[1], row[2], row[3]) for step in steps for row in step["labelled"]]

    def _next(self, kind: str) -> dict[str, Any]:
        event = self._waiting.popleft()
        if kind not in event:
            raise self._misfit(f"{kind} are asked for where {', '.join(event)} was recorded")
        return event

    def _misfit(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"The recorded progress of this job does not fit what it does now: {how}. Start it again after "
            f"`domainbed-reasoning unfinished --clear {self.key[:8]}`, and it will begin at step 0."
        )

    def _read_state(self) -> dict[str, Any] | None:
        path = self.folder / "state.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).splitlines()[0]
            print(
                f"The saved progress of this job, {path}, cannot be read ({reason}): it begins at step 0.", flush=True
            )
            return None
        return dict(state) if state.get("format") == _FORMAT else None

    def _open_log(self) -> None:
        """Read the log as far as it belongs to the state, cut off the rest, and go on writing there."""
        path = self.folder / "log.jsonl"
        length = 0
        if self.state is not None:
            with path.open("rb") as log:
                for line in log:
                    event = _event(line)
                    # Beyond the state's own part only the answers of the evaluation that it was saved for are of use.
                    if event is None or (length >= self.state["log_bytes"] and "answers" not in event):
                        break
                    length += len(line)
                    self._waiting.append(event)
                    if "values" in event:
                        self._steps.append(event)
            if length < self.state["log_bytes"]:
                print(f"The log of this job's progress, {path}, is cut short: it begins at step 0.", flush=True)
                self.state, length = None, 0
                self._waiting.clear()
                self._steps.clear()
        self._log: int | None = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(self._log, length)
        os.lseek(self._log, length, os.SEEK_SET)
        self._length = length

    # -- recording ------------------------------------------------------------------------------------------------

    def record_step(self, values: Mapping[str, float], labelled: Sequence[tuple[int, int, str, bool]]) -> None:
        """Record a step's values and the chains that were self-labelled in it."""
        self._write({"values": dict(values), "labelled": labelled})

    def record_answers(self, answers: Answers) -> None:
        """Record one batch's answers."""
        self._write({"answers": asdict(answers)})

    def save(self, steps: int, state: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Save the state after ``steps`` steps if it is time to, or in any case, but never twice.

        Args:
            steps: taken so far.
            state: makes what is to be found in `state` again: tensors and plain values.
            now: do not wait until saving has become cheap enough.
        """
        started = time.monotonic()
        due = now or started - self._saved_at >= self._cost / _SHARE_OF_TIME
        if self._log is None or steps == self._saved_steps or not due:
            return
        try:
            with replacing(self.folder / "state.pt", durable=True) as file:
                os.fsync(self._log)
                torch.save({**state(), "format": _FORMAT, "log_bytes": self._length, "steps": steps}, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self._give_up(error)
            return
        self._saved_at = time.monotonic()
        self._cost, self._saved_steps = self._saved_at - started, steps

    def kept(self, name: str, tensors: dict[str, torch.Tensor], replays: bool) -> dict[str, torch.Tensor]:
        """Return ``tensors`` and keep them under ``name``; in a replay, return what was kept under it instead."""
        path = self.folder / name
        if replays and path.is_file():
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        if self._log is not None and not path.is_file():
            try:
                with replacing(path) as file:
                    torch.save(tensors, file)
            except (OSError, RuntimeError) as error:
                self._give_up(error)
        return tensors

    def _write(self, event: dict[str, Any]) -> None:
        if self._log is None:
            return
        line = json.dumps(event).encode() + b"\n"
        try:
            written = os.write(self._log, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")
        except OSError as error:
            self._give_up(error)
        else:
            self._length += len(line)

    def _give_up(self, error: Exception) -> None:
        """Stop recording: training is worth more than its record."""
        print(
            f"The progress of this job can no longer be kept in {self.folder} ({error}). It goes on; killed from now "
            "on, it would go on from the last state that was saved.",
            flush=True,
        )
        if self._log is not None:
            os.close(self._log)
        self._log = None

    def _tidy_up(self, output_dir: str | None) -> None:
        """Forget a job that has ended well: DomainBed has written ``done``."""
        if is_done(output_dir, self.folder):
            delete(self.folder)


def _event(line: bytes) -> dict[str, Any] | None:
    """Return a line of the log; None for one that was cut off."""
    try:
        event = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
