"""The Ray launcher on a real local Ray, with jobs, workers and launchers killed on purpose.

pip install 'domainbed-reasoning[ray]'; make test PYTEST=tests/sweeps/launchers/test_ray.py
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

# Before Ray is imported: only those who know this word may give the tests' Ray work.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_worker_niceness"] = "0"  # not 15: a busy machine would let the jobs wait for minutes
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'domainbed-reasoning[ray]'")

from domainbed_reasoning.sweeps.launchers import attempts  # noqa: E402
from domainbed_reasoning.sweeps.launchers import ray as ray_launcher  # noqa: E402

LAUNCH = "import sys; from domainbed_reasoning.sweeps.launchers.ray import ray_launcher; ray_launcher(sys.argv[1:])"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(*options):
    """A node of a Ray that somebody else starts: its process, above the raylet and all else."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block"]
    printed = b""
    for _ in range(3):  # on a machine with much else to do Ray gives itself up after 30 s
        node = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in node.stdout:
            printed += line
            if b"will now block" in line:
                break
        else:
            continue
        try:
            yield node
        finally:
            node.terminate()
            node.communicate(timeout=1800)
        return
    pytest.fail(f"Ray did not start:\n{printed.decode()}")


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray with 2 cores, and 1 GPU that it believes in."""
    port = free_port()
    with started("--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=2", "--num-gpus=1"):
        yield f"{socket.gethostbyname(socket.gethostname())}:{port}"


@pytest.fixture
def joined(cluster, monkeypatch):
    """The launcher joins that Ray and takes cores alone."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    monkeypatch.setenv(ray_launcher.GPUS, "0")
    return cluster


@pytest.fixture
def start_launcher():
    """Starts a launcher; what a failed test leaves of it would keep the cores from the next one's jobs."""
    launchers = []

    def start(*jobs):
        command = [sys.executable, "-c", LAUNCH, *jobs]
        launchers.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()


def worker_of(sweep, train):
    """The Ray worker above a train process: its attempt and the attempt's parent stand between."""
    return sweep.parent(sweep.parent(sweep.parent(train)))


def below(pid):
    """All processes below one."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [each for child in children for each in (child, *below(child))]


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


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected", "jobs"),
    [
        ([{"CPU": 64}, {"CPU": 8, "GPU": 4}], "", (2, 1), [0, 4]),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 8, "GPU": 4}], "", (2, 1), [8, 4]),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 2, "GPU": 1}], "2", (16, 2), [4, 0]),
        ([{"CPU": 0, "GPU": 1}, {"CPU": 64, "GPU": 8}], "", (8, 1), [0, 8]),
        ([{"CPU": 16}, {"CPU": 2, "GPU": 4}], "0.5", (1, 0.5), [0, 2]),
    ],
)
def test_a_share_fits_the_nodes_that_have_gpus(monkeypatch, nodes, gpus, expected, jobs):
    """8 cores and 4 GPUs: 2 cores a job. With another node's 64 cores it would be 18, which no node with GPUs has."""
    monkeypatch.setenv(ray_launcher.GPUS, gpus)
    share = ray_launcher.share_of(nodes)
    assert (share.cpus, share.gpus) == expected
    assert [share.fits(node) for node in nodes] == jobs


@pytest.mark.parametrize(("name", "value"), [("GPUS", "half"), ("GPUS", "-1"), ("GPUS", "1.5"), ("CPUS", "nan")])
def test_invalid_share_is_rejected(monkeypatch, name, value):
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
    printed = capsys.readouterr().out
    assert f"3 jobs on 1 node(s) of the cluster at {joined}, 2 at a time, 1 CPU each" in printed
    assert "3/3 jobs succeeded." in printed
    assert f"me 1 {os.getcwd()}" in sweep.log("A")
    assert not ray.is_initialized()
    ray_launcher._check_that_it_answers(joined)  # it is still there


def test_two_jobs_share_a_gpu(sweep, joined, monkeypatch):
    monkeypatch.setenv(ray_launcher.GPUS, "0.5")
    pair = "attempt(); print('GPU', os.environ['CUDA_VISIBLE_DEVICES']); wait_for('{}.attempts')"
    assert ray_launcher.ray_launcher([sweep.job("A", pair.format("B")), sweep.job("B", pair.format("A"))]) == []
    assert "GPU 0\n" in sweep.log("A") and "GPU 0\n" in sweep.log("B")


def test_failed_job_is_retried_then_reported_with_the_end_of_its_log(sweep, joined, capsys):
    bad = sweep.job("Bad", "attempt(); record(0); print('what went wrong'); sys.exit(3)", target="2")
    failures = ray_launcher.ray_launcher([bad, sweep.job("Good", "record(0)")])
    assert [(failure.job.name, failure.exit_code) for failure in failures] == [("Bad on D, target 2", 3)]
    printed, shown = capsys.readouterr()
    assert "RETRYING: Bad on D, target 2 (exit code 3), attempt 2 of 2" in shown
    assert "FAILED: Bad on D, target 2 (exit code 3). The end of" in printed
    assert "    what went wrong" in printed
    assert printed.index("1 of 2 jobs FAILED") > printed.index("what went wrong")
    assert len(sweep.pids("Bad")) == 2
    assert sweep.steps("Bad") == [0]


def test_without_retries_a_job_runs_once(sweep, joined, monkeypatch):
    monkeypatch.setenv(attempts.RETRIES, "0")
    assert len(ray_launcher.ray_launcher([sweep.job("Bad", "attempt(); sys.exit(3)")])) == 1
    assert len(sweep.pids("Bad")) == 1


@pytest.mark.parametrize("victim", ["train", "worker"])
def test_killed_job_restarts_without_duplicate_records(sweep, joined, start_launcher, victim):
    """SIGKILL to the train process, or to the Ray worker above it, whose train process must not live on."""
    launcher = start_launcher(sweep.job("A", sweep.KILLED_ONCE))
    train = sweep.wait_for_attempt("A", 1)
    sweep.wait_until(lambda: sweep.steps("A") == [0, 300])
    os.kill(train if victim == "train" else worker_of(sweep, train), signal.SIGKILL)
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert launcher.returncode == 0
    cause = "exit code -9" if victim == "train" else "WorkerCrashedError"
    assert f"RETRYING: A on D, target 0 ({cause}" in printed
    assert "1/1 jobs succeeded." in printed
    assert not sweep.is_running(train)
    assert sweep.steps("A") == [0, 300, 600]
    assert len(sweep.pids("A")) == 2
    print(printed, sweep.log("A"))


@pytest.mark.parametrize("what_dies", ["the node", "its raylet alone"])
def test_job_of_a_lost_node_reruns_on_another_without_duplicate_records(sweep, joined, start_launcher, what_dies):
    """SIGKILL to all processes of the second of two nodes, or to its raylet. That node runs one job at a time."""
    code = """
    attempt()
    record(0)
    record(300)
    while not (here / f"{folder.name}.go").exists(): time.sleep(0.05)
    record(600)
    done()
    """
    with started(f"--address={joined}", "--num-cpus=1") as second:
        launcher = start_launcher(*[sweep.job(name, code) for name in "ABC"])
        trains = {name: sweep.wait_for_attempt(name, 1) for name in "ABC"}
        sweep.wait_until(lambda: all(300 in sweep.steps(name) for name in "ABC"))
        raylets = {name: sweep.parent(worker_of(sweep, train)) for name, train in trains.items()}
        (lost,) = [name for name, raylet in raylets.items() if sweep.parent(raylet) == second.pid]
        for pid in [second.pid, *below(second.pid)] if what_dies == "the node" else [raylets[lost]]:
            os.kill(pid, signal.SIGKILL)
        others = sorted({*"ABC"} - {lost})
        for name in others:
            (sweep.folder / f"{name}.go").touch()
        sweep.wait_for_attempt(lost, 2)
        assert not sweep.is_running(trains[lost])
        (sweep.folder / f"{lost}.go").touch()
        printed = launcher.communicate(timeout=1800)[0].decode()
    assert f"3 jobs on 2 node(s) of the cluster at {joined}, 3 at a time" in printed
    assert f"RETRYING: {lost} on D, target 0 (" in printed and printed.count("RETRYING: ") == 1
    assert "3/3 jobs succeeded." in printed
    assert [len(sweep.pids(name)) for name in (lost, *others)] == [2, 1, 1]
    records = (sweep.folder / lost / "results.jsonl").read_text()
    assert str(trains[lost]) not in records and str(sweep.pids(lost)[1]) in records
    assert sweep.steps(lost) == [0, 300, 600]
    print(printed, sweep.log(lost))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_launcher_is_the_end_of_its_jobs(sweep, joined, start_launcher, number):
    """Of the running one, and of the one in the queue; gently, or because the pipe to the worker is gone."""
    waits = "attempt(); wait_for('never')"
    launcher = start_launcher(*[sweep.job(name, waits) for name in "ABC"])
    sweep.wait_until(lambda: len(list(sweep.folder.glob("*.attempts"))) == 2)
    started = [path.name.partition(".")[0] for path in sweep.folder.glob("*.attempts")]
    trains = [sweep.wait_for_attempt(name, 1) for name in started]
    launcher.send_signal(number)
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert launcher.returncode != 0
    assert ("Running and waiting jobs were stopped" in printed) == (number != signal.SIGKILL)
    sweep.wait_until(lambda: not any(sweep.is_running(train) for train in trains), 20)
    time.sleep(1)
    assert len(list(sweep.folder.glob("*.attempts"))) == 2


def test_without_an_address_a_ray_is_started_and_ends_with_the_launcher(sweep, cluster, start_launcher):
    """Though there is another one, of the other tests."""
    waits = start_launcher(sweep.job("A", "attempt(); wait_for('never')"))
    train = sweep.wait_for_attempt("A", 1)
    raylet = sweep.parent(worker_of(sweep, train))
    assert sweep.is_running(raylet)
    waits.send_signal(signal.SIGINT)
    printed = waits.communicate(timeout=1800)[0].decode()
    assert "1 jobs on this machine, " in printed
    assert not sweep.is_running(train)
    sweep.wait_until(lambda: not sweep.is_running(raylet), 20)


def test_unreachable_ray_error_suggests_a_fix(sweep, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionError, match="No Ray answers at RAY_ADDRESS=127.0.0.1:1"):
        ray_launcher.ray_launcher([sweep.job("A", "")])


def test_other_server_at_the_address_is_distinguished_from_ray(sweep, monkeypatch):
    """The dashboard's port, say, where Ray would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConnectionError, match="not a Ray server"):
            ray_launcher.ray_launcher([sweep.job("A", "")])


@pytest.mark.parametrize("address", ["head", ":6379", "127.0.0.1"])
def test_an_address_without_host_or_port_is_refused_with_an_example(sweep, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"RAY_ADDRESS must be the host:port .*e.g. head:6379; got {address}"):
        ray_launcher.ray_launcher([sweep.job("A", "")])


def test_sweep_without_jobs_reports_it_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert ray_launcher.ray_launcher([]) == []
    assert capsys.readouterr().out.startswith("No jobs to start.")


def test_a_job_folder_that_cannot_be_written_is_a_failure_with_its_cause(sweep, joined):
    """Something that is no folder stands there: root may write everywhere else."""
    (sweep.folder / "A").write_text("")
    (failure,) = ray_launcher.ray_launcher([sweep.job("A", "")])
    assert "exit code 1: FileExistsError: " in failure.cause


def test_a_working_directory_that_a_node_lacks_is_named(sweep, joined, monkeypatch):
    monkeypatch.setattr(os, "getcwd", lambda: "/not/there")
    monkeypatch.setenv(attempts.RETRIES, "0")
    (failure,) = ray_launcher.ray_launcher([sweep.job("A", "")])
    assert "No such file or directory: '/not/there'" in failure.cause


@pytest.fixture
def two_gpus(monkeypatch):
    """The launcher joins a Ray that believes in 2 GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    port = free_port()
    with started("--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=2", "--num-gpus=2"):
        monkeypatch.setenv("RAY_ADDRESS", f"{socket.gethostbyname(socket.gethostname())}:{port}")
        monkeypatch.setenv(ray_launcher.GPUS, "2")
        yield


@pytest.mark.slow
def test_job_on_two_gpus_is_started_by_torchrun(shared_job, check_two_ranks, two_gpus):
    """Two GPUs that do not exist: the ranks find none and run on the CPU."""
    command, folder = shared_job
    assert ray_launcher.ray_launcher([command]) == []
    check_two_ranks(folder)
