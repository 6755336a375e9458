"""Records of finished and unfinished jobs, read and grouped."""

from __future__ import annotations

import json
import pathlib
from typing import Any

Record = dict[str, Any]


def load_records(path: str) -> list[Record]:
    """Return every line of every ``results.jsonl`` one level below ``path``, in the file system's order."""
    files = (folder / "results.jsonl" for folder in pathlib.Path(path).iterdir())
    return [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]


def get_grouped_records(records: list[Record]) -> list[dict[str, Any]]:
    """Return a group for each trial, dataset, algorithm and test environment, in order of first appearance.

    A record with two test environments belongs to two groups.
    """
    keys = ("trial_seed", "dataset", "algorithm", "test_env")
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        args = record["args"]
        for test_env in args["test_envs"]:
            groups.setdefault((*(args[key] for key in keys[:3]), test_env), []).append(record)
    return [dict(zip(keys, values, strict=True), records=found) for values, found in groups.items()]
