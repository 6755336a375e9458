"""Shared by the launchers' tests: jobs that are scripts and write records as the stock train script does."""

import json
import os
import shlex
import textwrap
from pathlib import Path

import pytest

from builders.processes import environment, is_running, wait_until
from domainbed_reasoning.sweeps.launchers import jobs

# `record(step)` appends as train.py does; `attempt()` counts the attempts; `wait_for(name)` waits for a file.
_TRAIN = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
here = folder.parent
def record(step):
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "pid": os.getpid()}) + "\\n")
def attempt():
    with open(here / f"{folder.name}.attempts", "a") as file:
        file.write(f"{os.getpid()}\\n")
    return len((here / f"{folder.name}.attempts").read_text().splitlines())
def wait_for(name):
    while not (here / name).exists(): time.sleep(0.02)
def done():
    (folder / "done").write_text("done")
"""


class Sweep:
    """Jobs in a folder: ``sweep.job(name, code)`` is what DomainBed's sweep would hand to a launcher."""

    # Its first attempt waits until it is killed.
    KILLED_ONCE = """
    number = attempt()
    record(0); record(300)
    if number == 1: wait_for("never")
    record(600)
    done()
    """

    def __init__(self, folder):
        self.folder = folder

    def job(self, name, code, target="0"):
        script = self.folder / f"{name}.py"
        script.write_text(_TRAIN + textwrap.dedent(code))
        options = f"--algorithm {name} --dataset D --output_dir {self.folder / name} --test_envs {target}"
        return f"python {script} {options}"

    def steps(self, name):
        return [json.loads(line)["step"] for line in (self.folder / name / "results.jsonl").read_text().splitlines()]

    def log(self, name):
        return (self.folder / name / jobs.LOG).read_text()

    def pids(self, name):
        """The process ids of the attempts, in their order."""
        return [int(line) for line in (self.folder / f"{name}.attempts").read_text().split()]

    def wait_for_attempt(self, name, number, seconds=1800):
        self.wait_until(lambda: len(self.pids(name)) >= number, seconds)
        return self.pids(name)[number - 1]

    wait_until = staticmethod(wait_until)
    is_running = staticmethod(is_running)

    @staticmethod
    def parent(pid):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """Without what a user may have set; every process finds this checkout."""
    for name in list(os.environ):
        if name.startswith(("DOMAINBED_REASONING_", "SLURM_", "SBATCH_", "RAY_ADDRESS")):
            if name != "DOMAINBED_REASONING_DOMAINBED":
                monkeypatch.delenv(name)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])


@pytest.fixture
def shared_job(either_domainbed, stock_environment, tmp_path, monkeypatch):
    """A real train job of one update, as DomainBed's sweep writes it, that two ranks can share: command and folder."""
    for name, value in stock_environment(either_domainbed).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hparams = {"batch_size": 2, "micro_batch": 2, "mtct_epochs": 1, "sarr_rounds": 0, "first_evaluation": 2}
    options = f"--algorithm RDMLDG --dataset ShapesReasoning --test_envs 0 --data_dir {tmp_path}"
    folder = tmp_path / "job"
    command = f"python -m domainbed.scripts.train {options} --output_dir {folder} --steps 1"
    return f"{command} --hparams {shlex.quote(json.dumps(hparams))}", folder


@pytest.fixture
def check_two_ranks():
    """``check_two_ranks(folder)`` checks that a job of two ranks has ended, with one set of records."""

    def check(folder):
        assert (folder / "done").exists()
        assert len((folder / "results.jsonl").read_text().splitlines()) == 1
        assert json.loads((folder / "versions.json").read_text())["ranks"] == 2

    return check
