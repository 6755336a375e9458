"""The plots of the analyses, with matplotlib (the extra ``plots``), without a display."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from domainbed_reasoning.analysis.settings import kinds_of
from domainbed_reasoning.analysis.target_tokens import TokenTable
from domainbed_reasoning.analysis.token_shift import HIGH, LOW
from domainbed_reasoning.files.atomic import replacing
from domainbed_reasoning.plot_styles import COLORS, series

Rows = Sequence[Mapping[str, Any]]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def token_shift(before: TokenTable, after: TokenTable, title: str, path: pathlib.Path) -> None:
    """Plot histograms of token probabilities before and after, one panel per group of tokens."""
    groups = {"all tokens": np.ones(len(before.kind), bool)}
    for kind, name in (("naming", "where the class is first named"), ("class", "class tokens")):
        if (before.kind == kind).any():
            groups[name] = before.kind == kind
    figure, axes = _figure(4 * len(groups), 3.2, 1, len(groups))
    bins = np.linspace(0, 1, 21)
    for axis, (name, chosen) in zip(axes[0], groups.items(), strict=True):
        for table, label, color in ((before, "before", COLORS[1]), (after, "after", COLORS[0])):
            share = np.full(int(chosen.sum()), 100 / chosen.sum())
            axis.hist(table.probability[chosen], bins, weights=share, histtype="stepfilled", alpha=0.35, color=color)
            axis.hist(table.probability[chosen], bins, weights=share, histtype="step", color=color, label=label)
        for edge in (LOW, HIGH):
            axis.axvline(edge, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"{name} (n = {int(chosen.sum()):,})", xlabel="probability of the target token", ylim=(0, 105))
    axes[0][0].set_ylabel("share of tokens, %")
    axes[0][0].legend(frameon=False, loc="upper center")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def entropy(by_source: Mapping[str, Rows], top: int, title: str, path: pathlib.Path) -> None:
    """Plot the tokens with the largest entropy reduction, one panel per source of chains; class words are colored."""
    from matplotlib.patches import Patch

    figure, axes = _figure(4.2 * len(by_source), 0.26 * top + 1.4, 1, len(by_source))
    for axis, (source, rows) in zip(axes[0], by_source.items(), strict=True):
        shown = list(rows[:top])[::-1]
        colors = [COLORS[1] if row["of_class"] else COLORS[0] for row in shown]
        axis.barh([f"{row['token']} ({row['n']})" for row in shown], [row["reduction"] for row in shown], color=colors)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=f"{source} chains", xlabel="entropy reduction, nats")
    handles = [Patch(color=COLORS[1], label="in a conclusion"), Patch(color=COLORS[0], label="elsewhere")]
    axes[0][-1].legend(handles=handles, frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def divergence(rows: Rows, title: str, path: pathlib.Path) -> None:
    """Plot the MMD² of each pair of domains for images and for chains; stars mark p < 0.05."""
    pairs = [(row["domain"], row["other"]) for row in rows if row["modality"] == "images"]
    figure, axes = _figure(max(5.0, 1.1 * len(pairs)), 3.6)
    axis = axes[0][0]
    for offset, (modality, color) in zip((-0.2, 0.2), (("images", COLORS[1]), ("chains", COLORS[0])), strict=True):
        found = {(row["domain"], row["other"]): row for row in rows if row["modality"] == modality}
        heights = [found[pair]["unbiased"] for pair in pairs]
        bars = axis.bar(np.arange(len(pairs)) + offset, heights, 0.38, color=color, label=modality)
        for bar, pair in zip(bars, pairs, strict=True):
            if found[pair]["p"] is not None and found[pair]["p"] < 0.05:
                axis.annotate("*", (bar.get_x() + bar.get_width() / 2, max(0, bar.get_height())), ha="center")
    axis.axhline(0, color="black", linewidth=0.8)
    names = ["mean" if a == b else f"{a}\n{b}" for a, b in pairs]
    axis.set_xticks(np.arange(len(pairs)), names, fontsize=8)
    axis.set(ylabel="MMD² (unbiased), * p < 0.05", title=title)
    axis.title.set_fontsize(10)
    axis.legend(frameon=False)
    _save(figure, path)


def rounds(rows: Rows, title: str, path: pathlib.Path) -> None:
    """Plot accuracies and shares by stage: thin lines are jobs, thick ones the means of their kind."""
    panels = {
        "target": "target accuracy",
        "source_out": "source validation accuracy",
        "accepted": "share of own chains kept",
        "agreement": "chain agrees with label path",
        "words": "words per chain",
    }
    panels = {key: name for key, name in panels.items() if any(row.get(key) is not None for row in rows)}
    figure, axes = _figure(3.3 * len(panels), 3.2, 1, len(panels))
    of_row = kinds_of(rows)
    kinds = sorted(set(of_row))
    for axis, (key, name) in zip(axes[0], panels.items(), strict=True):
        for number, kind in enumerate(kinds):
            color, marker, dashes = series(number)
            by_stage: dict[int, list[float]] = {}
            jobs: dict[str, list[tuple[int, float]]] = {}
            for row, its in zip(rows, of_row, strict=True):
                if its == kind and row.get(key) is not None:
                    jobs.setdefault(row["job"], []).append((row["stage"], row[key]))
            for points in jobs.values():
                last = dict(points)  # the last evaluation of each stage
                for stage, value in last.items():
                    by_stage.setdefault(stage, []).append(value)
                if len(jobs) > 1:
                    axis.plot(list(last), list(last.values()), color=color, linewidth=0.7, alpha=0.4)
            stages = sorted(by_stage)
            means = [float(np.mean(by_stage[stage])) for stage in stages]
            axis.plot(stages, means, marker + dashes, color=color, label=kind)
        stages = sorted({row["stage"] for row in rows if row.get(key) is not None})
        axis.set_xticks(stages, [{-1: "start", 0: "teacher"}.get(stage, str(stage)) for stage in stages])
        axis.set(title=name, xlabel="stage")
        axis.title.set_fontsize(9)
        axis.set_ylim(0, None if key == "words" else 1.03)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def faithfulness(rows: Rows, title: str, path: pathlib.Path) -> None:
    """Plot each share with its 95% interval, one color per kind of job."""
    names = list(dict.fromkeys(row["what"] for row in rows))
    kinds = list(dict.fromkeys(row["models"] for row in rows))
    figure, axes = _figure(8, (0.15 + 0.04 * len(kinds)) * len(names) + 1)
    axis = axes[0][0]
    for number, kind in enumerate(kinds):
        color, marker, dashes = series(number)
        shift = 0.75 * (number - (len(kinds) - 1) / 2) / max(1, len(kinds))
        for row in rows:
            if row["models"] == kind and row["share"] is not None:
                y = names.index(row["what"]) + shift
                axis.plot([row["low"], row["high"]], [y, y], dashes, color=color, linewidth=1.2)
                axis.plot(row["share"], y, marker, color=color, markersize=4)
        axis.plot([], [], marker + dashes, color=color, label=kind, markersize=4)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set(xlim=(-0.02, 1.02), xlabel="share of images, 95% interval", title=title)
    axis.title.set_fontsize(10)
    axis.grid(axis="y", linewidth=0.3)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)
