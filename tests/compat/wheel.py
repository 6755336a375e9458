"""The tests on what users install: a wheel in a fresh environment, outside of the checkout, in a clone of DomainBed.

    python tests/compat/wheel.py tests/chains tests/commands     # these tests, and a training job
    python tests/compat/wheel.py --no-download tests/chains      # the libraries of this environment, nothing downloaded
    python tests/compat/wheel.py --folder FOLDER …               # leave everything in FOLDER

`make test-wheel` runs it, as CI does. The folder holds the wheel, the environment, a copy of `tests` without the
package's sources, and a clone of DomainBed, in which everything runs. An editable install hides what the wheel lacks.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo_output")
TRAIN = "-m domainbed.scripts.train --dataset ShapesReasoning --algorithm RDMLDG --test_envs 3 --steps 4 --output_dir"


def main(argv: list[str] | None = None) -> int:
    """Build, install and test; return 1 if anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="+", help="files or folders of tests, relative to the checkout")
    parser.add_argument("--no-download", action="store_true", help="use the installed libraries of this environment")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in (default: a temporary one)")
    args = parser.parse_args(argv)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        return run(args.folder.resolve(), args.tests, args.no_download)
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder).resolve(), args.tests, args.no_download)


def run(folder: Path, tests: list[str], no_download: bool) -> int:
    """Do everything below ``folder``."""
    python = install(build(folder, no_download), folder / "venv", no_download)
    clone = get_domainbed(folder, python)
    shutil.copytree(CHECKOUT / "tests", folder / "tests", ignore=NOT_SOURCE)
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {"OMP_NUM_THREADS": "1", "DOMAINBED_REASONING_DOMAINBED": str(clone)}
    where = [python, "-c", "import domainbed_reasoning as package; print(package.__file__)"]
    place = subprocess.run(where, cwd=clone, env=environ, check=True, capture_output=True, text=True).stdout.strip()
    print(f"Testing {place}", flush=True)
    if not Path(place).is_relative_to(folder / "venv"):
        print("The package is not imported from the wheel.", file=sys.stderr)
        return 1
    marks = ["-m", "not slow", "-p", "no:cacheprovider", "-c", folder / "pyproject.toml", "--rootdir", folder]
    command = [python, "-m", "pytest", "-q", *marks, *(folder / name for name in tests)]
    failed = subprocess.run(list(map(str, command)), cwd=clone, env=environ).returncode
    failed |= subprocess.run([python, "-m", "domainbed_reasoning", "doctor"], cwd=clone, env=environ).returncode
    job = folder / "job"
    failed |= subprocess.run([python, *TRAIN.split(), job], cwd=clone, env=environ).returncode
    print(f"The training job {'completed' if (job / 'done').exists() else 'FAILED'}.")
    return int(bool(failed) or not (job / "done").exists())


def build(folder: Path, no_download: bool) -> Path:
    """Build the wheel from a copy of the checkout, into which building writes, and return its path."""
    source = shutil.copytree(CHECKOUT, folder / "source", ignore=NOT_SOURCE)
    isolation = ["--no-build-isolation"] if no_download else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", folder, source]
    subprocess.run(command, check=True)
    shutil.rmtree(source)
    return next(folder.glob("*.whl"))


def install(wheel: Path, venv: Path, no_download: bool) -> Path:
    """Install the wheel with its libraries into a fresh environment and return the environment's Python."""
    subprocess.run([sys.executable, "-m", "venv", *(["--without-pip"] if no_download else []), venv], check=True)
    python = venv / "bin" / "python"
    if no_download:
        packages = next(venv.glob("lib/python3*/site-packages"))
        outer = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "outer.pth").write_text("".join(f"{path}\n" for path in outer))  # but none of their .pth files
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    else:
        command = [python, "-m", "pip", "install", "--quiet", f"{wheel}[dev]"]
    subprocess.run(command, check=True)
    return python


def get_domainbed(folder: Path, python: Path) -> Path:
    """Return a folder with the pinned DomainBed, or where it cannot be fetched the stand-in, as users clone it."""
    environ = {**os.environ, "DOMAINBED_REASONING_DOMAINBED": ""}
    subprocess.run([python, "-m", "domainbed_reasoning", "get-domainbed"], cwd=folder, env=environ)
    code = "from domainbed_reasoning.bridge import upstream as u; print(u.cached_clone())"
    found = subprocess.run([python, "-c", code], cwd=folder, env=environ, capture_output=True, text=True).stdout.strip()
    source = Path(found) if found and Path(found, "domainbed").is_dir() else CHECKOUT / "tests" / "standin"
    return Path(shutil.copytree(source, folder / "clone"))


if __name__ == "__main__":
    sys.exit(main())
