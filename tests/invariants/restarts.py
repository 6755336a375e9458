"""Restart a killed job on damaged files or without a usable cache, and compare it with an undisturbed one.

    python tests/invariants/restarts.py --folder FOLDER

Every start is a fork of this process. Prints a line of JSON: by restart, its exit status, what differs from the
undisturbed job, how often it says that it begins at step 0, cannot keep its progress, or goes on, and the steps of its
records.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import pwd
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from killing import differences, outcome, prepare
from stops import begin

HPARAMS = {"batch_size": 2, "mtct_epochs": 1, "sarr_rounds": 1, "sarr_epochs": 1, "max_new_tokens": 16}
OWN = HPARAMS | {"both_answers": False, "first_evaluation": 5}
MORE = ["--checkpoint_freq", "2", "--holdout_fraction", "0.9"]
KEPT = ("state.pt", "log.jsonl", "adapters-1.pt", "adapters-3.pt", "job.json")


def flip(path: Path, seed: int) -> None:
    """Flip a bit that is drawn at random."""
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def nest(path: Path) -> None:
    """Put a line that is nested without end in front."""
    path.write_bytes(b"[" * 100_000 + b"\n" + path.read_bytes())


def dangle(cache: Path) -> None:
    """Put a link to nowhere in the cache's place."""
    shutil.rmtree(cache)
    cache.symlink_to("/gone/cache")


def block(cache: Path) -> None:
    """Put a file in the cache's place."""
    shutil.rmtree(cache)
    cache.write_text("")


def lose_home(_: Path) -> None:
    """Take away what says where the user's home is."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        os.environ.pop(name, None)

    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    pwd.getpwuid = unknown


def lose_locks(_: Path) -> None:
    """Have no file system lock any more."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    fcntl.flock = refuse


CACHES: dict[str, Callable[[Path], None]] = {
    "a link to nowhere": dangle,
    "a file": block,
    "no home": lose_home,
    "no locks": lose_locks,
}


def main() -> int:
    """Run all and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder.resolve()
    cache, job = folder / "cache", folder / "job"
    prepare(folder / "cache")
    ended = begin(folder / "undisturbed", None, 5, OWN, MORE)
    undisturbed = outcome(folder / "undisturbed")
    killed = begin(job, ("saved", 4), 5, OWN, MORE)
    shutil.copytree(cache, folder / "cache.killed")
    shutil.copytree(job, folder / "job.killed")

    def restart(in_cache: Callable[[Path], None] | None = None, in_job: Callable[[Path], None] | None = None) -> Any:
        for path in (cache, job):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
            shutil.copytree(folder / f"{path.name}.killed", path)
        (job / "log.txt").unlink()
        if in_job is not None:
            in_job(job)
        status = begin(job, None, 5, OWN, MORE, before=lambda: in_cache(cache) if in_cache is not None else None)
        log = (job / "log.txt").read_text()
        records = [json.loads(line) for line in (job / "results.jsonl").read_text().splitlines()]
        return {
            "status": status,
            "differing": differences(undisturbed, outcome(job)) if status == 0 else [log[-2000:]],
            "anew": log.count("Starting from step 0"),
            "not kept": log.count("Cannot save this job's progress"),
            "goes on": log.count("Resuming after 4 steps"),
            "steps": [record["step"] for record in records],
        }

    def in_kept(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
        return lambda place: change(next(place.glob("*/unfinished/*")) / name)

    found = {"nothing": restart()}
    for seed, name in enumerate(KEPT):
        found[f"flip {name}"] = restart(in_kept(name, lambda path, seed=seed: flip(path, seed)))
    found["remove adapters-1.pt"] = restart(in_kept("adapters-1.pt", Path.unlink))
    found["nest results.jsonl"] = restart(None, lambda place: nest(place / "results.jsonl"))
    found |= {f"cache: {name}": restart(change) for name, change in CACHES.items()}
    print(json.dumps({"ended": ended, "killed": killed, "found": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
