"""Launchers start jobs on several GPUs by torchrun; baselines and jobs of one GPU as before."""

import json
import os
import shlex
import sys

import pytest

from domainbed_reasoning.sweeps.launchers import jobs, parallel, torchrun

TRAIN = "python -m domainbed.scripts.train --algorithm {} --dataset ShapesReasoning --output_dir {} --test_envs 2"


def job_of(algorithm, folder="a folder"):
    return jobs.parse_job(TRAIN.format(algorithm, shlex.quote(str(folder))))


def test_a_job_on_several_gpus_is_started_by_torchrun():
    job = torchrun.on_gpus(job_of("RDMLDG"), 4)
    assert job.command == (
        "python -m torch.distributed.run --standalone --nproc-per-node 4 -m domainbed.scripts.train --algorithm RDMLDG "
        "--dataset ShapesReasoning --output_dir 'a folder' --test_envs 2"
    )
    assert job.name == job_of("RDMLDG").name and job.folder == job_of("RDMLDG").folder
    again = jobs.parse_job(job.command)  # as Slurm's jobs do
    assert again.folder == job.folder and again.name == job.name and torchrun.gpus_of(again) == 4


@pytest.mark.parametrize("algorithm", ["ERM", "CLIPLoRA", "Unknown"])
def test_algorithms_that_run_on_one_gpu_are_started_as_before(algorithm):
    assert torchrun.on_gpus(job_of(algorithm), 4) == job_of(algorithm)
    assert torchrun.gpus_of(job_of(algorithm)) == 1


def test_one_gpu_needs_no_torchrun():
    assert torchrun.on_gpus(job_of("RDMLDG"), 1) == job_of("RDMLDG")


def test_on_several_nodes_srun_starts_torchrun_once_on_each(monkeypatch):
    job = torchrun.on_gpus(job_of("RDMLDG"), 4, nodes=2)
    words = shlex.split(job.command)
    assert words[:5] == ["srun", "--overlap", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert words[5:12] == [sys.executable, *"-m torch.distributed.run --nnodes 2 --nproc-per-node 4".split()]
    assert words[12:16] == ["--rdzv-backend", "c10d", "--rdzv-id", "$SLURM_JOB_ID"]
    assert words[18:20] == ["-m", "domainbed.scripts.train"]
    again = jobs.parse_job(job.command)
    assert again.folder == job.folder and again.name == job.name and torchrun.gpus_of(again) == 4


def test_ranks_of_several_nodes_meet_at_the_first_node(tmp_path, monkeypatch):
    """The shell of the job composes the address from what Slurm says."""
    command = torchrun.torchrun_command("python -m domainbed.scripts.train --seed 1", 2, nodes=2)
    for name, prints in (
        ("scontrol", 'test "$*" = "show hostnames n[1-2]" && printf "n1\\nn2\\n"'),
        ("srun", 'echo "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{prints}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "20017")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    printed = os.popen(command).read()
    assert "--rdzv-id 20017 --rdzv-endpoint n1:20017 -m domainbed.scripts.train --seed 1" in printed


def test_another_command_is_refused():
    with pytest.raises(ValueError, match="^Only `python -m domainbed.scripts.train` runs on several GPUs; got 'ls'"):
        torchrun.torchrun_command("ls", 2)


def test_nodes_of_slurm_run_one_attempt_on_the_first(monkeypatch):
    from domainbed_reasoning.sweeps.launchers import slurm

    parameters = slurm.sbatch_parameters("--gres=gpu:4 --nodes=2 --cpus-per-task=8")
    assert parameters["nodes"] == 2 and "nodes" not in parameters["additional_parameters"]
    assert parameters["srun_args"] == ["--cpus-per-task=8", "--nodes=1", "--ntasks=1"]
    with pytest.raises(ValueError, match="--nodes must be a number of nodes; got two"):
        slurm.sbatch_parameters("--nodes=two")


@pytest.mark.slow
def test_the_parallel_launcher_runs_a_job_on_two_ranks(
    either_domainbed, tmp_path, monkeypatch, stock_environment, capfd
):
    """Two GPUs that do not exist: the ranks find none and run on the CPU."""
    for name, value in stock_environment(either_domainbed).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv(torchrun.GPUS, "2")
    hparams = {"batch_size": 2, "micro_batch": 2, "mtct_epochs": 1, "sarr_rounds": 0, "first_evaluation": 2}
    command = TRAIN.format("RDMLDG", tmp_path / "job") + f" --steps 1 --hparams {shlex.quote(json.dumps(hparams))}"
    assert parallel.parallel_launcher([command]) == []
    assert (tmp_path / "job" / "done").exists()
    assert len((tmp_path / "job" / "results.jsonl").read_text().splitlines()) == 1
