"""What the plug-in adds to the start of every Python process: its `.pth` file, in a virtual environment of its own."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import time

from benchmarks.measure import CHECKOUT, REPEATS, BenchmarkRow

STARTS = 8  # a repeat
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo_output")


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the row of the interpreter's start, with a regular installation."""
    source = shutil.copytree(CHECKOUT, work / "source", ignore=NOT_SOURCE)  # building writes into it
    pythons = {}
    for name in ("with", "without"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", work / name], check=True)
        pythons[name] = str(work / name / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source)]
    subprocess.run([*pip, *build], check=True)
    wheel = str(next(work.glob("*.whl")))
    subprocess.run([*pip, "--python", pythons["with"], "install", "--no-deps", "--ignore-installed", wheel], check=True)
    found: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(STARTS * repeats + 1):
        for name, python in pythons.items():
            began = time.perf_counter()
            subprocess.run([python, "-c", "pass"], check=True, env={})
            found[name].append(1000 * (time.perf_counter() - began))
    ours, theirs = (sorted(found[name][1:])[len(found[name]) // 2] for name in ("with", "without"))
    hooked = subprocess.run(
        [pythons["with"], "-c", "import sys; print('_domainbed_reasoning_hook' in sys.modules)"],
        env={}, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert hooked == "True", "the hook did not run"
    return [
        BenchmarkRow(
            "interpreter start",
            "without the plug-in",
            ours,
            theirs,
            "ms",
            1.0,
            "at most 5 ms more",
            ours - theirs <= 5,
            f"{ours - theirs:+.1f} ms; hook installed",
        )
    ]
