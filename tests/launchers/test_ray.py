"""The Ray launcher on a real Ray of this machine, with jobs, workers and launchers killed on purpose.

pip install 'domainbed-reasoning[ray]'; make test PYTEST=tests/launchers/test_ray.py
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import pytest

# Before Ray is imported: only those who know this word may give the tests' Ray work.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'domainbed-reasoning[ray]'")

from domainbed_reasoning.sweeps import attempts, ray_launcher  # noqa: E402

LAUNCH = "import sys; from domainbed_reasoning.sweeps.ray_launcher import ray_launcher; ray_launcher(sys.argv[1:])"


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray that somebody else has started: 2 cores, and 1 GPU that it believes in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    options = [f"--port={port}", "--num-cpus=2", "--num-gpus=1", "--include-dashboard=false", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options]
    head = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = b""
    while b"will now block" not in said:
        line = head.stdout.readline()
        said += line
        if not line:
            pytest.fail(f"Ray did not start:\n{said.decode()}")
    yield f"{socket.gethostbyname(socket.gethostname())}:{port}"
    head.terminate()
    head.communicate(timeout=30)


@pytest.fixture
def joined(cluster, monkeypatch):
    """The launcher joins that Ray and takes cores alone."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    monkeypatch.setenv(ray_launcher.GPUS, "0")
    return cluster


def start_launcher(*jobs):
    return subprocess.Popen([sys.executable, "-c", LAUNCH, *jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def worker_of(sweep, train):
    """The Ray worker above a train process: its attempt and the attempt's parent stand between."""
    return sweep.parent(sweep.parent(sweep.parent(train)))


@pytest.mark.parametrize(
    ("node", "chosen", "expected", "jobs"),
    [
        ({"CPU": 16}, {}, (1, 0), 16),
        ({"CPU": 64, "GPU": 8}, {}, (8, 1), 8),
        ({"CPU": 64, "GPU": 8}, {"GPUS": "0.5"}, (4, 0.5), 16),
        ({"CPU": 4, "GPU": 8}, {}, (1, 1), 4),
        ({"CPU": 64, "GPU": 8}, {"GPUS": "0", "CPUS": "2"}, (2, 0), 32),
        ({"CPU": 2}, {"GPUS": "1"}, (1, 1), 0),
    ],
)
def test_a_jobs_share_follows_from_the_nodes_unless_it_is_chosen(monkeypatch, node, chosen, expected, jobs):
    for kind, value in chosen.items():
        monkeypatch.setenv(getattr(ray_launcher, kind), value)
    share = ray_launcher.share_of([node])
    assert (share.cpus, share.gpus) == expected
    assert share.fits(node) == jobs


@pytest.mark.parametrize(("name", "value"), [("GPUS", "half"), ("GPUS", "-1"), ("GPUS", "1.5"), ("CPUS", "nan")])
def test_a_share_that_is_none_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(getattr(ray_launcher, name), value)
    with pytest.raises(ValueError, match=getattr(ray_launcher, name)):
        ray_launcher.share_of([{"CPU": 2, "GPU": 1}])


def test_a_cluster_is_joined_queues_the_jobs_and_is_left_as_it_was(sweep, joined, monkeypatch, capsys):
    """Two jobs wait for each other, so two run at a time; the third starts when one has ended."""
    monkeypatch.setenv("WHO", "me")
    pair = "attempt(); record(0); print(os.environ['WHO'], os.environ['OMP_NUM_THREADS'], os.getcwd()); wait_for('{}')"
    both = [sweep.job("A", pair.format("B.attempts")), sweep.job("B", pair.format("A.attempts"))]
    third = sweep.job("C", "assert (here / 'A.attempts').exists(); record(0)")
    assert ray_launcher.ray_launcher([*both, third]) == []
    said = capsys.readouterr().out
    assert f"3 jobs on 1 node(s) of the Ray at {joined}, 2 at a time, 1 CPU each" in said
    assert "All 3 jobs ended well." in said
    assert f"me 1 {os.getcwd()}" in sweep.log("A")
    assert not ray.is_initialized()
    ray_launcher._check_that_it_answers(joined)  # it is still there


def test_two_jobs_share_a_gpu(sweep, joined, monkeypatch):
    monkeypatch.setenv(ray_launcher.GPUS, "0.5")
    pair = "attempt(); print('GPU', os.environ['CUDA_VISIBLE_DEVICES']); wait_for('{}.attempts')"
    assert ray_launcher.ray_launcher([sweep.job("A", pair.format("B")), sweep.job("B", pair.format("A"))]) == []
    assert "GPU 0\n" in sweep.log("A") and "GPU 0\n" in sweep.log("B")


def test_a_failed_job_is_tried_again_and_then_named_with_its_end(sweep, joined, capsys):
    bad = sweep.job("Bad", "attempt(); record(0); print('what went wrong'); sys.exit(3)", target="2")
    failures = ray_launcher.ray_launcher([bad, sweep.job("Good", "record(0)")])
    assert [(failure.job.name, failure.exit_code) for failure in failures] == [("Bad on D, target 2", 3)]
    said, shown = capsys.readouterr()
    assert "AGAIN: Bad on D, target 2 (exit code 3), attempt 2 of 2" in shown
    assert "FAILED: Bad on D, target 2 (exit code 3). The end of" in said
    assert "    what went wrong" in said
    assert said.index("1 of 2 jobs FAILED") > said.index("what went wrong")
    assert len(sweep.pids("Bad")) == 2
    assert sweep.steps("Bad") == [0]


def test_without_retries_a_job_runs_once(sweep, joined, monkeypatch):
    monkeypatch.setenv(attempts.RETRIES, "0")
    assert len(ray_launcher.ray_launcher([sweep.job("Bad", "attempt(); sys.exit(3)")])) == 1
    assert len(sweep.pids("Bad")) == 1


@pytest.mark.parametrize("victim", ["train", "worker"])
def test_a_killed_job_is_started_again_and_no_record_stands_twice(sweep, joined, victim):
    """SIGKILL to the train process, or to the Ray worker above it, whose train process must not live on."""
    launcher = start_launcher(sweep.job("A", sweep.KILLED_ONCE))
    train = sweep.wait_for_attempt("A", 1)
    sweep.wait_until(lambda: sweep.steps("A") == [0, 300])
    os.kill(train if victim == "train" else worker_of(sweep, train), signal.SIGKILL)
    said = launcher.communicate(timeout=60)[0].decode()
    assert launcher.returncode == 0
    cause = "exit code -9" if victim == "train" else "WorkerCrashedError"
    assert f"AGAIN: A on D, target 0 ({cause}" in said
    assert "All 1 jobs ended well." in said
    assert not sweep.is_running(train)
    assert sweep.steps("A") == [0, 300, 600]
    assert len(sweep.pids("A")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_launcher_is_the_end_of_its_jobs(sweep, joined, number):
    """Of the running one, and of the one in the queue; gently, or because the pipe to the worker is gone."""
    waits = "attempt(); wait_for('never')"
    launcher = start_launcher(*[sweep.job(name, waits) for name in "ABC"])
    sweep.wait_until(lambda: len(list(sweep.folder.glob("*.attempts"))) == 2)
    started = [path.name.partition(".")[0] for path in sweep.folder.glob("*.attempts")]
    trains = [sweep.wait_for_attempt(name, 1) for name in started]
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    sweep.wait_until(lambda: not any(sweep.is_running(train) for train in trains), 20)
    time.sleep(1)
    assert len(list(sweep.folder.glob("*.attempts"))) == 2


def test_without_an_address_a_ray_is_started_and_ends_with_the_launcher(sweep, cluster):
    """Though there is another one, of the other tests."""
    waits = start_launcher(sweep.job("A", "attempt(); wait_for('never')"))
    train = sweep.wait_for_attempt("A", 1)
    raylet = sweep.parent(worker_of(sweep, train))
    assert sweep.is_running(raylet)
    waits.send_signal(signal.SIGINT)
    said = waits.communicate(timeout=60)[0].decode()
    assert "1 jobs on this machine, " in said
    assert not sweep.is_running(train)
    sweep.wait_until(lambda: not sweep.is_running(raylet), 20)


def test_a_ray_that_does_not_answer_is_named_with_the_cure(sweep, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionError, match="Nothing answers at RAY_ADDRESS=127.0.0.1:1"):
        ray_launcher.ray_launcher([sweep.job("A", "")])
