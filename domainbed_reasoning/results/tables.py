"""The tables of a sweep as rows of strings, for HTML, Markdown and LaTeX."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from domainbed_reasoning.results.frame import in_reading_order, is_of_round, mean_and_error, summarize
from domainbed_reasoning.results.problems import with_counts

ABSENT = "–"
LACKING = "X"  # DomainBed's mark for a cell without a result
AVERAGE = "Avg"  # heads the column of averages over target domains
_LONG = 40  # characters
_ANSWER_COLUMNS = {
    "label_accuracy": "Class name",
    "chain_accuracy": "Chain's conclusion",
    "chain_or_label_accuracy": "Conclusion, else class name",
    "unparsed": "Chains that name no class",
    "well_formed": "Well-formed chains",
}
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ± \d+\.\d)?( \(.*\)|[ᵃᵇᶜᵈᵉᶠᵍʰ]| s| min| h| GiB)?")


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        caption: what it shows.
        head: column names; the first column names the rows.
        rows: one string per column.
        note: explanation below the table.
        best: (row, column) of the cells to emphasize.
        first: column that narrow screens show beside the names; None: none.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    best: frozenset[tuple[int, int]] = frozenset()
    first: int | None = None

    def is_number(self, column: int) -> bool:
        """Return whether a column contains only numbers and marks of missing ones."""
        return all(text in (ABSENT, LACKING) or _NUMBER.fullmatch(text) for text in self._below(column))

    def is_long(self, column: int) -> bool:
        """Return whether a column contains long texts."""
        return any(len(text) > _LONG for text in self._below(column))

    def _below(self, column: int) -> list[str]:
        return [row[column] for row in self.rows]


def accuracy_tables(frame: pd.DataFrame) -> list[Table]:
    """Return DomainBed's tables: one per selection method and dataset, then the averages over datasets.

    Methods that apply to no cell are left out: leave-one-domain-out requires jobs with two target domains.

    Args:
        frame: as `collect` returns it.
    """
    found = []
    for method in frame["selection"].unique():
        judged = frame[frame["selection"] == method]
        datasets = list(judged["dataset"].unique())
        found += [dataset_table(judged[judged["dataset"] == name], method, name) for name in datasets]
        if len(datasets) > 1:
            found.append(_averages(judged, method, datasets))
    return found


def dataset_table(cells: pd.DataFrame, method: str, dataset: str) -> Table:
    """Return the table of one selection method and dataset.

    Args:
        cells: the rows of `collect`'s frame that belong to it.
        method: DomainBed's name.
        dataset: DomainBed's name.
    """
    table = summarize(cells)
    domains = dict(enumerate(cells.attrs["domains"][dataset]))
    most = int(table["trials"].max())
    rows = []
    for label, own in labeled_rows(table):
        by_target = {target: own[own["target"] == target] for target in domains}
        texts = [_cell(part, most) for part in by_target.values()]
        means = [100 * float(part["accuracy"].iloc[0]) for part in by_target.values() if len(part)]
        rows.append((label, *texts, _average(means) if len(means) == len(domains) else LACKING))
    return Table(
        f"{dataset}: accuracy in the target domain, selected by {method}",
        ("Algorithm", *domains.values(), AVERAGE),
        tuple(rows),
        f"Percent, mean ± standard error over {most} trials, as DomainBed computes them."
        if most > 1
        else "Percent. One trial: no standard error.",
    )


def _average(percents: Sequence[float]) -> str:
    return f"{sum(percents) / len(percents):.1f}"  # summed in the same order as in DomainBed


def labeled_rows(table: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """Yield the label and the cells of each table row, one per algorithm and sweep."""
    for (algorithm, sweep), own in table.groupby(["algorithm", "sweep"], sort=False):
        (dataset, *more) = own["dataset"].unique()
        yield row_label(algorithm, sweep, "" if more else dataset), own


def row_label(algorithm: str, sweep: str, dataset: str) -> str:
    """Return an algorithm's name, with its sweep's in a folder of several unless that is only the dataset's."""
    return f"{algorithm} ({sweep})" if sweep and sweep != dataset else algorithm


def _averages(judged: pd.DataFrame, method: str, datasets: Sequence[str]) -> Table:
    """Return the table of averages: the mean over a trial's target domains, then mean and error over trials."""
    rows = []
    # Sweeps that are named by their datasets are one row.
    sweeps = judged["sweep"].where(judged["sweep"] != judged["dataset"], "")
    for label, own in labeled_rows(judged.assign(sweep=sweeps)):
        means, texts = [], []
        for dataset in datasets:
            trials = in_reading_order(own[own["dataset"] == dataset]).groupby("trial")
            accuracies = [float(np.mean(list(trial["accuracy"]))) for _, trial in trials]
            mean, error = mean_and_error(accuracies)
            means.append(100 * mean)
            texts.append(with_error(mean, error, len(accuracies)) if accuracies else LACKING)
        lacking = any(math.isnan(mean) for mean in means)
        rows.append((label, *texts, LACKING if lacking else _average(means)))
    caption = f"Averages over target domains, selected by {method}"
    return Table(caption, ("Algorithm", *datasets, AVERAGE), tuple(rows), "Percent.")


def one_source_tables(frame: pd.DataFrame) -> list[Table]:
    """Return one table per dataset of the jobs trained on one domain; [] without any.

    Args:
        frame: as `collect` returns it.
    """
    from domainbed_reasoning.results.selection import order_of_datasets, order_of_rows

    jobs = frame.attrs.get("one_source", [])
    found = []
    for dataset in order_of_datasets([job["dataset"] for job in jobs]):
        names = frame.attrs["domains"][dataset]
        rows = []
        own = [job for job in jobs if job["dataset"] == dataset]
        most = len({job["trial"] for job in own})
        for algorithm, sweep in order_of_rows(own):
            means, texts = [], []
            for source in range(len(names)):
                trials = [
                    job["accuracy"]
                    for job in own
                    if (job["algorithm"], job["sweep"], job["source"]) == (algorithm, sweep, source)
                ]
                mean, error = mean_and_error(trials)
                means.append(100 * mean)
                texts.append(with_error(mean, error, len(trials)) if trials else LACKING)
            average = LACKING if any(map(math.isnan, means)) else _average(means)
            rows.append((row_label(algorithm, sweep, dataset), *texts, average))
        note = "Percent, mean over the other domains. Columns are sources, whose validation split selects the step."
        error_note = "Mean ± standard error over trials." if most > 1 else "One trial: no standard error."
        caption = f"{dataset}: trained on one domain, accuracy on all others"
        found.append(Table(caption, ("Algorithm", *names, AVERAGE), tuple(rows), f"{note} {error_note}"))
    return found


def answers_table(frame: pd.DataFrame) -> Table | None:
    """Return both answers' accuracies in the target domains at the last step; None if no job recorded them."""
    asked = chosen_runs(frame)
    asked = asked[asked["label_accuracy"].notna() | asked["chain_accuracy"].notna()]
    if asked.empty:
        return None
    rows = []
    for dataset in asked["dataset"].unique():
        for label, own in labeled_rows(asked[asked["dataset"] == dataset]):
            domains = dict(sorted(zip(own["target"], own["domain"], strict=True)))
            for target, domain in domains.items():
                rows.append((label, dataset, domain, *_answer_texts(own[own["target"] == target])))
            if len(domains) > 1:
                rows.append((label, dataset, "all", *_answer_texts(own)))
    return Table(
        "Both answers in the target domains, at the last step",
        ("Algorithm", "Dataset", "Target", *_ANSWER_COLUMNS.values()),
        tuple(rows),
        "Percent of the images. By conclusion, a chain that names no class is wrong; the next column falls back to the "
        "class name, as do DomainBed's tables unless the hparam on_parse_failure is 'wrong'. Well formed: all five "
        f"stages, in order, each closed. {chosen_by(frame)}".rstrip(),
    )


def _answer_texts(cells: pd.DataFrame) -> list[str]:
    means = [mean_and_error(cells[name])[0] for name in _ANSWER_COLUMNS]
    return [ABSENT if math.isnan(mean) else _percent(mean) for mean in means]


def rounds_table(frame: pd.DataFrame) -> Table | None:
    """Return the share of self-generated chains that each round kept; None without rounds."""
    rounds = [str(name) for name in frame if is_of_round(name, "accepted")]
    labeled = chosen_runs(frame).dropna(subset=rounds, how="all") if rounds else frame.head(0)
    if labeled.empty:
        return None
    rows = []
    for dataset in labeled["dataset"].unique():
        for label, own in labeled_rows(labeled[labeled["dataset"] == dataset]):
            for target, domain in sorted(set(zip(own["target"], own["domain"], strict=True))):
                cells = own[own["target"] == target]
                rows.append((label, dataset, domain, *(_round_text(cells, name) for name in rounds)))
    return Table(
        "Self-labeled chains that each SARR round kept",
        ("Algorithm", "Dataset", "Target", *(f"Round {name[4:-9]}" for name in rounds)),
        tuple(rows),
        "Percent of the chains that the model generated for source-domain images, mean over trials; in parentheses "
        f"the share of the kept ones that are well formed, if recorded. {chosen_by(frame)}".rstrip(),
    )


def _round_text(cells: pd.DataFrame, name: str) -> str:
    """Return the share that a round kept and, in parentheses, the share of these that are well formed, if recorded."""
    kept = mean_and_error(cells[name])[0]
    column = name.replace("accepted", "well_formed")
    whole = mean_and_error(cells[column])[0] if column in cells else math.nan
    return (ABSENT if math.isnan(kept) else _percent(kept)) + ("" if math.isnan(whole) else f" ({_percent(whole)})")


def costs_table(frame: pd.DataFrame) -> Table:
    """Return the mean time and memory of the jobs over targets and trials."""
    jobs = chosen_runs(frame)
    rows = []
    for dataset in jobs["dataset"].unique():
        for label, own in labeled_rows(jobs[jobs["dataset"] == dataset]):
            train, wall, memory = (
                mean_and_error(own[name])[0] for name in ("train_seconds", "wall_seconds", "memory_gib")
            )
            texts = (duration(train), duration(wall), ABSENT if math.isnan(memory) else f"{memory:.1f} GiB")
            rows.append((label, dataset, str(len(own)), *texts))
    return Table(
        "Time and memory of a job",
        ("Algorithm", "Dataset", "Jobs", "Updates", "Whole job", "Peak GPU memory"),
        tuple(rows),
        "Means. The time of the whole job is from its files; it includes evaluations, but not imports. "
        f"{chosen_by(frame)}".rstrip(),
    )


def hparams_table(frame: pd.DataFrame) -> Table:
    """Return the hyper-parameters of the selected runs, with varying ones in a separate column."""
    first = chosen_runs(frame)
    rows = []
    for dataset in first["dataset"].unique():
        for label, own in labeled_rows(first[first["dataset"] == dataset]):
            same, varied = split_settings([json.loads(text) for text in own["hparams"]])
            seeds = sorted(set(own["hparams_seed"]))
            fixed = ", ".join(f"{name} {value}" for name, value in same.items())
            moving = "; ".join(f"{name}: {values}" for name, values in varied.items()) or ABSENT
            rows.append((label, dataset, _listed(seeds), fixed, moving))
    return Table(
        f"Hyper-parameters of the runs selected by {frame['selection'].iloc[0]}",
        ("Algorithm", "Dataset", "hparams_seed", "In all of them", "Varying"),
        tuple(rows),
        "hparams_seed 0 means the defaults, overridden by --hparams.",
    )


def split_settings(settings: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings that all have in common, and the values of those that vary, as text."""
    same, varied = {}, {}
    for name in sorted(set().union(*settings)):
        values = [setting.get(name) for setting in settings]
        kinds = list({json.dumps(value): value for value in values}.values())
        if len(kinds) == 1:
            same[name] = kinds[0]
        else:
            varied[name] = _listed(sorted(kinds, key=_place_of_setting))
    return same, varied


def _place_of_setting(value: Any) -> tuple[bool, bool, float, str]:
    """Return the sort key of a setting: numbers, lists, null, strings."""
    number = value if isinstance(value, (int, float)) else math.inf
    return isinstance(value, str), value is None, number, json.dumps(value)


def _listed(values: Sequence[Any]) -> str:
    numbers = all(isinstance(value, (int, float)) for value in values)
    if len(values) > 4 and numbers:
        return f"{_short(values[0])} to {_short(values[-1])} ({len(values)} values)"
    return ", ".join(map(_short, values))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def versions_table(frame: pd.DataFrame) -> Table | None:
    """Return the versions that the jobs ran on; None if none recorded them."""
    versions = frame.attrs.get("versions", {})
    if not versions:
        return None
    rows = tuple((name, with_counts(counts)) for name, counts in versions.items())
    return Table("Versions that the jobs ran on", ("Software", "Version"), rows, "Recorded by each job at its start.")


def problems_table(problems: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return the jobs' problems, their effects and fixes; None if there are none."""
    if not problems:
        return None
    rows = [
        (
            problem["kind"],
            problem["job"],
            problem["detail"],
            problem["effect"],
            problem["fix"],
            _folders(problem["folders"]),
        )
        for problem in problems
    ]
    head = ("Problem", "Job", "Details", "In the tables", "Fix", "Folder")
    return Table("Problems found in the sweep's folder", head, tuple(rows))


def _folders(folders: Sequence[str]) -> str:
    more = f" and {len(folders) - 6} more" if len(folders) > 6 else ""
    return ", ".join(folders[:6]) + more or ABSENT


def chosen_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the first selection method, one per cell and trial: methods may choose other hparams seeds."""
    return frame[frame["selection"] == frame["selection"].iloc[0]] if len(frame) else frame


def chosen_by(frame: pd.DataFrame) -> str:
    """Return which selection method's runs `chosen_runs` returns, as a sentence; empty if all methods choose them."""
    if frame.groupby(["sweep", "dataset", "algorithm", "target", "trial"])["folder"].nunique().max() == 1:
        return ""
    return f"Runs selected by {frame['selection'].iloc[0]}."


def _cell(part: pd.DataFrame, most: int) -> str:
    if part.empty:
        return LACKING
    (row,) = part.to_dict("records")
    text = with_error(row["accuracy"], row["accuracy_error"], row["trials"])
    return text if row["trials"] == most else f"{text} ({row['trials']} of {most} trials)"


def with_error(mean: float, error: float, trials: int) -> str:
    """Return mean and standard error in percent, without the error for a single trial."""
    return f"{100 * mean:.1f} ± {100 * error:.1f}" if trials > 1 else _percent(mean)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def duration(seconds: float) -> str:
    """Return a readable duration; a dash for a missing value."""
    if math.isnan(seconds):
        return ABSENT
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
