"""Model selection with DomainBed's own code: the run and step of each cell.

The numbers equal those of DomainBed's collect_results to the last digit, as the same functions compute them; here they
remain numbers and are linked to their records.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.bridge import stock, upstream
from domainbed_reasoning.jobs.values import ACCURACY
from domainbed_reasoning.results.job_folders import JobFolder, Record


@dataclass(frozen=True)
class Choice:
    """The selected run and step of one trial of one target domain.

    Attributes:
        dataset: DomainBed's name.
        algorithm: DomainBed's name.
        target: number of the target domain.
        trial: trial seed.
        method: DomainBed's name of the selection method.
        accuracy: in the target domain, in [0, 1].
        validation: the accuracy by which it was selected, in [0, 1].
        record: the record that contains ``accuracy``.
        job: the job that wrote it.
    """

    dataset: str
    algorithm: str
    target: int
    trial: int
    method: str
    accuracy: float
    validation: float
    record: Record
    job: JobFolder


class _Accuracy(float):
    """An accuracy with its record; DomainBed's selection returns the same object."""

    place: tuple[JobFolder, Record]


def require_domainbed() -> None:
    """Raise ValueError if DomainBed cannot be imported."""
    try:
        importlib.import_module("domainbed")
    except ModuleNotFoundError as error:
        raise ValueError(upstream.MISSING) from error


def methods() -> list[Any]:
    """Return DomainBed's three selection methods, in the order of its tables."""
    model_selection = stock.model_selection()

    return [
        model_selection.IIDAccuracySelectionMethod,
        model_selection.LeaveOneOutSelectionMethod,
        model_selection.OracleSelectionMethod,
    ]


def choose(jobs: Sequence[JobFolder]) -> Iterator[Choice]:
    """Yield the selection of each method for each cell and trial, in DomainBed's order.

    Args:
        jobs: of one sweep. Cells for which a method lacks records are left out; DomainBed prints X for them.
    """
    known = methods()
    reporting = stock.reporting()

    records = [_traced(job, record) for job in jobs for record in job.records]
    for group in reporting.get_grouped_records(records):
        for method in known:
            ranking = method.hparams_accs(group["records"])
            if not len(ranking):
                continue
            best = ranking[0][0]
            job, record = best["test_acc"].place
            yield Choice(
                group["dataset"],
                group["algorithm"],
                group["test_env"],
                group["trial_seed"],
                method.name,
                float(best["test_acc"]),
                float(best["val_acc"]),
                record,
                job,
            )


@dataclass(frozen=True)
class OneSource:
    """A job trained on one domain, at the step that is best on this domain's validation split.

    Attributes:
        job: the job.
        source: number of the source domain.
        step: the selected step.
        accuracies: of each other domain by its number, in [0, 1].
    """

    job: JobFolder
    source: int
    step: int
    accuracies: Mapping[int, float]

    @property
    def accuracy(self) -> float:
        """Mean over the other domains."""
        return sum(self.accuracies.values()) / len(self.accuracies)


def one_source(jobs: Sequence[JobFolder]) -> Iterator[OneSource]:
    """Yield the jobs whose targets are all domains but one, if these are three or more.

    Of a trial's hparams seeds, the one that is best on the source's validation split is yielded, as DomainBed's
    training-domain validation chooses. Its own methods do not support jobs with more than two targets: its tables have
    an X for each.
    """
    best: dict[tuple[Any, ...], tuple[float, OneSource]] = {}
    for job in jobs:
        targets = job.args["test_envs"]
        last = job.records[-1]
        domains = {int(found[1]) for key in last if (found := ACCURACY.fullmatch(key))}
        sources = domains - set(targets)
        if len(targets) > 2 and len(sources) == 1:
            (source,) = sources
            chosen = max(job.records, key=lambda record: record[f"env{source}_out_acc"])
            one = OneSource(job, source, chosen["step"], {target: chosen[f"env{target}_in_acc"] for target in targets})
            trial = (job.sweep, *(job.args[name] for name in ("dataset", "algorithm", "trial_seed")), source)
            validation = chosen[f"env{source}_out_acc"]
            if trial not in best or validation > best[trial][0]:
                best[trial] = validation, one
    yield from (one for _, one in best.values())


def base_to_new(choices: Iterable[Choice]) -> Iterator[dict[str, Any]]:
    """Yield the selected jobs of base-to-new datasets, with their accuracies on base and new classes in [0, 1].

    Args:
        choices: of one selection method.

    Yields:
        sweep, dataset, algorithm, trial, folder; ``base`` (the validation split of the base classes) and ``new`` by the
        algorithm's answer at the selected step; ``label_base``, ``label_new``, ``chain_base`` and ``chain_new`` by both
        answers at the last step, None if not recorded.
    """
    splits = {"base": ("env0", "out"), "new": ("env1", "in")}
    for choice in choices:
        if choice.dataset.endswith(registry.BASE_TO_NEW) and choice.target == 1:
            answers = choice.job.answers or {}
            found = {name: (answers.get(env) or {}).get(split) or {} for name, (env, split) in splits.items()}
            yield {
                "sweep": choice.job.sweep,
                "dataset": choice.dataset,
                "algorithm": choice.algorithm,
                "trial": choice.trial,
                "base": choice.validation,
                "new": choice.accuracy,
                **{f"{by}_{name}": found[name].get(by) for by in ("label", "chain") for name in splits},
                "folder": choice.job.path,
            }


def _traced(job: JobFolder, record: Record) -> dict[str, Any]:
    """Return the record with its accuracies replaced by ones linked to it."""
    traced = dict(record)
    for name in [f"env{env}_in_acc" for env in record["args"]["test_envs"]]:
        traced[name] = _Accuracy(record[name])
        traced[name].place = (job, record)
    return traced


def in_order(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the unique names: the known ones in their order, then the others in order of appearance."""
    found = dict.fromkeys(names)
    return [name for name in known if name in found] + [name for name in found if name not in known]


def order_of_algorithms(names: Sequence[str]) -> list[str]:
    """Return the algorithms in the order of DomainBed's tables."""
    algorithms = stock.algorithms()

    return in_order(names, algorithms.ALGORITHMS)


def order_of_rows(jobs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return algorithm and sweep of each table row, in the order of DomainBed's tables, then by sweep."""
    order = order_of_algorithms([job["algorithm"] for job in jobs])
    return sorted({(job["algorithm"], job["sweep"]) for job in jobs}, key=lambda row: (order.index(row[0]), row[1]))


def order_of_datasets(names: Sequence[str]) -> list[str]:
    """Return the datasets in the order of DomainBed's tables; unknown ones come last."""
    datasets = stock.datasets()

    return in_order(names, datasets.DATASETS)


def domains_of(dataset: str, jobs: Sequence[JobFolder]) -> tuple[str, ...]:
    """Return the short names of a dataset's domains, as in DomainBed's tables; numbers if unknown."""
    datasets = stock.datasets()

    own = [job for job in jobs if job.args["dataset"] == dataset]
    published = getattr(vars(datasets).get(dataset), "ENVIRONMENTS", None)
    tasks = [job.task["environments"] for job in own if job.task and job.task.get("environments")]
    known = published if isinstance(published, list | tuple) else next(iter(tasks), [])
    measured = {int(found[1]) for job in own for key in job.records[-1] if (found := ACCURACY.fullmatch(key))}
    return tuple(map(str, [*known, *range(len(known), 1 + max(measured, default=-1))]))
