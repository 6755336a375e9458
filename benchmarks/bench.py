"""Every ratio against peers that really run, in one table: `make bench`, or `python -m benchmarks.bench [part …]`.

Prints the table and writes `benchmarks/results/<machine>.json`. One thread: the ratios are of work, not of cores.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
import tempfile
import time
import traceback

from benchmarks.measure import CHECKOUT, REPEATS, machine, table, write_results

PARTS = (
    "mtct_step",
    "class_scores",
    "self_labels",
    "logits_memory",
    "update_overhead",
    "interpreter_start",
    "data_path",
    "stalls",
    "first_update",
    "whole_job",
)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a bar was missed or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="calls of each contender; the median counts")
    parser.add_argument("--results", type=pathlib.Path, default=CHECKOUT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began, rows, told, failed = time.monotonic(), [], [], []
    for part in args.parts or PARTS:
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows += importlib.import_module(f"benchmarks.{part}").run(pathlib.Path(folder), args.repeats)
        except Exception:  # the other parts are worth their minutes
            traceback.print_exc()
            failed.append(part)
        found = [row for row in rows if row not in told]
        told = list(rows)
        print(f"{part}: {time.monotonic() - start:.0f} s\n{table(found)}", file=sys.stderr, flush=True)
    print(table(rows))
    if failed:
        print(f"\nFAILED: {', '.join(failed)}; nothing is written")
    elif not args.parts:
        seconds = time.monotonic() - began
        print(f"\n{write_results(rows, 'make bench', seconds, args.results, machine())}: {seconds:.0f} s in all")
    return 0 if not failed and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
