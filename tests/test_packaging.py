"""What `pip install .` and `-e .` put into an environment, and that uninstalling takes all of it out again."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
STAND_IN = CHECKOUT / "tests" / "standin"
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo_output")
IN_THE_PACKAGE = {"algorithms", "datasets", "sweeps"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout: building writes into it."""
    return shutil.copytree(CHECKOUT, tmp_path_factory.mktemp("checkout") / "domainbed-reasoning", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    return next(folder.glob("*.whl"))


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees the packages of this one, but none of its `.pth` files."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path / "venv" / "bin" / "python", packages


def _pip(*arguments, python=None):
    command = [sys.executable, "-m", "pip", *(["--python", python] if python else []), *arguments, "--quiet"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _dummy_sweep(python, folder):
    """Return what the stock sweep prints of a job with our algorithm, dataset and a stock launcher."""
    options = "--algorithms ERM RDMLDG --datasets PACSReasoning --command_launcher dummy --n_hparams 1 --n_trials 1"
    options += f" --single_test_envs --skip_confirmation --data_dir {folder} --output_dir {folder / 'sweep'}"
    command = [str(python), "-m", "domainbed.scripts.sweep", "launch", *options.split()]
    variables = {**os.environ, "PYTHONPATH": str(STAND_IN), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _names(packages):
    return {path.name for path in packages.iterdir() if path.name != "__pycache__"}


def test_the_wheel_holds_every_module_the_tiny_model_and_the_pth_file(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"domainbed_reasoning.pth", "_domainbed_reasoning_hook.py"}
    package = CHECKOUT / "domainbed_reasoning"
    expected |= {f"domainbed_reasoning/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected |= {
        f"domainbed_reasoning/mllm/tiny_model/{path.name}" for path in (package / "mllm" / "tiny_model").iterdir()
    }
    expected |= {f"domainbed_reasoning/annotate/{path.name}" for path in (package / "annotate").glob("browse.*")}
    expected |= {f"domainbed_reasoning/report/{path.name}" for path in (package / "report").glob("page.*")}
    for folder in IN_THE_PACKAGE:
        expected |= {f"domainbed_reasoning/{folder}/{path.name}" for path in (CHECKOUT / folder).glob("*.py")}
    assert held == expected


def test_an_installed_package_is_in_stock_sweeps_and_leaves_nothing_behind(wheel, environment, tmp_path):
    python, packages = environment
    before = _names(packages)
    _pip("install", "--no-deps", wheel, python=python)
    said = _dummy_sweep(python, tmp_path)
    assert said.count("--algorithm RDMLDG --data_dir") == 4
    _pip("uninstall", "--yes", "domainbed-reasoning", python=python)
    assert _names(packages) == before


def test_an_editable_install_is_in_stock_sweeps_and_leaves_nothing_behind(checkout, environment, tmp_path):
    python, packages = environment
    before = _names(packages)
    _pip("install", "--no-deps", "--no-build-isolation", "--editable", checkout, python=python)
    assert _dummy_sweep(python, tmp_path).count("--algorithm RDMLDG --data_dir") == 4
    where = [python, "-c", "import domainbed_reasoning as d; print(d.__file__)"]
    assert subprocess.check_output(where, cwd=tmp_path, text=True).startswith(str(checkout))
    _pip("uninstall", "--yes", "domainbed-reasoning", python=python)
    assert _names(packages) == before
