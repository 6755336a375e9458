"""Reads the job folders of a sweep, written by DomainBed's train script and our algorithms.

A sweep's folder contains one folder per job. A folder of several sweeps, one per setting, is read as well: DomainBed's
own tables cannot distinguish two settings of one algorithm in the same sweep.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge import versions
from domainbed_reasoning.bridge.train_args import NAME_OF_JOB
from domainbed_reasoning.files.plain import open_plain
from domainbed_reasoning.jobs import values
from domainbed_reasoning.jobs.job_files import RESULTS, is_own_file, numbered_lines, read_object

Record = Mapping[str, Any]

_LEFT_BY_A_JOB = (RESULTS, "done", "out.txt", "err.txt", "launcher.log")
_HEAD_LINES = 200  # of out.txt: versions, arguments, hyper-parameters
_ERROR = re.compile(r"(Error|Exception|Exit|Interrupt|[Kk]illed|CANCELLED|exit code)\b")
_TAIL = 16_384  # bytes of a log that are searched
_ERROR_LENGTH = 200  # characters
_MAX_SHOWN = 6
_MOST_SEARCHED = 1000  # folders below one without jobs


@dataclass(frozen=True)
class JobFolder:
    """One job's folder.

    Attributes:
        folder: its path.
        sweep: name of its sweep; empty if the folder that was read is itself a sweep.
        done: whether DomainBed wrote `done`, its last file.
        records: of results.jsonl, in the file's order.
        broken: (line number from 1, problem) of invalid lines.
        printed: the head of out.txt: "Environment", "Args" and "HParams", each name → value as printed.
        answers: answers.json, or None.
        task: task.json, or None.
        versions: of versions.json, name → readable version; without that file from task.json, or empty.
        wall_seconds: between the oldest of its files and `done`; None without it.
        last_error: the last line of err.txt or launcher.log that names an error; empty without one.
        damage: problems of its files (name, line, problem); if there are any, only intact records are used, and they by
            `--as-stock` alone.
    """

    folder: Path
    sweep: str
    done: bool
    records: tuple[Record, ...]
    broken: tuple[tuple[int, str], ...]
    printed: Mapping[str, Mapping[str, str]]
    answers: Mapping[str, Any] | None
    task: Mapping[str, Any] | None
    versions: Mapping[str, str]
    wall_seconds: float | None
    last_error: str
    damage: tuple[str, ...] = ()

    @property
    def args(self) -> Mapping[str, Any]:
        """The arguments of the train script: from its records, else as printed (strings), else empty."""
        return self.records[-1]["args"] if self.records else self.printed.get("Args", {})

    @property
    def hparams(self) -> Mapping[str, Any]:
        """The hyper-parameters of its last record; empty without one."""
        return self.records[-1].get("hparams") or {} if self.records else {}

    @property
    def evaluations(self) -> list[Record]:
        """Its records whose accuracies were measured, see `values.is_evaluated`."""
        last = self.records[-1] if self.done and self.records else None
        return [record for record in self.records if values.is_evaluated(record) or record is last]

    @property
    def path(self) -> str:
        """The folder's name, with its sweep's if there are several."""
        return f"{self.sweep}/{self.folder.name}" if self.sweep else self.folder.name

    @property
    def name(self) -> str:
        """A readable name: algorithm, dataset, targets, seeds."""
        args = self.args
        if not args:
            return "unknown"
        targets = " ".join(map(str, args["test_envs"])) if self.records else args.get("test_envs", "?").strip("[]")
        name = f"{args.get('algorithm', '?')} on {args.get('dataset', '?')}, target {targets}"
        seeds = (f"{kind} {args[key]}" for kind, key in (("trial", "trial_seed"), ("hparams seed", "hparams_seed")))
        return ", ".join([name, *seeds]) if {"trial_seed", "hparams_seed"} <= args.keys() else name

    @property
    def train_seconds(self) -> float | None:
        """Seconds in updates, without evaluations: step_time is the mean over the steps since the previous record."""
        seconds, before = 0.0, -1
        for record in self.records:
            if "step_time" not in record:
                return None
            seconds += record["step_time"] * (record["step"] - before)
            before = record["step"]
        return seconds

    @property
    def memory_gib(self) -> float | None:
        """Peak GPU memory; None on a CPU, where DomainBed writes 0."""
        return max((record.get("mem_gb", 0.0) for record in self.records), default=0.0) or None


def versions_of(jobs: Sequence[JobFolder]) -> dict[str, Counter[str]]:
    """Return the number of jobs by name and version of the software that they recorded."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for job in jobs:
        for name, version in job.versions.items():
            found[name][version] += 1
    return dict(found)


def read_jobs(folder: str | os.PathLike[str]) -> list[JobFolder]:
    """Return the jobs of a sweep, or of the sweeps in ``folder``, in the order in which DomainBed reads them.

    Raises:
        ValueError: if the folder does not exist or contains no jobs.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder. Pass the --output_dir of DomainBed's sweep.")
    jobs = [read_job(path) for path in _job_folders(root)]
    if not jobs:
        sweeps = sorted(path for path in root.iterdir() if path.is_dir())
        jobs = [read_job(path, sweep.name) for sweep in sweeps for path in _job_folders(sweep)]
    if not jobs:
        hint = " It is itself a job's folder; pass its parent." if (root / RESULTS).is_file() else _where_jobs_are(root)
        raise ValueError(
            f"{root} contains no jobs. Pass the --output_dir of DomainBed's sweep, or a folder of sweeps.{hint}"
        )
    return jobs


def _where_jobs_are(root: Path) -> str:
    """Return a hint at jobs deeper in a folder; empty if there are none near its top."""
    found = []
    for folder, below, _ in itertools.islice(os.walk(root), _MOST_SEARCHED):
        if any(NAME_OF_JOB.fullmatch(name) for name in below):
            found.append(folder)
            below.clear()
    return f" There are jobs in {', '.join(sorted(found)[:_MAX_SHOWN])}." if found else ""


def _job_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of jobs in the file system's order, which is that of DomainBed's collect_results."""
    for name in os.listdir(root):
        path = root / name
        if path.is_dir() and (NAME_OF_JOB.fullmatch(name) or _is_job(path)):
            yield path


def _is_job(path: Path) -> bool:
    """Return whether a folder with a name of the user's own is a job's, not a sweep's with a log beside its jobs."""
    if (path / RESULTS).is_file():
        return True
    left = any((path / name).is_file() for name in _LEFT_BY_A_JOB)
    return left and not any(NAME_OF_JOB.fullmatch(below) for below in os.listdir(path))


def read_job(folder: Path, sweep: str = "") -> JobFolder:
    """Return the content of one job's folder; of a damaged one only its problems and name."""
    try:
        return _read_job(folder, sweep)
    except OSError as error:
        damage = (f"{error.filename or folder} cannot be read ({error.strerror})",)
        return JobFolder(folder, sweep, False, (), (), {}, None, None, {}, None, "", damage)


def _read_job(folder: Path, sweep: str) -> JobFolder:
    damage: list[str] = []
    records, broken, args = _read_records(folder / RESULTS, damage)
    records = [] if damage else records
    task = read_object(folder / "task.json", values.task_problem, damage)
    answers = read_object(folder / "answers.json", values.answers_problem, damage)
    recorded = read_object(folder / versions.FILE, values.versions_problem, damage)
    printed = _printed(folder / "out.txt")
    if damage and args:
        printed["Args"] = {name: str(args[name]) for name in values.ARGS}
    logs = (_last_error(folder / name) for name in ("err.txt", "launcher.log"))
    return JobFolder(
        folder=folder,
        sweep=sweep,
        done=is_own_file(folder / "done"),
        records=tuple(records),
        broken=tuple(broken),
        printed=printed,
        answers=None if damage else answers,
        task=None if damage else task,
        versions={} if damage else _versions(recorded, task),
        wall_seconds=_wall_seconds(folder),
        last_error=next(filter(None, logs), ""),
        damage=tuple(damage),
    )


def _read_records(
    path: Path, damage: list[str]
) -> tuple[list[Record], list[tuple[int, str]], Mapping[str, Any] | None]:
    """Return the records, the invalid lines and the job's arguments; add invalid values to ``damage``."""
    records: list[Record] = []
    broken = []
    args: Mapping[str, Any] | None = None
    measured: list[set[str]] = []
    for number, line in numbered_lines(path, damage):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            broken.append((number, f"not valid JSON ({error.msg})"))
            continue
        except (ValueError, RecursionError) as error:
            damage.append(f"{path.name}, line {number}: {str(error):.60}")
            continue
        args = record["args"] if values.has_args(record) else args
        if lacking := _lacking(record):
            broken.append((number, f"not a DomainBed record: {lacking}"))
        elif problem := values.record_problem(record):
            damage.append(f"{path.name}, line {number}: {problem}")
        else:
            records.append(record)
            measured.append({name for name in record if values.ACCURACY.fullmatch(name)})
            others = [name for name in values.ARGS if record["args"][name] != records[0]["args"][name]]
            if others or measured[-1] != measured[0]:
                what = f"--{', --'.join(others)}" if others else "domains"
                damage.append(f"{path.name}, line {number}: {what} differ from those of earlier records")
    return records, broken, args


def _lacking(record: Any) -> str:
    """Return what a DomainBed record lacks; empty if it is complete."""
    if not isinstance(record, dict):
        return "not an object"
    if "step" not in record or "args" not in record:
        return "no step or no args"
    args = record["args"]
    absent = [key for key in values.ARGS if key not in args] if isinstance(args, dict) else []
    if absent:
        return f"no {', '.join(absent)} in its args"
    if not values.has_args(record):
        return ""  # complete, with another problem
    splits = [f"env{env}_{split}_acc" for env in args["test_envs"] for split in ("in", "out")]
    absent = [split for split in splits if split not in record]
    return f"no {', '.join(absent[:_MAX_SHOWN])}" if absent else ""


def _versions(recorded: Mapping[str, Any] | None, task: Mapping[str, Any] | None) -> dict[str, str]:
    if recorded is None and task is not None:  # a job from before versions.json
        recorded = {versions.OURS: {"version": task.get("version")}}
    return versions.spelt(recorded or {})


def _printed(path: Path) -> dict[str, dict[str, str]]:
    """Return the head of out.txt: sections of indented ``name: value`` lines, each below a line ``Title:``."""
    sections: dict[str, dict[str, str]] = {}
    for line in _head(path):
        if line.startswith("\t") and sections:
            name, _, value = line.strip().partition(": ")
            sections[list(sections)[-1]][name] = value
        elif line.rstrip().endswith(":") and line.rstrip(":\n").isalpha():
            sections[line.rstrip(":\n")] = {}
        elif sections:
            break
    return sections


def _head(path: Path) -> Sequence[str]:
    return [line for _, (_, line) in zip(range(_HEAD_LINES), numbered_lines(path, []), strict=False)]


def _last_error(path: Path) -> str:
    if not is_own_file(path):
        return ""
    with open_plain(path) as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read(_TAIL).decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:_ERROR_LENGTH] for line in reversed(lines) if _ERROR.search(line)), "")


def _wall_seconds(folder: Path) -> float | None:
    """Return the seconds between the oldest file and `done`; meaningless after a copy that did not preserve times."""
    if not (folder / "done").is_file():  # it may still be running
        return None
    with os.scandir(folder) as entries:
        times = {entry.name: entry.stat().st_mtime for entry in entries if entry.is_file()}
    return times["done"] - min(times.values())
