"""Kill a job during its evaluations: which chains does it generate, and any of them twice?

    python tests/invariants/mid_evaluation.py --folder FOLDER [--no-copy]

Each process is killed after a number of chains. A round uses the chains of the evaluation before it, whether or not a
merged copy of the model fits in memory. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from killing import differences, outcome, prepare, run, start

KILLED_AFTER = (5, 300, 400)  # chains of a process, of 560 an evaluation
HPARAMS = {
    "max_new_tokens": 48,
    "first_evaluation": 2,
    "mtct_epochs": 1,
    "sarr_rounds": 1,
    "lora_dropout": 0.0,
    "temperature": 0.0,
}
HPARAMS |= {"data_augmentation": False, "batch_size": 6}


def watch(log: Path, kills_after: int | None, copies: bool) -> None:
    """Log every chain that this process generates to ``log``, and kill the process after ``kills_after`` of them."""
    from domainbed_reasoning.jobs.replay_log import Progress
    from domainbed_reasoning.mllm import MLLM
    from domainbed_reasoning.mllm.generation import TextGenerator

    record, generate, count = Progress.record_ahead, TextGenerator.generate, 0

    def write(line: str) -> None:
        with log.open("a") as file:
            file.write(f"{line}\n")

    def record_ahead(self: Any, state: str, digest: str, chain: str) -> None:
        nonlocal count
        record(self, state, digest, chain)
        write(f"{state} {digest}")
        count += 1
        if count == kills_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def generated(self: Any, images: Any, *given: Any, **named: Any) -> list[str]:
        for _ in images:
            write("on demand")
        return generate(self, images, *given, **named)

    Progress.record_ahead = record_ahead  # type: ignore[method-assign]
    TextGenerator.generate = generated  # type: ignore[method-assign]
    if not copies:
        MLLM.fits_a_copy = lambda *given: False  # type: ignore[method-assign]


def main() -> int:
    """Run the killed job to its end, and an uninterrupted one; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--no-copy", action="store_true", help="as if no merged copy fitted in memory")
    given = parser.parse_args()
    prepare(given.folder / "cache")
    options = argparse.Namespace(algorithm="RDMLDG", steps=4, answer="chain", hparams=json.dumps(HPARAMS))
    killed, log, ended = given.folder / "killed", given.folder / "chains.txt", []
    for kills_after in (*KILLED_AFTER, None):
        options.before = lambda after=kills_after: watch(log, after, not given.no_copy)
        ended.append(os.waitpid(start(killed, options), 0)[1])
    lines = log.read_text().splitlines()
    printed = {
        "ended": ended,
        "generated": len(lines),
        "distinct": len(set(lines)),
        "on_demand": lines.count("on demand"),
    }
    records: Any = outcome(killed)["records"]
    printed["evaluations"] = sum(record["step"] + 1 >= HPARAMS["first_evaluation"] for record in records)
    printed["images"] = len((killed / "predictions.jsonl").read_text().splitlines())
    printed["accepted"] = records[-1]["sarr1_accepted"]
    printed["differing"] = []
    if not given.no_copy:  # merged and unmerged weights round differently
        del options.before
        run(given.folder / "uninterrupted", options)
        printed["differing"] = differences(outcome(given.folder / "uninterrupted"), outcome(killed))
    print(json.dumps(printed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
