"""Finds jobs that would distort a sweep's tables, and excludes or repairs them.

DomainBed's collect_results counts every record that it finds: those of jobs that died, of a job that ran twice, and of
two settings that share a cell. Here each is excluded or repaired, and reported with a suggested fix.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_reasoning.jobs.job_files import RESULTS
from domainbed_reasoning.jobs.results_file import add_record
from domainbed_reasoning.results.idle import inactive_parts
from domainbed_reasoning.results.job_folders import JobFolder, Record, versions_of

# Arguments of the train script that do not affect results.
_IDLE_ARGS = {"output_dir", "data_dir", "skip_model_save", "save_model_every_checkpoint", "hparams"}
# Arguments that differ between the jobs of one row by design.
_PER_JOB_ARGS = _IDLE_ARGS | {"test_envs", "trial_seed", "hparams_seed", "seed"}
_SHOWN_DIFFERENCES = 6
_AGAIN = "Run `sweep delete_incomplete`, then `sweep launch`."


@dataclass(frozen=True)
class Problem:
    """A problem of a sweep's jobs that affects its tables.

    Attributes:
        kind: in a word or two.
        job: the job or table row, in words.
        folders: of the jobs, relative to the sweep's folder.
        detail: description of the problem.
        effect: how the tables treat it.
        fix: what to do about it.
    """

    kind: str
    job: str
    folders: tuple[str, ...]
    detail: str
    effect: str
    fix: str

    def __str__(self) -> str:
        """Return the problem in one line."""
        where = ", ".join(self.folders)
        return f"{self.kind}: {self.job} ({where}): {self.detail}. {self.effect}. {self.fix}"


def validate_jobs(jobs: Sequence[JobFolder]) -> tuple[list[JobFolder], list[Problem]]:
    """Return the valid jobs, each with the records of one run, and the problems.

    Args:
        jobs: as they were read.
    """
    problems = [_damaged(job) for job in jobs if job.damage]
    jobs = [job for job in jobs if not job.damage]
    problems += [*_never_started(jobs), *(problem for job in jobs for problem in _broken_lines(job))]
    counted = []
    for job in jobs:
        if not _was_started(job):
            continue
        unusable = _unusable(job)
        if unusable:
            problems.append(unusable)
            continue
        settled, repeated = _one_run(job)
        counted.append(settled)
        problems += repeated
    counted, repeated = _one_job_a_place(counted)
    problems += repeated
    problems += _uneven_settings(counted)
    problems += _missing_trials(counted)
    problems += _without_common_steps(counted)
    problems += _mixed_versions(counted)
    problems += [Problem(kind, job.name, (job.path,), *rest) for job in counted for kind, *rest in inactive_parts(job)]
    return counted, problems


def count_as_stock(jobs: Sequence[JobFolder], problems: Sequence[Problem]) -> tuple[list[JobFolder], list[Problem]]:
    """Return the jobs that DomainBed's collect_results counts, and the problems with their effect on its tables.

    Args:
        jobs: as they were read.
        problems: of `validate_jobs`.
    """
    counted = [job for job in jobs if job.records]
    paths = {job.path for job in counted}
    return counted, [
        dataclasses.replace(problem, effect="Counted, as by DomainBed")
        if problem.folders and paths.issuperset(problem.folders)
        else problem
        for problem in problems
    ]


def _was_started(job: JobFolder) -> bool:
    return bool(job.done or job.printed or job.records or job.broken or job.last_error)


def _never_started(jobs: Sequence[JobFolder]) -> Iterable[Problem]:
    waiting = [job for job in jobs if not _was_started(job)]
    if waiting:
        yield Problem(
            "never started", f"{len(waiting)} jobs", tuple(sorted(job.path for job in waiting)), "empty folders",
            "Left out", "Wait for the launcher. If it has ended: " + _AGAIN,
        )  # fmt: skip


def _damaged(job: JobFolder) -> Problem:
    more = f"; and {len(job.damage) - 3} more" if len(job.damage) > 3 else ""
    return Problem(
        "damaged", job.name, (job.path,), f"{'; '.join(job.damage[:3])}{more}", "Left out",
        "Delete the folder and rerun `sweep launch`, or correct the file.",
    )  # fmt: skip


def _broken_lines(job: JobFolder) -> Iterable[Problem]:
    if job.broken:
        lines = "; ".join(f"line {number} is {problem}" for number, problem in job.broken[:3])
        more = f"; and {len(job.broken) - 3} more" if len(job.broken) > 3 else ""
        yield Problem(
            "broken lines", job.name, (job.path,), f"{RESULTS}: {lines}{more}",
            "Lines left out; DomainBed's collect_results fails on them",
            "Remove them, or delete the folder and rerun `sweep launch`.",
        )  # fmt: skip


def _unusable(job: JobFolder) -> Problem | None:
    if not job.done:
        at = f"last record at step {job.records[-1]['step']}" if job.records else "no record"
        log = f"; last error in its log: {job.last_error!r}" if job.last_error else "; no error in its log"
        return Problem("incomplete", job.name, (job.path,), f"no `done`, {at}{log}", "Left out", _AGAIN)
    if not job.records:
        fix = "Delete the folder and rerun `sweep launch`."
        return Problem("no records", job.name, (job.path,), "`done` exists, but no records", "Left out", fix)
    return None


def _one_run(job: JobFolder) -> tuple[JobFolder, list[Problem]]:
    """Return the job with the records of its last complete run; a restarted job appends to the earlier ones.

    Records replace earlier ones as in `results_file`, unless their run ended earlier than the previous one.
    """
    run: list[Record] = []
    chosen = run
    restarts = 0
    for record in job.records:
        longer = add_record(run, record)
        restarts += len(longer) <= len(run)
        run = longer
        if not chosen or record["step"] >= chosen[-1]["step"]:
            chosen = run
    if not restarts:
        return job, []
    problem = Problem(
        "repeated records", job.name, (job.path,),
        f"{RESULTS} contains {restarts + 1} runs of the same job, {len(job.records)} records",
        f"The {len(chosen)} records of the last complete run count; collect_results counts all",
        "None needed; or delete the folder and rerun `sweep launch`.",
    )  # fmt: skip
    return dataclasses.replace(job, records=tuple(chosen)), [problem]


def _one_job_a_place(jobs: Sequence[JobFolder]) -> tuple[list[JobFolder], list[Problem]]:
    """Return the jobs without conflicts in their cells; a job that exists twice counts once."""
    places: dict[tuple[Any, ...], list[JobFolder]] = defaultdict(list)
    for job in jobs:
        args = job.args
        seeds = (args["trial_seed"], args["hparams_seed"])
        places[job.sweep, args["dataset"], args["algorithm"], *seeds, *sorted(args["test_envs"])].append(job)
    left_out: set[str] = set()
    problems = []
    for found in places.values():
        if len(found) == 1:
            continue
        found = sorted(found, key=lambda job: job.path)
        folders = tuple(job.path for job in found)
        differences = _differences([_settings(job, _IDLE_ARGS) for job in found])
        if differences:
            left_out.update(folders)
            problems.append(
                Problem(
                    "mixed settings",
                    found[0].name,
                    folders,
                    f"{len(found)} jobs share a cell and differ in {differences}",
                    "All left out; collect_results mixes them",
                    "Move the jobs of each setting to a separate sweep folder; `collect` reads folders of sweeps.",
                )  # fmt: skip
            )
        else:
            left_out.update(folders[1:])
            problems.append(
                Problem(
                    "repeated job",
                    found[0].name,
                    folders,
                    f"the same arguments in {len(found)} folders",
                    f"{folders[0]} counts, the others are left out; collect_results counts all",
                    "Delete all but one of them.",
                )  # fmt: skip
            )
    return [job for job in jobs if job.path not in left_out], problems


def _uneven_settings(jobs: Sequence[JobFolder]) -> Iterable[Problem]:
    """Yield the rows of a table whose cells have different settings."""
    rows: dict[tuple[Any, ...], list[JobFolder]] = defaultdict(list)
    for job in jobs:
        args = job.args
        # Random hyper-parameters are drawn anew for every trial.
        trial = args["trial_seed"] if args["hparams_seed"] else "every"
        rows[job.sweep, args["dataset"], args["algorithm"], args["hparams_seed"], trial].append(job)
    for (sweep, dataset, algorithm, seed, trial), found in rows.items():
        settings = [_settings(job, _PER_JOB_ARGS) for job in found]
        differences = _differences(settings)
        if differences:
            usual = Counter(json.dumps(setting, sort_keys=True) for setting in settings).most_common(1)[0][0]
            odd = [
                job.path for job, own in zip(found, settings, strict=True) if json.dumps(own, sort_keys=True) != usual
            ]
            row = f"{algorithm} on {dataset}, hparams seed {seed}, {trial} trial"
            yield Problem(
                "uneven settings", f"{sweep}: {row}" if sweep else row, tuple(sorted(odd)),
                f"the row's jobs differ in {differences}", "Counted",
                "Rerun these jobs with the settings of the others.",
            )  # fmt: skip


def _missing_trials(jobs: Sequence[JobFolder]) -> Iterable[Problem]:
    """Yield the rows that have fewer trials on some target domains than on others."""
    rows: dict[tuple[str, str, str], dict[tuple[int, ...], set[int]]] = defaultdict(lambda: defaultdict(set))
    for job in jobs:
        args = job.args
        rows[job.sweep, args["dataset"], args["algorithm"]][tuple(args["test_envs"])].add(args["trial_seed"])
    for (sweep, dataset, algorithm), cells in rows.items():
        table = [other for place, other in rows.items() if place[:2] == (sweep, dataset)]
        trials = set().union(*(own for other in table for own in other.values()))
        sizes = set(map(len, cells))  # a row without pairs of targets lacks none
        expected = [cell for cell in sorted(set().union(*table)) if len(cell) in sizes]
        lacking = {cell: trials - cells.get(cell, set()) for cell in expected}
        gaps = [
            f"target {' '.join(map(str, cell))} lacks trial {', '.join(map(str, sorted(trials)))}"
            for cell, trials in lacking.items()
            if trials
        ]
        if gaps:
            row = f"{algorithm} on {dataset}"
            yield Problem(
                "missing trials", f"{sweep}: {row}" if sweep else row, (), "; ".join(gaps),
                "These cells average fewer trials than others",
                "Run `sweep launch` with the same arguments to start the missing jobs.",
            )  # fmt: skip


def _without_common_steps(jobs: Sequence[JobFolder]) -> Iterable[Problem]:
    """Yield the rows whose leave-one-domain-out selection is among models after one update.

    DomainBed compares a job with target t, step by step, with those with targets t and v. Without ``--steps``, our
    algorithms train for epochs, whose steps depend on the targets.
    """
    rows: dict[tuple[Any, ...], dict[frozenset[int], set[int]]] = defaultdict(dict)
    for job in jobs:
        row = job.sweep, *(job.args[name] for name in ("dataset", "algorithm", "trial_seed", "hparams_seed"))
        rows[row][frozenset(job.args["test_envs"])] = {record["step"] for record in job.records}
    affected: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for (sweep, dataset, algorithm, *_), by_targets in rows.items():
        for targets, steps in by_targets.items():
            pairs = [own for other, own in by_targets.items() if len(other) == 2 and targets < other]
            if len(targets) == 1 and len(steps) > 1 and pairs and not steps.intersection(*pairs) - {0}:
                affected[sweep, dataset, algorithm] |= targets
    for (sweep, dataset, algorithm), found in affected.items():
        name = f"{algorithm} on {dataset}"
        yield Problem(
            "no common steps", f"{sweep}: {name}" if sweep else name, (),
            f"jobs with pairs of targets were evaluated at other steps than those with target "
            f"{', '.join(map(str, sorted(found)))}",
            "Leave-one-domain-out selection is among models after one update",
            "Pass --steps to the sweep: its jobs then have the same steps for all targets.",
        )  # fmt: skip


def _mixed_versions(jobs: Sequence[JobFolder]) -> Iterable[Problem]:
    """Yield a problem if jobs ran on different code, libraries or devices; it lists the minority."""
    mixed = {name: counts for name, counts in versions_of(jobs).items() if len(counts) > 1}
    if mixed:
        usual = {name: counts.most_common(1)[0][0] for name, counts in mixed.items()}
        odd = [job.path for job in jobs if any(job.versions.get(name, usual[name]) != usual[name] for name in mixed)]
        yield Problem(
            "mixed versions", f"{len(odd)} of {len(jobs)} jobs", tuple(sorted(odd)),
            "; ".join(f"{name}: {with_counts(counts)}" for name, counts in mixed.items()), "Counted",
            "Rerun these jobs with the versions of the others.",
        )  # fmt: skip


def with_counts(counts: Mapping[str, int]) -> str:
    """Return values with their numbers of jobs, as in ``2.8.0 (3 jobs), 2.9.1 (1 job)``, or the only one."""
    if len(counts) == 1:
        return next(iter(counts))
    often = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{value} ({count} job{'s' if count > 1 else ''})" for value, count in often)


def _settings(job: JobFolder, left_out: set[str]) -> dict[str, Any]:
    args = {name: value for name, value in job.args.items() if name not in left_out}
    return {**{f"--{name}": value for name, value in args.items()}, **job.hparams}


def _differences(settings: Sequence[Mapping[str, Any]]) -> str:
    """Return the differences between settings, as in ``lr (0.001 / 0.0005)``; empty if there are none."""
    absent = "absent"
    names = sorted({name for setting in settings for name in setting})
    differing = []
    for name in names:
        values = list(dict.fromkeys(json.dumps(setting.get(name, absent)) for setting in settings))
        if len(values) > 1:
            differing.append(f"{name} ({' / '.join(values)})")
    more = len(differing) - _SHOWN_DIFFERENCES
    return ", ".join(differing[:_SHOWN_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
