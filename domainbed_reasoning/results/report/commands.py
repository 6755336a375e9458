"""Commands that reproduce a sweep, and the software that it ran on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domainbed_reasoning.bridge import upstream, versions
from domainbed_reasoning.results.job_folders import JobFolder, versions_of
from domainbed_reasoning.results.problems import with_counts
from domainbed_reasoning.results.report.blocks import Code
from domainbed_reasoning.results.selection import order_of_algorithms, order_of_datasets
from domainbed_reasoning.results.tables import ABSENT, Table

# The arguments that DomainBed's sweep passes to every job; with those of the job they determine its folder's name.
_OF_A_SWEEP = ("task", "holdout_fraction", "data_dir", "steps", "hparams")
_OF_A_JOB = ("dataset", "algorithm", "test_envs", "hparams_seed", "trial_seed", "seed")
_MOST_TARGETS = 2  # of a job of DomainBed's sweep
_AS_RECORDED = {"PyTorch": "torch", "NumPy": "numpy"}  # DomainBed's names in out.txt


def sweep_commands(jobs: Sequence[JobFolder], folder: Path) -> list[Code]:
    """Return the stock commands that reproduce these jobs, one for each set of common arguments.

    Jobs with more than two targets are not part of any sweep and are omitted.

    Args:
        jobs: with records.
        folder: of the sweep, or of the sweeps.
    """
    groups: dict[tuple[str, str], list[JobFolder]] = defaultdict(list)
    for job in jobs:
        if len(job.args["test_envs"]) > _MOST_TARGETS:
            continue
        common = {name: job.args.get(name) for name in _OF_A_SWEEP}
        groups[job.sweep, json.dumps(common, sort_keys=True)].append(job)
    return [
        _sweep_command(own, json.loads(common), folder / sweep if sweep else folder)
        for (sweep, common), own in groups.items()
    ]


def _sweep_command(jobs: Sequence[JobFolder], common: Mapping[str, Any], folder: Path) -> Code:
    args = [job.args for job in jobs]
    single = all(len(own["test_envs"]) == 1 for own in args)
    seeds = [own["hparams_seed"] for own in args]
    words = ["python", "-m", "domainbed.scripts.sweep", "launch"]
    words += ["--algorithms", *order_of_algorithms([own["algorithm"] for own in args])]
    words += ["--datasets", *order_of_datasets([own["dataset"] for own in args])]
    words += ["--n_trials", str(1 + max(own["trial_seed"] for own in args))]
    words += ["--n_hparams_from", str(min(seeds))] if min(seeds) else []
    words += ["--n_hparams", str(1 + max(seeds))] + (["--single_test_envs"] if single else [])
    for name in _OF_A_SWEEP:
        if common[name] is not None:
            words += [f"--{name}", str(common[name])]
    words += ["--command_launcher", "parallel", "--output_dir", str(folder.resolve())]
    named = sum(_stock_folder_name(job) == job.folder.name for job in jobs)
    which = f"all {len(jobs)} of these jobs" if named == len(jobs) else f"{named} of these {len(jobs)} jobs"
    caption = (
        f"The sweep; run it in DomainBed's folder. DomainBed names a job's folder by its arguments: {which} have the "
        "name that this command assigns. Other launchers give the same numbers; another --output_dir reruns the jobs."
    )
    return Code(caption, shlex.join(words))


def _stock_folder_name(job: JobFolder) -> str:
    """Return the name that DomainBed's sweep gives the job's folder: the MD5 of its arguments."""
    args = {name: job.args.get(name) for name in (*_OF_A_JOB, *_OF_A_SWEEP)}
    passed = {name: value for name, value in args.items() if value is not None}
    return hashlib.md5(json.dumps(passed, sort_keys=True).encode()).hexdigest()


def job_commands(jobs: Sequence[JobFolder]) -> Code:
    """Return the train command of every job."""
    ordered = sorted(jobs, key=lambda job: (job.sweep, job.name))
    return Code("Run them in DomainBed's folder", "\n".join(map(_job_command, ordered)))


def _job_command(job: JobFolder) -> str:
    words = ["python", "-m", "domainbed.scripts.train"]
    for name, value in sorted(job.args.items()):
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def versions_table(jobs: Sequence[JobFolder]) -> Table:
    """Return the versions that the jobs recorded, and those of this machine.

    Args:
        jobs: all jobs.
    """
    then = versions_of(jobs)
    for job in jobs:
        for name, value in job.printed.get("Environment", {}).items():
            if _AS_RECORDED.get(name, name) not in job.versions:
                then.setdefault(_AS_RECORDED.get(name, name), Counter())[value] += 1
    now = versions.spelt(versions.current())
    domainbed = upstream.importable_domainbed()
    if domainbed is not None:
        now["DomainBed"] = ", ".join(filter(None, [now.get("DomainBed"), upstream.describe(domainbed)]))
    rows = tuple((name, with_counts(then.get(name, {})) or ABSENT, now.get(name, ABSENT)) for name in {**now, **then})
    return Table(
        "Versions and commits",
        ("Software", "Jobs", "This report"),
        rows,
        "Jobs record their versions at the start; “modified” means that files differed from the commit.",
    )
