"""The parallel launcher on real processes: order, environment, failures, signals."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from builders.processes import environment, is_running, wait_until
from domainbed_reasoning.sweeps.launchers import jobs, parallel, torchrun


@pytest.fixture
def command(tmp_path):
    """``command(name, code, target)``: what a sweep would hand to a launcher, with a script in the place of train."""

    def make(name, code, target="0"):
        script = tmp_path / f"{name}.py"
        script.write_text(textwrap.dedent(code))
        options = f"--algorithm {name} --dataset D --output_dir {tmp_path / name} --test_envs {target}"
        return f"python {script} {options}"

    return make


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    for name in (parallel.JOBS, torchrun.GPUS, jobs.TARGETS, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def log_of(tmp_path, name):
    return (tmp_path / name / jobs.LOG).read_text()


def test_a_command_of_the_sweep_is_read_as_the_shell_reads_it():
    job = jobs.parse_job(
        "python -m domainbed.scripts.train --algorithm ERM --dataset PACS --hparams '{\"lr\": 1}' --hparams_seed 2 "
        "--output_dir 'a folder/x' --test_envs 0 3 --trial_seed 1"
    )
    assert job.options["test_envs"] == ("0", "3")
    assert job.options["hparams"] == ('{"lr": 1}',)
    assert job.log == Path("a folder/x/launcher.log")
    assert job.name == "ERM on PACS, target 0 3, hparams seed 2, trial 1"


def test_jobs_run_with_this_interpreter_and_their_output_lies_in_their_folder(command, tmp_path):
    assert parallel.parallel_launcher([command("A", "import sys; print(sys.executable)")]) == []
    assert log_of(tmp_path, "A").strip() == sys.executable


def test_as_many_jobs_run_at_a_time_as_are_allowed(command, tmp_path, monkeypatch):
    """Two jobs wait for each other; the third starts when one of them has ended."""
    monkeypatch.setenv(parallel.JOBS, "2")
    meet = f"""
    import pathlib, time
    here = pathlib.Path({str(tmp_path)!r})
    (here / NAME).touch()
    while not ((here / "a").exists() and (here / "b").exists()): time.sleep(0.01)
    assert not (here / "c").exists()
    """
    commands = [command(name, f"NAME = {name.lower()!r}\n" + textwrap.dedent(meet)) for name in ("A", "B")]
    third = command("C", f"import pathlib; pathlib.Path({str(tmp_path / 'c')!r}).touch()")
    assert parallel.parallel_launcher([*commands, third]) == []
    assert (tmp_path / "c").exists()


def test_the_cores_are_shared_out_among_the_jobs(command, tmp_path, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv(parallel.JOBS, str(cores))
    parallel.parallel_launcher([command("A", "import os; print(os.environ['OMP_NUM_THREADS'])")])
    assert log_of(tmp_path, "A").strip() == "1"


def test_threads_that_were_chosen_are_kept(command, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    parallel.parallel_launcher([command("A", "import os; print(os.environ['OMP_NUM_THREADS'])")])
    assert log_of(tmp_path, "A").strip() == "7"


def test_every_job_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in parallel.device_slots()] == ["2", "5"]
    monkeypatch.setenv(parallel.JOBS, "3")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in parallel.device_slots()] == ["2", "5", "2"]


def test_every_slice_of_a_gpu_is_used(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # what CUDA says of several slices
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in parallel.device_slots()] == ["MIG-a", "MIG-b"]


def test_jobs_of_several_gpus_have_them_to_themselves(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,0,1,7")
    monkeypatch.setenv(torchrun.GPUS, "2")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in parallel.device_slots()] == ["2,5", "0,1"]
    monkeypatch.setenv(torchrun.GPUS, "6")
    with pytest.raises(ValueError, match="^DOMAINBED_REASONING_GPUS_PER_JOB is 6, and 5 GPUs are visible here"):
        parallel.device_slots()


@pytest.mark.parametrize("hidden", ["-1", "NoDevFiles", ""])
def test_names_that_hide_all_gpus_are_none(monkeypatch, hidden):
    """CUDA users write -1, Slurm writes NoDevFiles; jobs inherit it, and share the cores."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    slots = parallel.device_slots()
    assert len(slots) == len(os.sched_getaffinity(0))
    assert all("CUDA_VISIBLE_DEVICES" not in slot for slot in slots)


def test_a_name_that_cuda_does_not_know_hides_those_after_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # what torch says with that variable and two GPUs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,-1,0")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in parallel.device_slots()] == ["1"]


def test_failed_job_is_reported_with_exit_code_and_end_of_log(command, tmp_path, capsys):
    good = command("Good", "pass", "1")
    bad = command("Bad", "import sys; print('what went wrong'); sys.exit(3)", "2")
    failures = parallel.parallel_launcher([bad, good])
    assert [(failure.job.name, failure.exit_code) for failure in failures] == [("Bad on D, target 2", 3)]
    printed = capsys.readouterr().out
    assert "FAILED: Bad on D, target 2 (exit code 3)" in printed
    assert "    what went wrong" in printed
    assert printed.index("1 of 2 jobs FAILED") > printed.index("what went wrong")


def test_jobs_of_other_targets_are_left_out(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(jobs.TARGETS, "0 2")
    targets = {"A": "0", "B": "1", "C": "0 2", "D": "2 3"}
    parallel.parallel_launcher([command(name, "pass", target) for name, target in targets.items()])
    assert sorted(path.parent.name for path in tmp_path.glob(f"*/{jobs.LOG}")) == ["A", "C"]
    assert "2 of 4 jobs selected" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [(parallel.JOBS, "many"), (parallel.JOBS, "0"), (jobs.TARGETS, "sketch")])
def test_invalid_environment_variable_is_rejected(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must .*; got '{value}'"):
        parallel.parallel_launcher([])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_jobs_and_their_children(command, tmp_path, number):
    """The job writes its child's process id and both sleep; after the signal to the launcher neither is there."""
    job = command(
        "A",
        f"""
        import pathlib, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        pathlib.Path({str(tmp_path / "part")!r}).write_text(str(child.pid))
        pathlib.Path({str(tmp_path / "part")!r}).rename({str(tmp_path / "pid")!r})
        child.wait()
        """,
    )
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # which `nohup make test` ignores
    code += f"from domainbed_reasoning.sweeps.launchers.parallel import parallel_launcher; parallel_launcher([{job!r}])"
    command = [sys.executable, "-c", code]
    launcher = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, cwd=tmp_path)
    wait_until((tmp_path / "pid").exists)
    child = int((tmp_path / "pid").read_text())
    launcher.send_signal(number)
    assert launcher.wait(600) != 0
    wait_until(lambda: not is_running(child))
