"""The tests that touch the libraries, with the oldest and the newest of them, each in an environment of its own.

    python tests/compat/versions.py                 # all rows
    python tests/compat/versions.py oldest          # one of them
    python tests/compat/versions.py --keep newest   # its environment stays in .compat/

`make compat` runs it. A row makes `.compat/<name>` (5 to 7 GB, for torch brings CUDA), installs this checkout with the
row's versions, runs the tests with warnings of ours as errors, and removes the environment. The last lines are a table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]

# What touches torch, transformers, peft, bitsandbytes, numpy or the interpreter's own behavior.
TESTS = (
    "tests/mllm/test_model.py",
    "tests/algorithms/test_algorithms.py",
    "tests/method/test_answering.py",
    "tests/mllm/test_token_rows.py",
    "tests/bridge/test_samples.py",
    "tests/chains/test_store.py",
    "tests/bridge/test_register.py",
    "tests/mllm/test_trained.py",
    "tests/mllm/test_training.py",
    "tests/hostile/test_checkpoints.py",
    "tests/hostile/test_images.py",
)


class Row(NamedTuple):
    """One environment: the interpreter's version (empty: the one that runs this) and what is pinned."""

    python: str
    pins: tuple[str, ...]


ROWS = {
    "oldest": Row(
        "3.11",
        (
            "torch==2.8.0",
            "torchvision==0.23.0",
            "transformers==5.18.0",
            "peft==0.18.0",
            "bitsandbytes==0.46.1",
        ),
    ),
    "newest": Row("", ()),
    "newest-3.12": Row("3.12", ()),
    "newest-3.13": Row("3.13", ()),
    "newest-3.14": Row("3.14", ()),
}


def main(argv: list[str] | None = None) -> int:
    """Run the rows and print a table; return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="default: all of them")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they are")
    given = parser.parse_args(argv)
    results = {name: run(name, ROWS[name], given.keep) for name in given.rows or ROWS}
    print()
    for name, result in results.items():
        print(f"{name:<12} {result}")
    return int(any("passed" not in result or "failed" in result for result in results.values() if result != NONE))


NONE = "no such Python here"


def run(name: str, row: Row, keep: bool) -> str:
    """Make the environment of a row, run the tests in it, and return versions and pytest's last line."""
    python = shutil.which(f"python{row.python}") if row.python else sys.executable
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        return NONE
    folder = CHECKOUT / ".compat" / name
    inside = folder / "bin" / "python"
    try:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        install = [inside, "-m", "pip", "install", "--quiet", "--no-cache-dir", *row.pins, f"{CHECKOUT}[dev]"]
        done = subprocess.run(install)
        if done.returncode:
            return "these versions cannot be installed together"
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
        command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        tests = subprocess.run(command, cwd=CHECKOUT, env=environ, stdout=subprocess.PIPE, text=True)
        print(tests.stdout)
        return f"{versions(inside)}: {tests.stdout.strip().splitlines()[-1]}"
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def versions(python: Path) -> str:
    """Return the versions of the libraries that an environment has."""
    code = (
        "import platform\nfrom importlib.metadata import version\nprint('Python', platform.python_version(),"
        " *(f'{n} {version(n)}' for n in ('torch', 'transformers', 'peft', 'bitsandbytes', 'numpy', 'pandas')))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
