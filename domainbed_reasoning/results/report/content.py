"""The content of a sweep's report, section by section."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd

from domainbed_reasoning import plot_styles
from domainbed_reasoning.jobs.job_files import RESULTS
from domainbed_reasoning.results import published, selection, tables
from domainbed_reasoning.results.base_to_new import base_to_new_tables
from domainbed_reasoning.results.frame import tabulate
from domainbed_reasoning.results.job_folders import JobFolder, read_jobs
from domainbed_reasoning.results.problems import count_as_stock, validate_jobs
from domainbed_reasoning.results.report import commands, paper, plots
from domainbed_reasoning.results.report.analyses import analysis_blocks
from domainbed_reasoning.results.report.blocks import Block, Code, Details, Examples, Report, Section, Text
from domainbed_reasoning.results.report.classes import class_blocks
from domainbed_reasoning.results.report.examples import examples_of
from domainbed_reasoning.results.report.finding import findings, for_report

_MOST_EXAMPLES = 120
_NO_PROBLEMS = "No problems: all jobs completed, and each is counted once."


def read_report(
    folder: str | os.PathLike[str], *, examples: int = 2, data_dir: str | None = None, as_stock: bool = False
) -> Report:
    """Return the report of a sweep, or of a folder of sweeps.

    Args:
        folder: the --output_dir of DomainBed's sweep, or a folder of sweeps.
        examples: number of right and of wrong chains shown per algorithm and target domain.
        data_dir: folder of the images, if not that of the jobs.
        as_stock: count the jobs that DomainBed's collect_results counts.

    Raises:
        ValueError: for a folder without jobs, or if DomainBed cannot be imported.
    """
    selection.require_domainbed()
    root = Path(folder).expanduser()
    jobs = read_jobs(root)
    settled, problems = validate_jobs(jobs)
    counted, problems = count_as_stock(jobs, problems) if as_stock else (settled, problems)
    frame = tabulate(counted, problems)
    with_records = [job for job in jobs if job.records]
    sections = [
        Section("Problems", "problems", _problems(frame, as_stock)),
        Section("One source", "one-source", tuple(_one_source(frame))),
        Section("Base to new classes", "base-to-new", tuple(map(for_report, base_to_new_tables(frame)))),
        Section("Accuracy", "accuracy", tuple(_accuracy(frame, counted)) if len(frame) else ()),
        Section("Comparison with the paper", "paper", tuple(_comparison(frame, counted)) if len(frame) else ()),
        Section("Both answers", "answers", tuple(_answers(frame)) if len(frame) else ()),
        Section("Classes", "classes", tuple(class_blocks(frame, counted)) if len(frame) else ()),
        Section("Self-labeling", "rounds", tuple(_rounds(frame)) if len(frame) else ()),
        Section("Example chains", "examples", tuple(_examples(_chosen(frame, counted), examples, data_dir))),
        Section("Analyses", "analyses", tuple(_analyses(root, jobs))),
        Section("Time and memory", "costs", (tables.costs_table(frame),) if len(frame) else ()),
        Section("Hyper-parameters", "hparams", (tables.hparams_table(frame),) if len(frame) else ()),
        Section("Reproduction", "again", tuple(_reproduction(jobs, with_records, root))),
    ]
    title = f"DomainBed sweep “{root.resolve().name}”"
    shown = tuple(section for section in sections if section.blocks)
    return Report(title, _lead(jobs, counted), shown, findings(frame))


def _analyses(root: Path, jobs: Sequence[JobFolder]) -> Iterator[Block]:
    """Yield the analyses of the folder, and of each of its sweeps."""
    yield from analysis_blocks(root)
    for sweep in sorted({job.sweep for job in jobs if job.sweep}):
        if blocks := tuple(analysis_blocks(root / sweep)):
            yield Details(f"Analyses of {sweep}", blocks)


def _lead(jobs: Sequence[JobFolder], counted: Sequence[JobFolder]) -> str:
    done = sum(job.done for job in jobs)
    lead = f"{done} of {len(jobs)} jobs completed, {len(counted)} counted."
    if counted:
        args = [job.args for job in counted]
        names = selection.order_of_algorithms([own["algorithm"] for own in args])
        datasets = selection.order_of_datasets([own["dataset"] for own in args])
        trials = len({own["trial_seed"] for own in args})
        lead += f" {', '.join(names)} on {', '.join(datasets)}, {trials} trial{'s' if trials > 1 else ''}."
        newest = max((job.folder / RESULTS).stat().st_mtime for job in counted)
        lead += f" Last record: {datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}."
    return lead


def _problems(frame: pd.DataFrame, as_stock: bool) -> tuple[Block, ...]:
    table = tables.problems_table(frame.attrs["problems"])
    if table is None:
        return (Text(_NO_PROBLEMS),)
    kinds = Counter(problem["kind"] for problem in frame.attrs["problems"])
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    stock = Text("All jobs are counted, as by DomainBed's collect_results (`--as-stock`).")
    return (*([stock] if as_stock else []), Details(f"{kinds.total()} found: {counts}", (table,)))


def _one_source(frame: pd.DataFrame) -> Iterator[Block]:
    found = tables.one_source_tables(frame)
    yield from map(for_report, found)
    if found:
        ours, best = published.SINGLE_SOURCE["RDMLDG"], published.SINGLE_SOURCE["best baseline"]
        yield Text(
            f"The paper reports an average of {ours:.2f} for RD-MLDG trained on one source domain, and {best:.2f} for "
            "its best baseline. The datasets and sources averaged over are not known here."
        )


def _accuracy(frame: pd.DataFrame, counted: Sequence[JobFolder]) -> Iterator[Block]:
    """Yield the tables of the first selection method with their plots; those of the others collapsed."""
    methods = list(frame["selection"].unique())
    first = frame[frame["selection"] == methods[0]]
    known = paper.datasets_in_paper(frame)
    by_caption = {table.caption: for_report(table) for table in tables.accuracy_tables(frame)}
    for dataset in first["dataset"].unique():
        cells = first[first["dataset"] == dataset]
        table = tables.dataset_table(cells, methods[0], dataset)
        del by_caption[table.caption]
        own_columns = len(table.head)
        yield for_report(paper.add_paper_columns(table, cells, dataset) if dataset in known else table, own_columns)
        if plot_styles.has_matplotlib():
            yield plots.accuracies(cells, dataset)
            course = plots.training(_chosen(frame, counted), dataset, tables.chosen_by(frame))
            if course:
                yield course
    if not plot_styles.has_matplotlib():
        yield Text("No plots: matplotlib is not installed (`pip install 'domainbed-reasoning[plots]'`).")
    averages = [table for caption, table in by_caption.items() if methods[0] in caption]
    yield from averages
    for method in methods[1:]:
        others = tuple(table for caption, table in by_caption.items() if method in caption)
        yield Details(f"Selected by {method}", others)


def _chosen(frame: pd.DataFrame, counted: Sequence[JobFolder]) -> list[JobFolder]:
    """Return the jobs of the runs that the tables beside the accuracies are of."""
    folders = set(tables.chosen_runs(frame)["folder"])
    return [job for job in counted if job.path in folders]


def _comparison(frame: pd.DataFrame, counted: Sequence[JobFolder]) -> Iterator[Block]:
    known = paper.datasets_in_paper(frame)
    if known:
        yield Text(
            f"The paper reports on {', '.join(known)}: its averages are in the tables above for methods that "
            "DomainBed has as well. It does not state how the step was selected, or the number of seeds."
        )
    else:
        named = ", ".join(frame["dataset"].unique())
        yield Text(f"The paper does not report on {named}: only the ranking of the methods can be compared.")
        first = frame[frame["selection"] == frame["selection"].iloc[0]]
        for dataset in first["dataset"].unique():
            cells = first[first["dataset"] == dataset]
            table = tables.dataset_table(cells, first["selection"].iloc[0], dataset)
            if places := paper.ranking_table(table, cells, dataset):
                yield places
    differing = paper.differing_settings(counted)
    yield Text(differing) if isinstance(differing, str) else differing
    yield Details("The paper's tables", (paper.main_results(), paper.ablation()))


def _answers(frame: pd.DataFrame) -> Iterator[Block]:
    table = tables.answers_table(frame)
    figure = plots.both_answers(frame) if plot_styles.has_matplotlib() else None
    if figure:
        yield figure
    if table:
        yield table


def _rounds(frame: pd.DataFrame) -> Iterator[Block]:
    table = tables.rounds_table(frame)
    if table:
        figure = plots.rounds(frame) if plot_styles.has_matplotlib() else None
        if figure:
            yield figure
        yield table


def _examples(counted: Sequence[JobFolder], examples: int, data_dir: str | None) -> Iterator[Block]:
    """Yield the examples of every algorithm with chains; the last algorithm in DomainBed's order is expanded."""
    single = [job for job in counted if len(job.args["test_envs"]) == 1]
    groups: list[tuple[str, list[Examples]]] = []
    places = {(job.args["dataset"], job.args["algorithm"], job.sweep) for job in single}
    order = selection.order_of_algorithms([algorithm for _, algorithm, _ in places])
    left = _MOST_EXAMPLES
    skipped: list[str] = []
    damaged: list[str] = []
    for dataset, algorithm, sweep in sorted(places, key=lambda place: (-order.index(place[1]), place[0], place[2])):
        own = [
            job
            for job in single
            if (job.args["dataset"], job.args["algorithm"], job.sweep) == (dataset, algorithm, sweep)
        ]
        name = f"{tables.row_label(algorithm, sweep, dataset)} on {dataset}"
        if examples and left <= 0:
            skipped.append(name)
            continue
        found = list(examples_of(own, examples, data_dir, damaged)) if examples else []
        left -= sum(len(group.shown) for group in found)
        if found:
            groups.append((name, found))
    if damaged:
        yield Code("Invalid lines of predictions, left out", "\n".join(damaged), "text")
    if not groups:
        return
    yield Text(
        "Images of the target domains with the chains that the trained model generated, sampled by the hash of their "
        "names. Counts are over all images of the domain in its first trial."
    )
    for number, (name, found) in enumerate(groups):
        yield Details(name, tuple(found), opened=number == 0)
    if skipped:
        yield Text(
            f"Left out to keep the page small: {', '.join(skipped)}. Pass a smaller `--examples` to include them."
        )


def _reproduction(jobs: Sequence[JobFolder], with_records: Sequence[JobFolder], root: Path) -> Iterator[Block]:
    if with_records:
        sweeps = commands.sweep_commands(with_records, root)
        yield from sweeps
        if not sweeps:
            yield Text("No stock sweep creates jobs with these targets; use the train commands.")
        yield Details("Commands of single jobs", (commands.job_commands(with_records),), opened=not sweeps)
    yield commands.versions_table(jobs)
