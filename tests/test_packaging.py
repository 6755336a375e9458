"""What `pip install .` and `-e .` install, and that uninstalling removes all of it."""

import email
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from builders.domainbeds import STAND_IN, UPSTREAM
from builders.files import write_images
from domainbed_reasoning.bridge import upstream
from domainbed_reasoning.commands.verbs import FORMER_VERBS, VERBS
from domainbed_reasoning.images.catalog import STOCK

CHECKOUT = Path(__file__).resolve().parent.parent
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
    return _make_environment(tmp_path / "venv")


def _make_environment(folder):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python3*/site-packages"))
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    return folder / "bin" / "python", packages


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


def test_the_wheel_holds_every_module_the_tiny_models_the_bundled_chains_and_the_startup_files(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"_domainbed_reasoning_hook.py", "domainbed_reasoning/py.typed"}
    expected |= {"domainbed_reasoning.pth", "domainbed_reasoning.start"}
    package = CHECKOUT / "domainbed_reasoning"
    expected |= {f"domainbed_reasoning/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    for model in ("tiny_model", "tiny_creatures"):
        expected |= {f"domainbed_reasoning/mllm/{model}/{path.name}" for path in (package / "mllm" / model).iterdir()}
    bundles = package / "chains" / "bundles"
    expected |= {f"domainbed_reasoning/chains/bundles/{path.name}" for path in bundles.iterdir()}
    expected |= {f"domainbed_reasoning/chains/bundles/PACS{end}" for end in (".jsonl.xz", ".jsonl.xz.sha256", ".md")}
    expected |= {f"domainbed_reasoning/annotate/{path.name}" for path in (package / "annotate").glob("browse.*")}
    expected |= {
        f"domainbed_reasoning/results/report/{path.name}" for path in (package / "results" / "report").glob("page.*")
    }
    for folder in IN_THE_PACKAGE:
        files = [path for end in ("py", "json") for path in (CHECKOUT / folder).rglob(f"*.{end}")]
        expected |= {f"domainbed_reasoning/{path.relative_to(CHECKOUT).as_posix()}" for path in files}
    assert held == expected


def test_the_metadata_names_the_license_the_python_versions_and_what_is_optional(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Author"], metadata["License-Expression"]) == ("the domainbed-reasoning developers", "MIT")
    required = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert any(text.startswith("bitsandbytes") for text in required)
    of_domainbed = {text.split(";")[0] for text in metadata.get_all("Requires-Dist") if 'extra == "domainbed"' in text}
    assert of_domainbed == {"backpack-for-pytorch", "gdown", "imageio", "parameterized", "timm", "wilds"}
    assert not of_domainbed & set(required)
    versions = {text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") if "Python :: 3." in text}
    assert versions == {"3.11", "3.12", "3.13", "3.14"}
    assert {url.partition(", ")[0] for url in metadata.get_all("Project-URL")} == {"Paper", "DomainBed"}


def test_an_installed_package_is_in_stock_sweeps_and_leaves_nothing_behind(wheel, environment, tmp_path):
    python, packages = environment
    before = _names(packages)
    _pip("install", "--no-deps", wheel, python=python)
    printed = _dummy_sweep(python, tmp_path)
    assert printed.count("--algorithm RDMLDG --data_dir") == 4
    _pip("uninstall", "--yes", "domainbed-reasoning", python=python)
    assert _names(packages) == before


def test_the_start_file_installs_the_hook_where_import_lines_of_pth_files_are_ignored(wheel, environment, tmp_path):
    """What `site` does with a `.start` file since Python 3.15 (PEP 829), twice, as it may in a virtual environment."""
    python, packages = environment
    _pip("install", "--no-deps", wheel, python=python)
    (packages / "domainbed_reasoning.pth").unlink()
    code = """
import pkgutil, sys
for line in 2 * open(sys.argv[1]).read().splitlines():
    pkgutil.resolve_name(line)()
import _domainbed_reasoning_hook as hook
print(sum(isinstance(finder, hook._RegistryFinder) for finder in sys.meta_path))
from domainbed import algorithms
print("RDMLDG" in algorithms.ALGORITHMS)
"""
    variables = {**os.environ, "PYTHONPATH": str(STAND_IN)}
    command = [python, "-c", code, packages / "domainbed_reasoning.start"]
    assert subprocess.check_output(command, cwd=tmp_path, env=variables, text=True).split() == ["1", "True"]


def test_an_editable_install_is_in_stock_sweeps_and_leaves_nothing_behind(checkout, environment, tmp_path):
    python, packages = environment
    before = _names(packages)
    _pip("install", "--no-deps", "--no-build-isolation", "--editable", checkout, python=python)
    assert _dummy_sweep(python, tmp_path).count("--algorithm RDMLDG --data_dir") == 4
    where = [python, "-c", "import domainbed_reasoning as d; print(d.__file__)"]
    assert subprocess.check_output(where, cwd=tmp_path, text=True).startswith(str(checkout))
    _pip("uninstall", "--yes", "domainbed-reasoning", python=python)
    assert _names(packages) == before


@pytest.fixture(scope="module")
def in_a_clone(wheel, tmp_path_factory):
    """``in_a_clone(verb, …)`` runs a verb of an installed wheel in a clone of DomainBed, by its console script.

    ``in_a_clone.python("-m", …)`` runs the environment's Python there. The user's home and cache are empty. Any other
    DomainBed that could be taken, on PYTHONPATH or in the cache, ends whatever imports it.
    """
    folder = tmp_path_factory.mktemp("user")
    python, packages = _make_environment(folder / "venv")
    _pip("install", "--no-deps", wheel, python=python)
    clone = folder / "clone"
    shutil.copytree((UPSTREAM or STAND_IN) / "domainbed", clone / "domainbed")
    other = folder / "other" / "domainbed" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise SystemExit('another DomainBed was imported')\n")
    home = folder / "home"
    home.mkdir()

    def run_python(*words, cwd=clone, code=0, **variables):
        settings = {"PYTHONPATH": str(other.parent.parent), "HOME": str(home), "OMP_NUM_THREADS": "1"}
        settings |= {f"XDG_{kind}_HOME": str(home / f".{kind.lower()}") for kind in ("CACHE", "CONFIG")}
        settings |= {upstream.VARIABLE: str(other.parent.parent), "DOMAINBED_REASONING_DATASETS": "", **variables}
        command = list(map(str, [python, *words]))
        done = subprocess.run(command, cwd=cwd, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def run(*words, **options):
        return run_python(python.parent / "domainbed-reasoning", *words, **options)

    run.python, run.clone, run.home, run.packages = run_python, clone, home, packages
    return run


@pytest.fixture(scope="module")
def sweep(in_a_clone, tmp_path_factory):
    """A sweep's folder with two jobs of the stock scripts: RDMLDG by train, ERM by sweep and our launcher."""
    folder = tmp_path_factory.mktemp("sweep")
    few = {
        "max_new_tokens": 32,
        "batch_size": 2,
        "sarr_rounds": 1,
        "mtct_epochs": 1,
        "sarr_epochs": 1,
        "eval_batch": 64,
    }
    job = folder / ("0a" * 16)  # as the stock sweep names them
    words = ["--data_dir", folder, "--dataset", "ShapesReasoning", "--algorithm", "RDMLDG", "--test_envs", 3]
    words += ["--steps", 3, "--hparams", json.dumps(few), "--output_dir", job]
    printed = in_a_clone.python("-m", "domainbed.scripts.train", *words)
    assert "RDMLDG: SARR round 1 (steps 2-2) of 3 steps" in printed
    versions = json.loads((job / "versions.json").read_text())
    assert versions["libraries"]["torch"] and (job / "done").exists()

    words = ["--algorithms", "ERM", "--datasets", "ShapesReasoning", "--n_hparams", 1, "--n_trials", 1, "--steps", 2]
    words += ["--single_test_envs", "--skip_confirmation", "--command_launcher", "parallel"]
    words += ["--data_dir", folder, "--output_dir", folder]
    printed = in_a_clone.python("-m", "domainbed.scripts.sweep", "launch", *words, DOMAINBED_REASONING_TARGETS="3")
    assert "1/1 jobs succeeded." in printed
    return folder, job


@pytest.fixture
def data(in_a_clone, tmp_path):
    """A data_dir with the user's own dataset Toy."""
    definition = in_a_clone.home / ".config" / "domainbed-reasoning" / "datasets" / "toy.toml"
    definition.parent.mkdir(parents=True, exist_ok=True)
    definition.write_text('name = "Toy"\nfolder = "toy"\nenvironments = ["A", "P"]\nsubject = "thing"\n')
    write_images(tmp_path / "data" / "toy", ("art", "photo"), ("Alarm_Clock", "Bike", "Mug"), 2)
    return tmp_path / "data"


@pytest.fixture
def teacher():
    """The URL of an OpenAI-compatible server."""
    command = [sys.executable, CHECKOUT / "tests" / "annotate" / "teacher_server.py"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as server:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        server.kill()


@pytest.mark.slow
def test_every_verb_runs_from_the_wheel_in_the_clone_that_is_the_working_directory(
    in_a_clone, sweep, data, teacher, tmp_path
):
    """Verbs, former names of verbs and the processes that they start take one DomainBed, which doctor names."""
    folder, job = sweep
    image = data / "toy" / "photo" / "Mug" / "0.png"
    toy = ("--dataset", "Toy", "--data-dir", data)
    shapes = ("--dataset", "ShapesReasoning", "--encoder", "tiny", "--images", 4)
    unfetched = not UPSTREAM or upstream.commit_of(UPSTREAM) != upstream.COMMIT
    fetched = "git could not get" if unfetched else f"DomainBed at commit {upstream.COMMIT} is in "
    no_shtab = importlib.util.find_spec("shtab") is None
    pacs = tmp_path / "pacs"
    for domain, label in itertools.product(STOCK["PACS"].domains, STOCK["PACS"].classes):
        (pacs / domain / label).mkdir(parents=True)
        (pacs / domain / label / "0.png").write_bytes(image.read_bytes())
    runs = [  # (words, what is printed), and the exit code where it is not 0
        (("doctor",), f" {in_a_clone.clone} ("),
        (("get-domainbed", "--from", UPSTREAM or tmp_path), fetched, int(unfetched)),
        (("completion", "bash"), "shtab", int(no_shtab)),
        (("plan", "--dataset", "PACS", "--model", "tiny"), "a job "),
        (("annotate", *toy, "--teacher", "openai:m", "--base-url", teacher, "--unverified"), "images got a chain"),
        (("check", *toy), "No problems."),
        (("stats", *toy), "words of accepted chains"),
        (("card", *toy, "--output", tmp_path / "card.md"), "card.md"),
        (("browse", *toy, "--output", tmp_path / "page.html"), "page.html"),
        (("export", tmp_path / "toy.json", "--format", "llava", *toy), "chains to "),
        (("import", tmp_path / "toy.json", *toy, "--chains", tmp_path / "again.jsonl", "--unverified"), "accepted"),
        (("predict", "--job", job, "--answer", "both", image), f"{image}\t"),
        (("export", "--job", job, "--output", tmp_path / "adapter"), "Wrote the adapters to "),
        (("predict", "--job", tmp_path / "adapter", "--answer", "label", image), f"{image}\t"),
        (("push", tmp_path / "adapter", "me/adapter", "--dry-run"), "nothing was uploaded"),
        (("pull", "me/adapter", "--output", tmp_path / "pulled"), "Check the connection to http://127.0.0.1:9", 1),
        (("get-data", "PACS", "--from", pacs, "--data-dir", tmp_path / "got", "--any-counts"), "PACS"),
        (("analyze", "divergence", *shapes, "--output", tmp_path / "analysis"), "divergence_"),
        (("analyse", "sarr-rounds", job), "sarr_rounds_"),
        (("collect", folder), "| ERM |"),
        (("report", folder), "report.html"),
        (("jobs",), "0 interrupted jobs"),
        (("unfinished",), "0 interrupted jobs"),
        (("study", "ablation", "--scale", "mini", "--launch", "--launcher", "dummy",
          "--output-dir", tmp_path / "study"), "\n0/28 jobs completed.", 1),
    ]  # fmt: skip
    assert {words[0] for words, *_ in runs} == VERBS.keys() | FORMER_VERBS.keys()
    printed, variables = {}, {"OPENAI_API_KEY": "none", "HF_ENDPOINT": "http://127.0.0.1:9"}
    for words, expected, *code in runs:
        cache = {upstream.VARIABLE: str(tmp_path / "fetched")} if words[0] == "get-domainbed" else {}
        printed[words[:2]] = in_a_clone(*words, code=code[0] if code else 0, **variables, **cache)
        assert expected in printed[words[:2]], (words, printed[words[:2]])
    assert f"({in_a_clone.packages / 'domainbed_reasoning'})" in printed["doctor",]
    assert printed["study", "ablation"].count("Dummy launcher: ") == 28
    assert re.search(r"\| RDMLDG \|.*\d\d?\.\d \|", printed["collect", folder]), printed["collect", folder]


def test_missing_clone_is_reported_and_no_stand_in_is_used(in_a_clone, tmp_path):
    nowhere = {"cwd": tmp_path, "PYTHONPATH": "", upstream.VARIABLE: "", "code": 1}
    assert "DomainBed not found" in in_a_clone("doctor", **nowhere)
    study = ("study", "ablation", "--scale", "mini", "--launch", "--output_dir", tmp_path / "study")
    for words in (("collect", tmp_path), ("plan", "--dataset", "PACS", "--model", "tiny"), study):
        assert "DomainBed was not found. Run from inside your own clone" in in_a_clone(*words, **nowhere)


def test_sdist_contains_everything_needed_for_its_tests(checkout, tmp_path):
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
