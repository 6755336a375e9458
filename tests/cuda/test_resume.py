"""A stock training job on a GPU that is killed and started again ends as one that was not."""

import json
import signal
import subprocess
import sys

import pytest

from builders.processes import environment, run_python, wait_until

HPARAMS = {
    "batch_size": 2,
    "mtct_epochs": 1,
    "sarr_rounds": 1,
    "sarr_epochs": 1,
    "max_new_tokens": 64,
    "answer": "label",
    "both_answers": False,
    "dtype": "float32",
}


def command(folder, algorithm):
    hparams = json.dumps(HPARAMS) if algorithm == "RDMLDG" else "{}"
    return [
        "-m", "domainbed.scripts.train", "--dataset", "ShapesReasoning", "--algorithm", algorithm, "--test_envs", "2",
        "--data_dir", str(folder.parent), "--output_dir", str(folder), "--steps", "8", "--checkpoint_freq", "2",
        "--hparams", hparams,
    ]  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_stock_erm_trains(either_domainbed, tmp_path):
    env = environment(either_domainbed, XDG_CACHE_HOME=str(tmp_path / "cache"))
    done = run_python(*command(tmp_path / "erm", "ERM"), env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert records(tmp_path / "erm")[-1]["step"] == 7


def test_a_killed_job_ends_with_the_records_of_an_undisturbed_one(either_domainbed, tmp_path):
    """Losses to 1%: atomic additions of CUDA kernels differ from run to run."""
    found = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        env = environment(either_domainbed, XDG_CACHE_HOME=str(tmp_path / f"cache-{name}"))
        if name == "killed":
            job = subprocess.Popen([sys.executable, *command(folder, "RDMLDG")], env=env, stdout=subprocess.DEVNULL)
            wait_until(lambda folder=folder, job=job: job.poll() is not None or len(records(folder)) >= 2)
            assert job.poll() is None, "the job ended before it could be killed"
            job.send_signal(signal.SIGKILL)
            job.wait()
        done = run_python(*command(folder, "RDMLDG"), env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (folder / "done").exists()
        found[name] = records(folder)
    whole, killed = found["whole"], found["killed"]
    assert [record["step"] for record in killed] == [record["step"] for record in whole]
    for a, b in zip(whole, killed, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
    assert whole[-1].get("mem_gb") is not None
