"""`domainbed-reasoning jobs`: the saved progress of interrupted training jobs, and its size on disk."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.commands.arguments import Parser, UsageError, add_json, print_json
from domainbed_reasoning.jobs.resume_store import (
    LIMIT,
    JobIsRunning,
    SavedProgress,
    clear,
    list_progress,
    progress_folder,
)
from domainbed_reasoning.terminal import counted

EXAMPLES = f"""\
  domainbed-reasoning jobs                      # one line per job: key, steps, size, age, description
  domainbed-reasoning jobs --clear 1f3a9c02     # that job will restart at step 0
  domainbed-reasoning jobs --clear all

An interrupted job resumes from its saved progress when it is started with the same arguments. Progress is deleted when
the job completes; the oldest is deleted when the total exceeds ${LIMIT} GB (default 50).
"""


def add_arguments(parser: Parser) -> None:
    """Add --clear."""
    add_json(parser)
    parser.add_argument("--clear", nargs="+", metavar="KEY", help="delete the progress of these jobs, or of `all`")


def run(args: argparse.Namespace) -> int:
    """List or clear; return 1 if a key is not that of exactly one job, or a job is running."""
    root = progress_folder()
    jobs = list(list_progress(root))
    if args.clear is not None:
        if args.json:
            raise UsageError("--json lists the jobs; it cannot be combined with --clear")
        return _clear(jobs, args.clear)
    if args.json:
        print_json({"folder": root, "jobs": list(map(_as_dict, jobs))})
        return 0
    for job in jobs:
        print(_line(job))
    print(f"{counted(len(jobs), 'interrupted job')}, {_megabytes(sum(job.size for job in jobs))}, in {root}")
    return 0


def _clear(jobs: Sequence[SavedProgress], keys: Sequence[str]) -> int:
    """Clear the jobs with these keys, or none if a key does not match exactly one job."""
    chosen: dict[Path, SavedProgress] = {}
    errors = []
    for key in keys:
        found = list(jobs) if key == "all" else _matching(jobs, key)
        chosen |= {job.folder: job for job in found}
        if key != "all" and len(found) != 1:
            errors.append(_error(key, found))
    if errors:
        print("\n".join([*errors, "Nothing was cleared."]), file=sys.stderr)
        return 1
    failed = False
    for job in chosen.values():
        try:
            clear(job)
        except (JobIsRunning, OSError) as error:
            print(error, file=sys.stderr)
            failed = True
        else:
            print(f"Cleared {_line(job)}")
    return int(failed)


def _matching(jobs: Sequence[SavedProgress], key: str) -> list[SavedProgress]:
    """Return the jobs whose key is or starts with ``key``; none for an empty key."""
    exact = [job for job in jobs if job.folder.name == key]
    return exact or [job for job in jobs if key.strip() and job.folder.name.startswith(key)]


def _error(key: str, found: Sequence[SavedProgress]) -> str:
    if not found:
        return f"--clear: no interrupted job has the key {key}. Run `domainbed-reasoning jobs` to list them."
    return "\n".join([f"--clear: {len(found)} jobs have a key that starts with {key}:", *map(_line, found)])


def _line(job: SavedProgress) -> str:
    args = job.args
    what = f"{args.get('algorithm', '?')} on {args.get('dataset', '?')}, targets {args.get('test_envs', '?')}"
    state = _state(job) or f"{(time.time() - job.changed) / 3600:.1f} h ago"
    where = args.get("output_dir", "?")
    return f"{job.folder.name[:8]}  {job.steps:>6} steps  {_megabytes(job.size):>10}  {state:>12}  {what}, {where}"


def _state(job: SavedProgress) -> str:
    return "running" if job.running else "done" if job.done else ""


def _as_dict(job: SavedProgress) -> dict[str, Any]:
    """Return a job for --json: ``changed`` in seconds since the epoch, ``bytes`` of its folder."""
    return {
        "key": job.folder.name,
        "state": _state(job) or "interrupted",
        "steps": job.steps,
        "bytes": job.size,
        "changed": job.changed,
        "args": dict(job.args),
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
