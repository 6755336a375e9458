"""What to type to run a sweep again, and what it ran on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import domainbed_reasoning
from domainbed_reasoning import upstream
from domainbed_reasoning.collect.jobs import Job
from domainbed_reasoning.collect.selection import order_of_algorithms, order_of_datasets
from domainbed_reasoning.collect.tables import ABSENT, Table
from domainbed_reasoning.report.blocks import Code

# The arguments that DomainBed's sweep hands to every job, those that decide the name of the job's folder first.
_OF_A_SWEEP = ("task", "holdout_fraction", "data_dir", "steps", "hparams")
_OF_A_JOB = ("dataset", "algorithm", "test_envs", "hparams_seed", "trial_seed", "seed")
_PACKAGES = ("domainbed-reasoning", "torch", "transformers", "peft", "bitsandbytes", "numpy")


def sweep_commands(jobs: Sequence[Job], folder: Path) -> list[Code]:
    """Return the stock commands that make these jobs, one for each set of common arguments.

    Args:
        jobs: with records.
        folder: of the sweep, or of the sweeps.
    """
    groups: dict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in jobs:
        common = {name: job.args.get(name) for name in _OF_A_SWEEP}
        groups[job.sweep, json.dumps(common, sort_keys=True)].append(job)
    return [
        _sweep_command(own, json.loads(common), folder / sweep if sweep else folder)
        for (sweep, common), own in groups.items()
    ]


def _sweep_command(jobs: Sequence[Job], common: Mapping[str, Any], folder: Path) -> Code:
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
    said = f"all {len(jobs)} of these jobs" if named == len(jobs) else f"{named} of these {len(jobs)} jobs"
    caption = (
        f"The sweep, from DomainBed's folder. DomainBed names a job's folder by its arguments: {said} bear the name "
        "that this command gives them. Another launcher changes no number; another --output_dir runs them anew."
    )
    return Code(caption, shlex.join(words))


def _stock_folder_name(job: Job) -> str:
    """Return the name that DomainBed's sweep gives the job's folder: the MD5 of its arguments."""
    args = {name: job.args.get(name) for name in (*_OF_A_JOB, *_OF_A_SWEEP)}
    given = {name: value for name, value in args.items() if value is not None}
    return hashlib.md5(json.dumps(given, sort_keys=True).encode()).hexdigest()


def job_commands(jobs: Sequence[Job]) -> Code:
    """Return the train command of every job."""
    ordered = sorted(jobs, key=lambda job: (job.sweep, job.name))
    return Code("Also from DomainBed's folder", "\n".join(map(_job_command, ordered)))


def _job_command(job: Job) -> str:
    words = ["python", "-m", "domainbed.scripts.train"]
    for name, value in sorted(job.args.items()):
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def versions_table(jobs: Sequence[Job]) -> Table:
    """Return what the jobs said that they ran on, and what this machine has now.

    Args:
        jobs: all that were started.
    """
    then: dict[str, Counter[str]] = defaultdict(Counter)
    for job in jobs:
        for name, value in job.printed.get("Environment", {}).items():
            then[name][value] += 1
        if job.task:
            then["domainbed-reasoning"][str(job.task.get("version", "unknown"))] += 1
    now = {name: _installed(name) for name in _PACKAGES}
    now["domainbed-reasoning"] += _commit()
    domainbed = upstream.importable_domainbed()
    now["DomainBed"] = upstream.describe(domainbed) if domainbed else ABSENT
    if domainbed and (commit := upstream.commit_of(domainbed)):
        now["DomainBed"] += f" ({commit})"
    same = {"PyTorch": "torch", "NumPy": "numpy"}
    names = [*then, *(name for name in now if name not in then and name not in same.values())]
    rows = tuple((name, _counted(then.get(name, Counter())), now.get(same.get(name, name), ABSENT)) for name in names)
    return Table(
        "Versions and commits",
        ("What", "As the jobs ran", "Where this report was made"),
        rows,
        "The jobs print the first column themselves; the commits of DomainBed and of domainbed-reasoning they do not "
        "record, so they are those of the second.",
    )


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return domainbed_reasoning.__version__ if package == "domainbed-reasoning" else ABSENT


def _commit() -> str:
    checkout = Path(domainbed_reasoning.__file__).resolve().parent.parent
    commit = upstream.commit_of(checkout)
    if commit is None:
        return ""
    return f", commit {commit}{', modified' if upstream.is_modified(checkout) else ''}"


def _counted(values: Counter[str]) -> str:
    if len(values) <= 1:
        return next(iter(values), ABSENT)
    return ", ".join(f"{value} ({count} jobs)" for value, count in values.most_common())
