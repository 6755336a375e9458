"""What `pip install .` and `-e .` put into an environment, and that uninstalling takes all of it out again."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from domainbed import algorithms

from domainbed_reasoning.bridge import upstream

CHECKOUT = Path(__file__).resolve().parent.parent
STAND_IN = CHECKOUT / "tests" / "standin"
UPSTREAM = Path(algorithms.__file__).parent.parent  # or the stand-in, where there is none
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
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
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
    expected = {"domainbed_reasoning.pth", "_domainbed_reasoning_hook.py", "domainbed_reasoning/py.typed"}
    package = CHECKOUT / "domainbed_reasoning"
    expected |= {f"domainbed_reasoning/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected |= {
        f"domainbed_reasoning/mllm/tiny_model/{path.name}" for path in (package / "mllm" / "tiny_model").iterdir()
    }
    expected |= {f"domainbed_reasoning/annotate/{path.name}" for path in (package / "annotate").glob("browse.*")}
    expected |= {
        f"domainbed_reasoning/results/report/{path.name}" for path in (package / "results" / "report").glob("page.*")
    }
    for folder in IN_THE_PACKAGE:
        modules = (CHECKOUT / folder).rglob("*.py")
        expected |= {f"domainbed_reasoning/{path.relative_to(CHECKOUT).as_posix()}" for path in modules}
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


@pytest.fixture
def in_a_clone(wheel, environment, tmp_path):
    """``in_a_clone(verb, …)`` runs a verb of an installed wheel in a clone of DomainBed, by its console script.

    Any other DomainBed that could be taken, on PYTHONPATH or in the cache, ends whatever imports it.
    """
    python, _ = environment
    _pip("install", "--no-deps", wheel, python=python)
    clone = tmp_path / "clone"
    shutil.copytree(UPSTREAM / "domainbed", clone / "domainbed")
    other = tmp_path / "other" / "domainbed" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise SystemExit('another DomainBed was imported')\n")

    def run(*words, cwd=clone, code=0, **variables):
        command = [python.parent / "domainbed-reasoning", *words]
        settings = {"PYTHONPATH": str(other.parent.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        settings |= {"OMP_NUM_THREADS": "1", upstream.VARIABLE: str(other.parent.parent), **variables}
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=os.environ | settings, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.clone = clone
    return run


def test_every_verb_that_needs_domainbed_takes_the_clone_that_is_the_working_directory(in_a_clone, tmp_path):
    """The verbs and the processes that they start, by one rule, which doctor names."""
    assert f" {in_a_clone.clone} (" in in_a_clone("doctor")
    assert "a job " in in_a_clone("plan", "--dataset", "PACS", "--model", "tiny")
    study = ("study", "ablation", "--scale", "mini", "--launch", "--output_dir", tmp_path / "study")
    said = in_a_clone(*study, "--launcher", "dummy", code=1)
    assert said.count("Dummy launcher: ") == 24 and "0/24 jobs completed." in said

    job = tmp_path / "sweep" / "job"
    job.mkdir(parents=True)
    args = {"algorithm": "ERM", "dataset": "Debug28", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0}
    args |= {"holdout_fraction": 0.2, "task": "domain_generalization", "output_dir": str(job)}
    accuracies = {f"env{env}_{split}_acc": 0.5 for env in range(3) for split in ("in", "out")}
    record = {"step": 0, "step_time": 0.5, "mem_gb": 0.0, "args": args, "hparams": {"lr": 0.001}, **accuracies}
    (job / "results.jsonl").write_text(json.dumps(record) + "\n")
    (job / "done").write_text("done")
    assert "| ERM | 50.0 |" in in_a_clone("collect", tmp_path / "sweep")
    in_a_clone("report", tmp_path / "sweep")
    in_a_clone("analyze", "divergence", "--dataset", "ShapesReasoning", "--encoder", "tiny", "--images", 4)


def test_without_any_clone_the_verbs_say_so_and_no_stand_in_is_taken(in_a_clone, tmp_path):
    nowhere = {"cwd": tmp_path, "PYTHONPATH": "", upstream.VARIABLE: "", "code": 1}
    assert "DomainBed not found" in in_a_clone("doctor", **nowhere)
    study = ("study", "ablation", "--scale", "mini", "--launch", "--output_dir", tmp_path / "study")
    for words in (("collect", tmp_path), ("plan", "--dataset", "PACS", "--model", "tiny"), study):
        assert "DomainBed was not found. Run from inside your own clone" in in_a_clone(*words, **nowhere)


def test_the_sdist_holds_what_it_takes_to_test_itself(checkout, tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "Makefile",
        "setup.cfg",
        "pyproject.toml",
        "LICENSE",
        "CITATION.cff",
        "_domainbed_reasoning_hook.py",
    } <= held
    for folder in ("algorithms", "benchmarks", "datasets", "examples", "results", "sweeps", "tests"):
        files = [path for path in (CHECKOUT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        names = {path.relative_to(CHECKOUT).as_posix() for path in files}
        assert {name for name in names if "/." not in name} <= held, folder
