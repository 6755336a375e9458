"""One job on several ranks of torchrun: real processes, gloo on the CPU, an unmodified DomainBed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
import torch

from builders.domainbeds import STAND_IN, UPSTREAM
from builders.processes import is_running, wait_until

DOMAINBED = UPSTREAM or STAND_IN
TRAIN = "domainbed.scripts.train"
STEPS = 4
HPARAMS = {
    "max_new_tokens": 64,
    "batch_size": 2,
    "micro_batch": 2,
    "mtct_epochs": 1,
    "sarr_rounds": 1,
    "sarr_epochs": 1,
    "lora_dropout": 0.0,
    "lr": 2e-4,
    "first_evaluation": STEPS,
    "both_answers": False,
}
MEASURED = {"step_time", "mem_gb", "args"}


@pytest.fixture(scope="module")
def torchrun(stock_environment):
    """``torchrun(folder, world, …)`` starts a job; with a ``command``, that in place of the train script."""
    agents = []

    def start(folder, world, *more, algorithm="RDMLDG", command=(), hparams=HPARAMS, before=(), nodes=()):
        arguments = ["--dataset", "ShapesReasoning", "--algorithm", algorithm, "--test_envs", "2", "--steps", STEPS]
        arguments += ["--data_dir", folder.parent, "--output_dir", folder, "--hparams", json.dumps(hparams), *more]
        launch = ["-m", "torch.distributed.run", *(nodes or ["--standalone"]), "--nproc-per-node", world, *before]
        words = [sys.executable, *(launch if nodes or world > 1 else ()), *(command or ("-m", TRAIN)), *arguments]
        variables = stock_environment(DOMAINBED) | {"XDG_CACHE_HOME": str(folder.parent / "cache")}
        pipe = subprocess.PIPE
        agent = subprocess.Popen(
            list(map(str, words)), cwd=DOMAINBED, env=variables, stdout=pipe, stderr=pipe, text=True
        )
        agents.append(agent)
        return agent

    yield start
    for agent in agents:
        if agent.poll() is None:
            agent.kill()


@pytest.fixture(scope="module")
def jobs(torchrun, tmp_path_factory):
    """``jobs(world, hparams)`` is the folder of an undisturbed job on that many ranks."""
    folder, done = tmp_path_factory.mktemp("jobs"), {}

    def job(world, hparams=HPARAMS):
        key = (world, json.dumps(hparams))
        if key not in done:
            done[key] = folder / f"job{len(done)}"
            finish(torchrun(done[key], world, hparams=hparams))
        return done[key]

    return job


def finish(agent):
    """Wait for a job that must succeed, and return what it printed."""
    out, err = agent.communicate(timeout=3600)
    assert agent.returncode == 0, err[-3000:]
    return out


def records_of(folder):
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


def rows_of(folder):
    return (folder / "predictions.jsonl").read_text(encoding="utf-8")


def adapters_of(folder):
    return torch.load(folder / "model.pkl", weights_only=True)["model_dict"]


def progress_of(folder):
    """Return the lines that jobs of this folder's cache have logged."""
    logs = (folder.parent / "cache").glob("*/unfinished/*/log.jsonl")
    return [line for log in logs for line in log.read_text().splitlines()]


def processes_of(agent, world):
    """Return the ranks' processes once they have started, by rank."""
    found = {}

    def started():
        for child in psutil.Process(agent.pid).children():
            variables = child.environ() if TRAIN in child.cmdline() else {}
            if "RANK" in variables:  # not between fork and exec
                found[int(variables["RANK"])] = child
        return len(found) == world

    wait_until(started)
    return [found[rank] for rank in range(world)]


def check_like_one_process(one, several):
    for record, expected in zip(records_of(several), records_of(one), strict=True):
        assert record.pop("hparams") == expected.pop("hparams")
        assert record == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert rows_of(several) == rows_of(one)
    # Single weights may differ by a step of Adam, where a gradient is rounding noise.
    weights = [torch.cat([weight.flatten() for weight in adapters_of(job).values()]) for job in (one, several)]
    assert (weights[0] - weights[1]).norm() <= 1e-4 * weights[0].norm()
    assert sorted(os.listdir(several)) == sorted(os.listdir(one))
    lines = (several / "out.txt").read_text().splitlines()
    assert sum(line.startswith("Args:") for line in lines) == 1
    assert not progress_of(several)
    assert json.loads((several / "versions.json").read_text())["ranks"] > 1
    assert "ranks" not in json.loads((one / "versions.json").read_text())


def test_two_ranks_give_the_records_and_chains_of_one_process(jobs):
    """To 1e-6; ranks above 0 write nothing into the job's folder."""
    check_like_one_process(jobs(1), jobs(2))


@pytest.mark.slow
def test_four_ranks_give_the_records_and_chains_of_one_process(jobs):
    """With everything that ranks share: balanced gradients, a filter by likelihood, class scores."""
    more = {"micro_batch": 1, "gradient_balance": "norm", "sarr_filter": "consistent", "both_answers": True}
    check_like_one_process(jobs(1, HPARAMS | more), jobs(4, HPARAMS | more))


def refused(agent):
    """Wait for a job that must fail on all ranks, and return what they printed, without torchrun's own report."""
    out, err = agent.communicate(timeout=3600)
    assert agent.returncode
    return out + err.partition("torch/distributed/elastic/multiprocessing/api.py")[0]


def test_baseline_is_refused_by_one_rank(torchrun, tmp_path):
    printed = refused(torchrun(tmp_path / "job", 2, algorithm="ERM", hparams={}))
    assert printed.count("ERM runs on one GPU: 2 ranks would train 2 separate models") == 1
    assert printed.count("Traceback") == 1


@pytest.mark.slow
def test_ranks_with_other_arguments_are_refused_by_one_rank(torchrun, tmp_path):
    own = ["bash", "-c", f'exec {sys.executable} -m {TRAIN} "$@" --seed $RANK', "bash"]
    printed = refused(torchrun(tmp_path / "job", 2, command=own, before=["--no-python"]))
    assert printed.count("rank 1 has other arguments than rank 0: --seed 1 instead of --seed 0") == 1
    assert "Traceback" not in printed and not (tmp_path / "job").exists()


@pytest.mark.slow
def test_ranks_with_other_versions_are_refused_by_one_rank(torchrun, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(DOMAINBED / "domainbed", other / "domainbed")
    with (other / "domainbed" / "networks.py").open("a") as file:
        file.write("# changed\n")
    choose = f"test $RANK = 1 && cd {other} && export PYTHONPATH={other}:$PYTHONPATH"
    own = ["bash", "-c", f'{choose}; exec {sys.executable} -m {TRAIN} "$@"', "bash"]
    printed = refused(torchrun(tmp_path / "job", 2, command=own, before=["--no-python"]))
    assert printed.count("rank 1 has other versions than rank 0: source files of DomainBed") == 1


@pytest.mark.slow
def test_more_ranks_than_micro_batches_are_refused_by_one_rank(torchrun, tmp_path):
    printed = refused(torchrun(tmp_path / "job", 4))
    assert printed.count("4 ranks, but an update on 6 images in micro-batches of up to 2 has only 3") == 1


@pytest.mark.slow
def test_folder_of_another_job_is_refused_by_one_rank(torchrun, jobs, tmp_path):
    shutil.copytree(jobs(1), tmp_path / "job")
    before = (tmp_path / "job" / "results.jsonl").read_bytes()
    printed = refused(torchrun(tmp_path / "job", 2, "--trial_seed", "1"))
    assert printed.count("contains records of another job (--data_dir") == 1
    assert (tmp_path / "job" / "results.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "moment"), [(0, "values"), (1, "ahead"), ("agent", "values"), ("agent", "ahead")])
def test_killed_job_resumes_and_ends_as_if_uninterrupted(torchrun, jobs, tmp_path, victim, moment):
    """Killed after the second step, whose state is not the last one saved, or in the middle of an evaluation."""
    folder, events = tmp_path / "job", {"values": 2, "ahead": 50}[moment]
    agent = torchrun(folder, 2)
    ranks = processes_of(agent, 2)
    wait_until(lambda: sum(line.startswith(f'{{"{moment}"') for line in progress_of(folder)) >= events)
    os.kill(agent.pid if victim == "agent" else ranks[victim].pid, signal.SIGKILL)
    printed = refused(agent)
    wait_until(lambda: not any(is_running(rank.pid) for rank in ranks))
    assert printed.count("Another rank of this job has ended") <= 1 and "Traceback" not in printed
    printed = finish(torchrun(folder, 2))
    assert printed.count("Resuming after") == 1
    assert records_of(folder) == records_of(jobs(2)) and rows_of(folder) == rows_of(jobs(2))
    for name, weight in adapters_of(jobs(2)).items():
        assert torch.equal(adapters_of(folder)[name], weight), name


@pytest.mark.slow
def test_torchrun_restarts_a_job_whose_rank_was_killed(torchrun, jobs, tmp_path):
    agent = torchrun(tmp_path / "job", 2, before=["--max-restarts", "1"])
    ranks = processes_of(agent, 2)
    wait_until(lambda: sum(line.startswith('{"values"') for line in progress_of(tmp_path / "job")) >= 2)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert finish(agent).count("Resuming after") == 1
    assert records_of(tmp_path / "job") == records_of(jobs(2)) and rows_of(tmp_path / "job") == rows_of(jobs(2))


@pytest.mark.slow
def test_two_nodes_give_what_two_ranks_of_one_node_give(torchrun, jobs, tmp_path):
    """Two torchruns that meet at a port, as `srun torchrun` starts them; both are told the same folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", meeting]
    agents = [torchrun(tmp_path / "job", 1, nodes=[*nodes, "--local-addr", "127.0.0.1"]) for _ in range(2)]
    printed = [finish(agent) for agent in agents]
    assert sum("2 ranks share the updates" in each for each in printed) == 1
    assert records_of(tmp_path / "job") == records_of(jobs(2)) and rows_of(tmp_path / "job") == rows_of(jobs(2))
