"""The plots of a report: accuracies, both answers, SARR's rounds, and training curves. SVG, light and dark."""

from __future__ import annotations

import io
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pandas as pd

from domainbed_reasoning.plot_styles import COLORS, series
from domainbed_reasoning.results import published
from domainbed_reasoning.results.frame import is_of_round, mean_and_error, summarize
from domainbed_reasoning.results.job_folders import JobFolder
from domainbed_reasoning.results.report.blocks import Figure
from domainbed_reasoning.results.report.paper import accuracies as accuracies_of_the_paper
from domainbed_reasoning.results.tables import chosen_by, chosen_runs, labeled_rows, row_label
from domainbed_reasoning.terminal import one_line

_INK = "#010203"  # placeholder for the page's text color in light and dark mode
_STYLE = "<style>svg{color:#1b1f24}@media(prefers-color-scheme:dark){svg{color:#e4e7eb}}</style>"  # as the page's own
_LEGEND_LETTERS = 100  # per line
_WIDTH = 7.2  # inches at 72 points, so that 10-point text appears as 10 points on the page


def accuracies(cells: pd.DataFrame, dataset: str) -> Figure:
    """Plot each row of an accuracy table as dots: one per target domain, their average, and the paper's.

    Args:
        cells: the rows of `collect`'s frame of one selection method and dataset.
        dataset: DomainBed's name.
    """
    rows = list(labeled_rows(summarize(cells)))
    domains = list(cells.attrs["domains"][dataset])
    figure, axes = _canvas(1.1 + 0.42 * len(rows))
    described = []
    published_rows = accuracies_of_the_paper(cells, dataset)
    for place, (label, own) in enumerate(rows):
        for number, domain in enumerate(domains):
            part = own[own["domain"] == domain]
            if len(part):
                mean, error = 100 * part["accuracy"].iloc[0], 100 * part["accuracy_error"].iloc[0]
                bar = None if math.isnan(error) else error
                color, marker, _ = series(number)
                axes.errorbar(mean, place, xerr=bar, fmt=marker, color=color, ms=6, alpha=0.85)
        if len(own) < len(domains):
            described.append(f"{label} lacks a domain")
            continue
        average = 100 * float(own["accuracy"].mean())
        theirs = published_rows.get(label)
        axes.plot(average, place, "|", color=_INK, ms=20, mew=2.2)
        if theirs is not None:
            axes.plot(theirs, place, "d", color="none", mec=_INK, ms=9)
        described.append(f"{label} {average:.1f}")
    for number, domain in enumerate(domains):
        color, marker, _ = series(number)
        axes.plot([], [], marker, color=color, label=domain)
    axes.plot([], [], "|", color=_INK, ms=12, mew=2.2, label="average")
    if published_rows:
        axes.plot([], [], "d", color="none", mec=_INK, label="paper")
    _name_rows(axes, [label for label, _ in rows])
    axes.set_xlabel("accuracy in the target domain, %")
    _legend(axes, len(domains) + 2)
    method = cells["selection"].iloc[0]
    return _figure(
        figure,
        f"{dataset}, selected by {method}. Bars: standard error over trials.",
        f"Averages: {', '.join(described)}.",
    )


def both_answers(frame: pd.DataFrame) -> Figure | None:
    """Plot both answers of every MLLM algorithm, averaged over its target domains; None without answers."""
    jobs = chosen_runs(frame).dropna(subset=["label_accuracy", "chain_accuracy"], how="all")
    rows: list[tuple[str, float, float]] = []
    for dataset in jobs["dataset"].unique():
        for label, own in labeled_rows(jobs[jobs["dataset"] == dataset]):
            by_label, by_chain = (100 * mean_and_error(own[name])[0] for name in ("label_accuracy", "chain_accuracy"))
            rows.append((label if jobs["dataset"].nunique() == 1 else f"{label}, {dataset}", by_label, by_chain))
    if not rows:
        return None
    figure, axes = _canvas(1.0 + 0.36 * len(rows))
    for place, (_, by_label, by_chain) in enumerate(rows):
        if not (math.isnan(by_label) or math.isnan(by_chain)):
            axes.plot([by_label, by_chain], [place, place], "-", color=_INK, lw=1, alpha=0.5)
        axes.plot(by_label, place, "o", color="none", mec=COLORS[0], mew=2, ms=8)
        axes.plot(by_chain, place, "o", color=COLORS[1], ms=8)
    axes.plot([], [], "o", color="none", mec=COLORS[0], mew=2, label="class name")
    axes.plot([], [], "o", color=COLORS[1], label="chain's conclusion")
    _name_rows(axes, [row[0] for row in rows])
    axes.set_xlabel("accuracy in the target domain at the last step, %")
    _legend(axes, 2)
    described = "; ".join(f"{label}: class name {a:.1f}, chain {b:.1f}" for label, a, b in rows)
    return _figure(
        figure, f"Both answers, mean over target domains and trials. {chosen_by(frame)}".rstrip(), f"{described}."
    )


def rounds(frame: pd.DataFrame) -> Figure | None:
    """Plot the share of chains that each SARR round kept; None without rounds.

    One line per target domain for a single algorithm, else one line per algorithm, averaged over target domains.
    """
    names = [str(name) for name in frame if is_of_round(name, "accepted")]
    jobs = chosen_runs(frame)
    jobs = jobs.dropna(subset=names, how="all") if names else jobs.head(0)
    if jobs.empty:
        return None
    figure, axes = _canvas(3.0)
    numbers = [int(name[4:-9]) for name in names]
    described = []
    several = len(jobs[["dataset", "algorithm", "sweep"]].drop_duplicates()) > 1
    lines = jobs.groupby(["dataset", "algorithm", "sweep", *([] if several else ["domain"])], sort=False)
    for place, ((dataset, algorithm, sweep, *domain), own) in enumerate(lines):
        means = [100 * mean_and_error(own[name])[0] for name in names]
        on = f" on {dataset}" if jobs["dataset"].nunique() > 1 else ""
        label = f"{row_label(algorithm, sweep, dataset)}{on}" if several else str(domain[0])
        color, marker, dashes = series(place)
        axes.plot(numbers, means, marker + dashes, color=color, label=label)
        described.append(f"{label}: " + ", ".join(f"{mean:.1f}" for mean in means if not math.isnan(mean)))
    first, last = published.SELF_LABELS_KEPT
    axes.plot(
        [1, max(3, numbers[-1])], [first, last], "d:", color=_INK, mfc="none", alpha=0.8, label="paper (first, end)"
    )
    axes.set_xticks(range(1, max(3, numbers[-1]) + 1))
    axes.set_xlabel("SARR round")
    axes.set_ylabel("chains kept, %")
    _legend(axes)
    over = "target domains and trials" if several else "trials"
    return _figure(figure, f"Chains that each round kept, mean over {over}.", "; ".join(described) + ".")


def training(jobs: Sequence[JobFolder], dataset: str, chosen: str = "") -> Figure | None:
    """Plot the target domain's accuracy over the steps, one line per algorithm; None with a single evaluation.

    Args:
        jobs: the jobs of the chosen runs.
        dataset: DomainBed's name.
        chosen: by which selection method, as a sentence.
    """
    own = [job for job in jobs if job.args["dataset"] == dataset and len(job.args["test_envs"]) == 1]
    courses: dict[str, list[list[tuple[int, float]]]] = defaultdict(list)
    for job in own:
        target = job.args["test_envs"][0]
        courses[row_label(job.args["algorithm"], job.sweep, dataset)].append(
            [(record["step"], 100 * record[f"env{target}_in_acc"]) for record in job.evaluations]
        )
    courses = {label: found for label, found in sorted(courses.items()) if min(map(len, found)) > 1}
    if not courses:
        return None
    figure, axes = _canvas(3.0)
    for place, (label, found) in enumerate(courses.items()):
        # The same jobs at every point, evaluation by evaluation: steps of an epoch differ from target to target.
        points = list(zip(*found, strict=False))
        steps = [statistics.fmean(step for step, _ in point) for point in points]
        means = [statistics.fmean(accuracy for _, accuracy in point) for point in points]
        color, marker, dashes = series(place)
        axes.plot(steps, means, marker + dashes, color=color, ms=5, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("target accuracy, %")
    _legend(axes)
    caption = f"{dataset}: accuracy in the target domains over training, mean over targets and trials. {chosen}"
    return _figure(figure, caption.rstrip(), f"Lines: {', '.join(courses)}.")


def _canvas(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
    axes = canvas.add_subplot(facecolor="none")
    axes.tick_params(colors=_INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)
    axes.xaxis.label.set(color=_INK, size=9.5)
    axes.yaxis.label.set(color=_INK, size=9.5)
    axes.grid(color=_INK, alpha=0.12)
    axes.set_axisbelow(True)
    return canvas, axes


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels=[_plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.05)


def _plain(label: str) -> str:
    return one_line(label).replace("$", r"\$")  # else matplotlib reads formulas


def _legend(axes: Any, columns: int | None = None) -> None:
    """Add a legend above the plot and enlarge the figure; by default with as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if columns is None:
        columns = min(len(labels), max(1, _LEGEND_LETTERS // (max(map(len, labels)) + 6)), 5)
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.19 * math.ceil(len(labels) / columns))
    axes.legend(
        handles, [_plain(label) for label in labels], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns,
        frameon=False, fontsize=9, labelcolor=_INK, handletextpad=0.4, columnspacing=1.4,
    )  # fmt: skip


def _figure(canvas: Any, caption: str, described: str) -> Figure:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "domainbed-reasoning"}):
        canvas.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    head, close, body = svg.partition(">")
    return Figure(caption, described, "image/svg+xml", f"{head}{close}{_STYLE}{body}".encode())
