"""`domainbed-reasoning unfinished`: the jobs that go on when they are started again, and what they take on disk."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.jobs.resume_store import (
    LIMIT,
    JobIsRunning,
    SavedProgress,
    clear,
    list_progress,
    progress_folder,
)

_DESCRIPTION = f"""\
List the training jobs whose progress is kept: killed at any moment and started again with the same arguments, they go
on where they were. A job's progress is deleted when it ends well; the oldest go when all together take more than
${LIMIT} gigabytes (default 50)."""

_EXAMPLES = """\
examples:
  domainbed-reasoning unfinished                      # one line a job: key, steps, size, age, what it is
  domainbed-reasoning unfinished --clear 1f3a9c02     # that job begins at step 0 when it is started again
  domainbed-reasoning unfinished --clear all"""


def main(argv: Sequence[str] | None = None) -> int:
    """List or clear; return 1 where a key names no job or several, or a job runs."""
    parser = argparse.ArgumentParser(
        prog="domainbed-reasoning unfinished",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clear", nargs="+", metavar="KEY", help="delete the progress of these jobs, or of `all`")
    arguments = parser.parse_args(argv)
    try:
        root = progress_folder()
    except OSError as error:
        print(f"No progress of jobs is kept: {error}.", file=sys.stderr)
        return 1
    jobs = list(list_progress(root))
    if arguments.clear is not None:
        return _clear(jobs, arguments.clear)
    for job in jobs:
        print(_line(job))
    total = sum(job.size for job in jobs)
    print(f"{len(jobs)} unfinished jobs, {_megabytes(total)}, in {root}")
    return 0


def _clear(jobs: Sequence[SavedProgress], keys: Sequence[str]) -> int:
    """Clear the jobs that the keys name; none where a key names none or several."""
    chosen: dict[Path, SavedProgress] = {}
    faults = []
    for key in keys:
        found = list(jobs) if key == "all" else _named(jobs, key)
        chosen |= {job.folder: job for job in found}
        if key != "all" and len(found) != 1:
            faults.append(_fault(key, found))
    if faults:
        print("\n".join([*faults, "Nothing was cleared."]), file=sys.stderr)
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


def _named(jobs: Sequence[SavedProgress], key: str) -> list[SavedProgress]:
    """Return the jobs whose key is or begins with ``key``; none for an empty one."""
    whole = [job for job in jobs if job.folder.name == key]
    return whole or [job for job in jobs if key.strip() and job.folder.name.startswith(key)]


def _fault(key: str, found: Sequence[SavedProgress]) -> str:
    if not key.strip():
        return "--clear: a key is empty (an unset variable of the shell?). Give a key that the list shows, or all."
    if not found:
        return f"No unfinished job has the key {key}: without --clear they are listed."
    return "\n".join([f"--clear: {len(found)} jobs have a key that begins with {key}:", *map(_line, found)])


def _line(job: SavedProgress) -> str:
    args = job.args
    what = f"{args.get('algorithm', '?')} on {args.get('dataset', '?')}, targets {args.get('test_envs', '?')}"
    state = "running" if job.running else "done" if job.done else f"{(time.time() - job.changed) / 3600:.1f} h ago"
    where = args.get("output_dir", "?")
    return f"{job.folder.name[:8]}  {job.steps:>6} steps  {_megabytes(job.size):>10}  {state:>12}  {what}, {where}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
