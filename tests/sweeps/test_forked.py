"""The forking launcher: equal to one process per job, failures reported, unsupported settings rejected."""

import json
from pathlib import Path

import pytest

from builders.files import read_lines
from builders.processes import environment, run_python
from domainbed_reasoning.sweeps.launchers import forked
from domainbed_reasoning.sweeps.launchers.jobs import LOG, parse_job

CHECKOUT = Path(__file__).resolve().parents[2]
HPARAMS = {"target_per_class": 1, "first_evaluation": 4, "answer": "label", "both_answers": False, "batch_size": 2}


def command(folder, algorithm="RDMLDG"):
    return (
        f"python -m domainbed.scripts.train --algorithm {algorithm} --dataset ShapesReasoning --data_dir none "
        f"--test_envs 1 --steps 4 --checkpoint_freq 4 --trial_seed 3 --seed 5 --hparams '{json.dumps(HPARAMS)}' "
        f"--output_dir {folder}"
    )


def records(folder):
    """The job's records without what a clock or a path says."""
    lines = read_lines(folder / "results.jsonl")
    return [{key: value for key, value in line.items() if key not in ("step_time", "args")} for line in lines]


def test_a_forked_job_gives_the_results_of_a_process_and_a_failure_is_named(tmp_path, run_stock, domainbed_root):
    """RD-MLDG through all of its stages, and an algorithm that is not there."""
    if "standin" not in str(domainbed_root):
        pytest.skip("once is enough: what is compared is one DomainBed with itself")
    run_stock(domainbed_root, "train", *forked.train_arguments(parse_job(command(tmp_path / "process"))), cwd=tmp_path)
    commands = [command(tmp_path / "fork"), command(tmp_path / "bad", "MTCTT")]
    (tmp_path / "launch.py").write_text(
        "import sys, _domainbed_reasoning_hook;"
        "from domainbed_reasoning.sweeps.launchers.forked import forked_launcher;"
        f"sys.exit(10 * len(forked_launcher({commands!r})))"
    )
    variables = {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run_python("launch.py", cwd=tmp_path, env=environment(domainbed_root, **variables))
    assert done.returncode == 10, done.stderr
    assert "FAILED: MTCTT on ShapesReasoning, target 1" in done.stdout
    assert "MTCTT" in (tmp_path / "bad" / LOG).read_text()
    assert records(tmp_path / "fork") == records(tmp_path / "process")
    assert [record["step"] for record in records(tmp_path / "fork")] == [0, 3]
    assert list((tmp_path / "cache" / "domainbed-reasoning" / "unfinished").iterdir()) == []


def test_another_command_than_the_train_script_is_refused():
    with pytest.raises(ValueError, match="only runs `python -m domainbed.scripts.train`"):
        forked.train_arguments(parse_job("python other.py --algorithm ERM"))


def test_machine_with_a_gpu_is_rejected_with_a_fix(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--command_launcher parallel"):
        forked.forked_launcher([])


def test_the_launcher_is_in_domainbeds_registry():
    from domainbed import command_launchers

    assert command_launchers.REGISTRY["forked"] is forked.forked_launcher


def test_jobs_know_the_code_that_their_launcher_imported(monkeypatch, tmp_path):
    """A checkout's files may change while jobs wait: forks run what is in memory, and their keys have to say so."""
    import torch

    from domainbed_reasoning.bridge import versions

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    versions.source_digests.cache_clear()
    assert forked.forked_launcher([]) == []
    assert versions.source_digests.cache_info().currsize == 1
