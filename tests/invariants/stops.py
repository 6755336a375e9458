"""Compare a job that is killed at chosen moments of SARR's rounds with an undisturbed one.

    python tests/invariants/stops.py --folder FOLDER

Every step saves a state here, which takes a second's training otherwise. Training splits are so small that a round
meets samples again, whose chains it has to remember. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from killing import differences, outcome, prepare, start

from domainbed_reasoning.method.schedule import plan_stages

STEPS = 10
STAGES = {"mtct_epochs": 1, "sarr_rounds": 2, "sarr_epochs": 1}
OWN = {"batch_size": 6, "max_new_tokens": 112, "lr": 4e-3, "first_evaluation": STEPS, "sarr_filter": "consistent"}
OWN |= STAGES | {"both_answers": False}
MORE = ["--holdout_fraction", "0.9"]


def begin(
    output_dir: Path,
    stop: tuple[str, int] | None,
    steps: int = STEPS,
    hparams: dict[str, Any] = OWN,
    more: Sequence[str] = MORE,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Run the job in a fork until it ends, or until it has ``recorded`` or ``saved`` so many steps; return its status.

    The log of a job that ends is kept as ``log.jsonl`` of its folder. What ``before`` does is done in the fork.
    """
    from domainbed_reasoning.jobs import replay_log as progress

    options = argparse.Namespace(algorithm="RDMLDG", steps=steps, answer="label", hparams=json.dumps(hparams))
    options.more, options.before = more, before
    originals = {name: getattr(progress.Progress, name) for name in ("record_step", "save")}
    delete = progress.delete

    def kept(folder: Path) -> None:
        shutil.copy(folder / "log.jsonl", output_dir)
        delete(folder)

    def record_step(self: Any, *args: Any) -> None:
        originals["record_step"](self, *args)
        if stop == ("recorded", (self.folder / "log.jsonl").read_bytes().count(b'{"values"')):
            os.kill(os.getpid(), signal.SIGKILL)

    def save(self: Any, *args: Any, **more: Any) -> None:
        originals["save"](self, *args, **more)
        if stop == ("saved", self._saved_steps):
            os.kill(os.getpid(), signal.SIGKILL)

    # The fork inherits these.
    progress._SHARE_OF_TIME, progress.delete = float("inf"), kept
    progress.Progress.record_step, progress.Progress.save = record_step, save  # type: ignore[method-assign]
    try:
        return os.waitpid(start(output_dir, options), 0)[1]
    finally:
        progress.delete = delete
        progress.Progress.record_step = originals["record_step"]  # type: ignore[method-assign]
        progress.Progress.save = originals["save"]  # type: ignore[method-assign]


def main() -> int:
    """Run both and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--hparams", type=json.loads, default={}, help="JSON, over those of the job")
    given = parser.parse_args()
    folder: Path = given.folder
    hparams = OWN | given.hparams
    prepare(folder / "cache")
    epochs = [STAGES["mtct_epochs"]] + [STAGES["sarr_epochs"]] * STAGES["sarr_rounds"]
    first, second = plan_stages(epochs, 1, STEPS).stages[1:]
    stops = [
        ("recorded", first.first + 2),  # the state is that after the round's first step
        ("saved", first.last + 1),  # the round's end, before the next begins
        ("recorded", second.first + 2),
        ("saved", second.last),
    ]
    killed = [begin(folder / "killed", stop, hparams=hparams) for stop in stops]
    ended = [begin(folder / name, None, hparams=hparams) for name in ("killed", "undisturbed")]
    events = {name: _events(folder / name / "log.jsonl") for name in ("killed", "undisturbed")}
    differing = differences(outcome(folder / "undisturbed"), outcome(folder / "killed"))
    differing += ["log"] if events["killed"] != events["undisturbed"] else []
    chains = [row for event in events["undisturbed"] for row in event.get("labelled", [])]
    rounds = [sum(event["values"]["stage"] == k for event in events["killed"] if "values" in event) for k in (1, 2)]
    surplus = sum(event["values"].get("updated") == 0 for event in events["undisturbed"] if "values" in event)
    summary = {"killed": killed, "ended": ended, "differing": differing, "rounds": rounds, "surplus": surplus}
    print(json.dumps(summary | {"chains": len(chains), "kept": sum(row[3] for row in chains)}))
    return 0


def _events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
