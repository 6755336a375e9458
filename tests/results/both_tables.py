"""Run DomainBed's collect_results and our collect on the same folders, in one process.

``python both_tables.py OUTPUT.json FOLDER…``: what stock printed, and our rows and averages, of every folder.
"""

import contextlib
import io
import json
import runpy
import sys

from domainbed_reasoning.results import collect, summarize
from domainbed_reasoning.results.tables import accuracy_tables


def stock(folder):
    """Return what ``python -m domainbed.scripts.collect_results --input_dir folder`` prints."""
    before, out = sys.argv, io.StringIO()
    sys.argv = ["collect_results", "--input_dir", folder]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_module("domainbed.scripts.collect_results", run_name="__main__")
    finally:
        sys.argv = before
    return out.getvalue()


def ours(folder):
    """Return our numbers in the texts of stock's tables."""
    frame = collect(folder, as_stock=True)
    cells = {}
    for row in summarize(frame).to_dict("records"):
        text = f"{100 * row['accuracy']:.1f} +/- {100 * row['accuracy_error']:.1f}"
        cells[f"{row['selection']}|{row['dataset']}|{row['algorithm']}|{row['domain']}"] = text
    averages = {
        f"{table.caption}|{row[0]}": [row[-1], *(row[1:-1] if table.caption.startswith("Averages") else [])]
        for table in accuracy_tables(frame)
        for row in table.rows
    }
    return {"cells": cells, "averages": averages}


if __name__ == "__main__":
    seen = {folder: {"stock": stock(folder), "ours": ours(folder)} for folder in sys.argv[2:]}
    with open(sys.argv[1], "w") as file:
        json.dump(seen, file)
