"""Shared fixtures: the DomainBed under test, stock commands as processes, and the real images.

Upstream is used where it is found (an importable one, ``$DOMAINBED_REASONING_DOMAINBED``, or the clone of
`domainbed-reasoning get-domainbed`), the stand-in of this folder always: tests that take `domainbed_root` run on both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CHECKOUT = Path(__file__).resolve().parent.parent
LONGEST = {"test_resume", "test_packaging", "test_end_to_end", "test_plugins"}

# Neither a deadline per example nor a check of how long examples take to draw: both fail on a busy machine.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("tests")

if str(CHECKOUT) not in sys.path:
    sys.path.append(str(CHECKOUT))  # where the package is not installed

from builders import processes  # noqa: E402
from builders.domainbeds import NO_UPSTREAM, STAND_IN, UPSTREAM  # noqa: E402

# In this process `domainbed` is upstream where it is found, else the stand-in.
sys.path.insert(0, str(UPSTREAM or STAND_IN))
import _domainbed_reasoning_hook  # noqa: E402, F401 - installs the hook where no `.pth` file did


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of tests/cuda, which ``-m cuda`` runs: others compare float32 of the CPU."""
    if config.option.markexpr.strip() != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_report_header() -> str:
    """Say which DomainBed the tests run on."""
    return f"DomainBed: the stand-in{f' and upstream at {UPSTREAM}' if UPSTREAM else f' only ({NO_UPSTREAM})'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs upstream DomainBed, Ray, Slurm or a GPU, by its fixtures and its folder; skip the last.

    The longest files come first, so that no worker is left alone with one at the end.
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        on_either = {parameters.get("domainbed_root"), parameters.get("implementation")}
        if "upstream" in on_either or "upstream_root" in item.fixturenames:
            item.add_marker("upstream")
        if "launchers" in item.path.parts:
            item.add_marker("launchers")
        if item.path.parent == CHECKOUT / "tests" / "cuda":
            item.add_marker("cuda")
            if (reason := _without_cuda()) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def _without_cuda() -> str | None:
    """Return why tests on a GPU cannot run; None where they can."""
    import torch

    if torch.cuda.is_available():
        return None
    built = "no CUDA device, or hidden without -m cuda"
    return built if torch.version.cuda else f"PyTorch {torch.__version__} is built without CUDA"


@pytest.fixture(params=["standin", "upstream"])
def domainbed_root(request: pytest.FixtureRequest) -> Path:
    """The folder to put on PYTHONPATH: the stand-in's, then upstream's."""
    if request.param == "standin":
        return STAND_IN
    if UPSTREAM is None:
        pytest.skip(NO_UPSTREAM)
    return UPSTREAM


@pytest.fixture
def either_domainbed() -> Path:
    """Upstream's folder where it is found, else the stand-in's: for what takes long and compares a job with itself."""
    return UPSTREAM or STAND_IN


@pytest.fixture
def upstream_root() -> Path:
    """The folder of the upstream clone, for what the stand-in has not."""
    if UPSTREAM is None:
        pytest.skip(NO_UPSTREAM)
    return UPSTREAM


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of the real images and chains that are too large for the checkout."""
    chosen = os.environ.get("DOMAINBED_REASONING_TEST_DATA")
    folder = Path(chosen) if chosen else CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; DOMAINBED_REASONING_TEST_DATA names another folder")
    return folder


def _run_stock(root, module, *args, cwd, env=None, timeout=3600, check=True):
    """Run ``python -m domainbed.scripts.<module>`` of the DomainBed in ``root``.

    Our package comes as it is installed; where it is not, a `sitecustomize` stands for the `.pth` file.
    """
    variables = _stock_environment(root) | (env or {})
    command = [sys.executable, "-m", f"domainbed.scripts.{module}", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def _stock_environment(root):
    path = [str(root)]
    if not _hook_starts_by_itself():
        path += [str(CHECKOUT / "tests" / "without_pth"), str(CHECKOUT)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


_installed: list[bool] = []


def _hook_starts_by_itself() -> bool:
    """Whether a fresh interpreter has the hook: whether the package is installed."""
    if not _installed:
        probe = "import sys; print('_domainbed_reasoning_hook' in sys.modules)"
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run([sys.executable, "-c", probe], env=variables, capture_output=True, text=True, check=True)
        _installed.append(done.stdout.strip() == "True")
    return _installed[0]


@pytest.fixture(scope="session")
def run_stock():
    """``run_stock(root, "train", "--dataset", …, cwd=…)`` runs a stock command in a process of its own."""
    return _run_stock


@pytest.fixture(scope="session")
def stock_environment():
    """``stock_environment(root)`` is the environment of a stock command that takes the DomainBed in ``root``."""
    return _stock_environment


@pytest.fixture
def verb(capfd: pytest.CaptureFixture[str]):
    """``verb("check", …)`` runs a verb in this process and returns exit code, standard output and error."""
    from domainbed_reasoning.__main__ import main

    def run(*arguments):
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # wrong usage, or help
            code = ended.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def start_verb():
    """``start_verb("annotate", …, OPENAI_API_KEY="…")`` starts a verb as a process."""
    return processes.start_verb
