"""Ranks that do not fit together; whole jobs on several ranks are in tests/jobs/test_ranks.py."""

import argparse
import json

import pytest

from builders.processes import as_train_script
from domainbed_reasoning.bridge import torchrun
from domainbed_reasoning.method.ranks import Ranks


def rank_with(*arguments, problem="", **versions):
    return {"arguments": list(arguments), "versions": {"torch": "2.14", "device": "CPU"} | versions, "problem": problem}


def test_equal_ranks_fit_together():
    assert torchrun._problem([rank_with("--steps", "3")] * 3) == ""


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (["--steps", "3"], ["--steps", "4"], "--steps 4 instead of --steps 3."),
        (["--steps", "3"], ["--steps", "3", "--seed", "1"], "--seed 1 instead of nothing more."),
        (["--seed", "1"], [], "nothing more instead of --seed 1."),
        (["--hparams", "x" * 200], ["--hparams", "y"], f"--hparams y instead of --hparams {'x' * 110}…."),
    ],
)
def test_other_arguments_are_named(first, other, message):
    problem = torchrun._problem([rank_with(*first), rank_with(*first), rank_with(*other)])
    assert problem == f"rank 2 has other arguments than rank 0: {message} Start all ranks with the same command."


def test_other_versions_are_named():
    assert torchrun._problem([rank_with(), rank_with(torch="2.8", device="GPU")]) == (
        "rank 1 has other versions than rank 0: torch 2.8 instead of 2.14, device GPU instead of CPU. Install the same "
        "on all nodes."
    )


def test_a_machine_with_fewer_gpus_than_ranks_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    problem = torchrun._problem([rank_with(), torchrun._describe_rank()])
    assert problem.endswith("which has 2 GPUs. Use --nproc-per-node 2.")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torchrun._describe_rank()["problem"] == "" and torchrun.os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(torchrun, "_ranks", Ranks(0, 2))


def test_algorithms_that_do_not_share_their_work_are_refused(two_ranks):
    for name in ("ERM", "CLIPLoRA", "CLIPZeroShot"):
        with pytest.raises(ValueError, match=f"^{name} runs on one GPU: 2 ranks would train 2 separate models"):
            torchrun.check_job(name, None)
    for name in ("RDMLDG", "MTCT", "LabelSFT", "MLLMZeroShot"):
        torchrun.check_job(name, None)


def test_folder_with_records_of_another_job_is_refused(two_ranks, tmp_path):
    args = argparse.Namespace(algorithm="MTCT", steps=3, output_dir=str(tmp_path))
    torchrun.check_job("MTCT", args)
    (tmp_path / "results.jsonl").write_text(json.dumps({"args": vars(args)}) + '\n{"args": {"cut off')
    torchrun.check_job("MTCT", args)
    args.steps = 4
    with pytest.raises(ValueError, match=r"contains records of another job \(--steps 3\). Choose another folder.$"):
        torchrun.check_job("MTCT", args)


def test_script_that_reads_its_arguments_too_early_is_refused(two_ranks, monkeypatch):
    monkeypatch.setattr(torchrun, "_output_dir", "/tmp/of-this-rank")
    with pytest.raises(ValueError, match="^This train script reads its arguments before it imports domainbed"):
        torchrun.check_job("MTCT", argparse.Namespace(output_dir="train_output"))


def test_another_script_under_torchrun_is_refused(monkeypatch):
    args = argparse.Namespace(output_dir="train_output")
    torchrun.check_job("MTCT", args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^torchrun has started several processes of this script"):
        torchrun.check_job("MTCT", args)
    torchrun.check_job("MTCT", None)  # a test, a notebook
    torchrun.check_job("ERM", args)


def test_children_of_the_train_script_join_nothing(monkeypatch):
    as_train_script(monkeypatch)
    assert torchrun._is_train_script()
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "a loader's parent")
    assert not torchrun._is_train_script()
