"""Print the tables of a sweep."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from domainbed import algorithms, announce, datasets, model_selection
from domainbed.lib import misc, reporting

METHODS = (
    model_selection.IIDAccuracySelectionMethod,
    model_selection.LeaveOneOutSelectionMethod,
    model_selection.OracleSelectionMethod,
)
Result = dict[str, Any]


def cell(accuracies: list[float], latex: bool) -> tuple[float | None, str]:
    """Return the mean in percent and the text of one cell, from one accuracy in [0, 1] a trial."""
    if not accuracies:
        return None, "X"
    percent = 100 * np.array(accuracies)
    mean, error = percent.mean(), percent.std() / np.sqrt(len(percent))
    return mean, f"{mean:.1f} {'$' + chr(92) + 'pm$' if latex else '+/-'} {error:.1f}"


def with_average(cells: list[tuple[float | None, str]]) -> list[str]:
    """Return the texts, and the mean of the means (``X`` where one is missing)."""
    means = [mean for mean, _ in cells]
    average = "X" if None in means or not means else f"{sum(means) / len(means):.1f}"
    return [text for _, text in cells] + [average]


def print_table(
    title: str, method: str, columns: list[str], rows: dict[str, list[str]], width: int, latex: bool
) -> None:
    """Print one table: a head row and a row an algorithm."""
    head = ["Algorithm", *columns, "Avg"]
    print()
    if not latex:
        print(f"-------- {title}, model selection method: {method}")
    else:
        head = [f"\\textbf{{{text}}}" for text in head]
        print(f"\\subsubsection{{{title.removeprefix('Dataset: ')}}}", "", "\\begin{center}", sep="\n")
        print("\\adjustbox{max width=\\textwidth}{%", f"\\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}", sep="\n")
        print("\\toprule")
    misc.print_row(head, width, latex)
    if latex:
        print("\\midrule")
    for name, texts in rows.items():
        misc.print_row([name, *texts], width, latex)
    if latex:
        print("\\bottomrule", "\\end{tabular}}", "\\end{center}", sep="\n")


def in_order(found: list[str], known: list[str]) -> list[str]:
    """Return the names found, each once: the known ones in their order, then the others as they came."""
    return [name for name in known if name in found] + [name for name in dict.fromkeys(found) if name not in known]


def sweep_results(groups: list[dict[str, Any]], method: type[model_selection.SelectionMethod]) -> Iterator[Result]:
    """Yield a result for each group of records that the method can judge."""
    for group in groups:
        accuracy = method.sweep_acc(group["records"])
        if accuracy is not None:
            yield group | {"accuracy": accuracy}


def print_method(groups: list[dict[str, Any]], method: type[model_selection.SelectionMethod], latex: bool) -> None:
    """Print every table of one selection method."""
    names = in_order([group["algorithm"] for group in groups], algorithms.ALGORITHMS)
    seen = {group["dataset"] for group in groups}
    sets = [name for name in datasets.DATASETS if name in seen]
    results = list(sweep_results(groups, method))
    if latex:
        print("", f"\\subsection{{Model selection: {method.name}}}", sep="\n")
    overall: dict[str, list[tuple[float | None, str]]] = {name: [] for name in names}
    for dataset in sets:
        rows = {}
        for name in names:
            mine = [r for r in results if (r["dataset"], r["algorithm"]) == (dataset, name)]
            columns = range(datasets.num_environments(dataset))
            cells = [cell([r["accuracy"] for r in mine if r["test_env"] == env], latex) for env in columns]
            rows[name] = with_average(cells)
            trials: dict[int, list[float]] = {}
            for result in mine:
                trials.setdefault(result["trial_seed"], []).append(result["accuracy"])
            overall[name].append(cell([float(np.mean(values)) for values in trials.values()], latex))
        labels = [str(label) for label in datasets.get_dataset_class(dataset).ENVIRONMENTS]
        print_table(f"Dataset: {dataset}", method.name, labels, rows, 20, latex)
    print_table("Averages", method.name, sets, {n: with_average(c) for n, c in overall.items()}, 25, latex)


def main(argv: list[str] | None = None) -> None:
    """Read the records, and print and keep the tables."""
    announce("collect_results")
    parser = argparse.ArgumentParser(description="Tables of a sweep (stand-in for DomainBed)")
    parser.add_argument("--input_dir", required=True)
    parser.add_argument("--latex", action="store_true")
    parser.add_argument("--auto_lr", action="store_true")
    args = parser.parse_args(argv)
    before = sys.stdout
    sys.stdout = misc.Tee(os.path.join(args.input_dir, "results.tex" if args.latex else "results.txt"), "w")
    try:
        records = reporting.load_records(args.input_dir)
        groups = reporting.get_grouped_records(records)
        if args.latex:
            print("\\documentclass{article}", "\\usepackage{booktabs}", "\\usepackage{adjustbox}", sep="\n")
            print("\\begin{document}", "\\section{Full DomainBed results}", sep="\n")
        print(f"{'% ' if args.latex else ''}Total records: {len(records)}")
        for method in METHODS:
            print_method(groups, method, args.latex)
        if args.latex:
            print("\\end{document}")
    finally:
        sys.stdout = before


if __name__ == "__main__":
    main()
