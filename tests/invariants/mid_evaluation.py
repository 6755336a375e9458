"""A job that is killed in the middle of its evaluations: which chains were written, and was any written twice?

    python tests/invariants/mid_evaluation.py --folder FOLDER [--no-copy]

Each process is killed when it has written so many chains. A round's chains are those of the evaluation before it,
whether or not a merged copy of the model fits. Prints a line of JSON.
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

KILLED_AFTER = (5, 150, 260)  # chains of a process
HPARAMS = {
    "max_new_tokens": 48,
    "first_evaluation": 2,
    "mtct_epochs": 1,
    "sarr_rounds": 1,
    "lora_dropout": 0.0,
    "temperature": 0.0,
}
HPARAMS |= {"data_augmentation": False, "batch_size": 6}


def watch(told: Path, kills_after: int | None, copies: bool) -> None:
    """Have this process tell of every chain that it writes, and kill itself after so many."""
    from domainbed_reasoning.jobs.replay_log import Progress
    from domainbed_reasoning.mllm import MLLM
    from domainbed_reasoning.mllm.generation import TextGenerator

    record, generate, count = Progress.record_ahead, TextGenerator.generate, 0

    def tell(line: str) -> None:
        with told.open("a") as file:
            file.write(f"{line}\n")

    def record_ahead(self: Any, state: str, digest: str, chain: str) -> None:
        nonlocal count
        record(self, state, digest, chain)
        tell(f"{state} {digest}")
        count += 1
        if count == kills_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def generated(self: Any, images: Any, *given: Any, **named: Any) -> list[str]:
        for _ in images:
            tell("asked for")
        return generate(self, images, *given, **named)

    Progress.record_ahead = record_ahead  # type: ignore[method-assign]
    TextGenerator.generate = generated  # type: ignore[method-assign]
    if not copies:
        MLLM.fits_a_copy = lambda *given: False  # type: ignore[method-assign]


def main() -> int:
    """Run both and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--no-copy", action="store_true", help="no merged copy fits")
    given = parser.parse_args()
    prepare(given.folder / "cache")
    options = argparse.Namespace(algorithm="RDMLDG", steps=4, answer="chain", hparams=json.dumps(HPARAMS))
    killed, told, ended = given.folder / "killed", given.folder / "told.txt", []
    for kills_after in (*KILLED_AFTER, None):
        options.before = lambda after=kills_after: watch(told, after, not given.no_copy)
        ended.append(os.waitpid(start(killed, options), 0)[1])
    lines = told.read_text().splitlines()
    said = {"ended": ended, "written": len(lines), "different": len(set(lines)), "asked": lines.count("asked for")}
    records: Any = outcome(killed)["records"]
    said["evaluations"] = sum(record["step"] + 1 >= HPARAMS["first_evaluation"] for record in records)
    said["images"] = len((killed / "predictions.jsonl").read_text().splitlines())
    said["accepted"] = records[-1]["sarr1_accepted"]
    said["differing"] = []
    if not given.no_copy:  # merged and unmerged weights round differently
        del options.before
        run(given.folder / "undisturbed", options)
        said["differing"] = differences(outcome(given.folder / "undisturbed"), outcome(killed))
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
