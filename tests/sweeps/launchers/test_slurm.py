"""The Slurm launcher on a real Slurm of one node, and of two, with jobs killed, canceled and requeued on purpose.

apt-get install slurmctld slurmd slurm-client munge; pip install 'domainbed-reasoning[slurm]'
make test PYTEST=tests/sweeps/launchers/test_slurm.py                                                    # as root
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed_reasoning.sweeps.launchers import attempts, restart, slurm_queue
from domainbed_reasoning.sweeps.launchers import slurm as slurm_launcher
from domainbed_reasoning.sweeps.launchers.jobs import parse_job

_spec = importlib.util.spec_from_file_location("one_machine", Path(__file__).with_name("one_machine.py"))
one_machine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(one_machine)

CHECKOUT = Path(__file__).resolve().parents[3]

LAUNCH = """
import sys
from domainbed_reasoning.sweeps.launchers import slurm as slurm_launcher
from domainbed_reasoning.sweeps.launchers import slurm_queue
slurm_queue._POLL_SECONDS = 0.3
slurm_launcher.slurm_launcher(sys.argv[1:])
"""


# A second partition, whose jobs those of the first one preempt.
LOW = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL PriorityTier=0 PreemptMode=REQUEUE GraceTime=10
"""


def start_slurm(folder, **options):
    """Yield the environment of a Slurm that lasts until the tests of this file have ended."""
    if reason := one_machine.missing():
        pytest.skip(reason)
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'domainbed-reasoning[slurm]'")
    try:
        yield one_machine.start(folder, **options)
    finally:
        one_machine.stop(folder)


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    yield from start_slurm(tmp_path_factory.mktemp("slurm"), more=LOW)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """One core each, and arrays of at most three jobs."""
    yield from start_slurm(tmp_path_factory.mktemp("slurm2"), nodes=2, cores=1, more="MaxArraySize=3")


@pytest.fixture(scope="module")
def meeting_nodes(tmp_path_factory):
    """Two nodes, the first of which, in the order of their names, is found by its name."""
    names = (one_machine.host(), f"{one_machine.host()}-2")
    yield from start_slurm(tmp_path_factory.mktemp("slurm3"), nodes=2, cores=1, names=names)


def commands_of(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_queue, "_POLL_SECONDS", 0.3)

    def run(*command):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return run


@pytest.fixture
def slurm(node, monkeypatch):
    """``slurm("scancel", …)`` runs one of its commands; the launcher finds it too."""
    return commands_of(node, monkeypatch)


@pytest.fixture
def slurm2(two_nodes, monkeypatch):
    """The same on two nodes, both of them idle."""
    folder = Path(two_nodes["SLURM_CONF"]).parent
    run = commands_of(two_nodes, monkeypatch)
    run.folder = folder
    yield run
    for name in run("sinfo", "--noheader", "--Node", "--format=%N", "--states=down").split():
        one_machine.start_node(folder, name)
    one_machine.wait_until_idle(folder)


def start_launcher(*jobs, **variables):
    command = [sys.executable, "-c", LAUNCH, *jobs]
    environment = {**os.environ, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def job_ids(sweep):
    """Slurm's numbers of the jobs, or arrays, that the sweep has submitted."""
    scripts = (sweep.folder / "slurm").glob("*_submission.sh")
    return sorted(int(path.name.partition("_")[0]) for path in scripts)


def job_id(sweep):
    """The last one's."""
    return job_ids(sweep)[-1]


@pytest.mark.parametrize(
    ("written", "minutes"),
    [("90", 90), ("90:30", 91), ("12:00:00", 720), ("1-12", 2160), ("1-12:30", 2190), ("2-0:0:1", 2881), ("0", 525600)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(written, minutes):
    assert slurm_launcher.sbatch_parameters(f"--time={written}")["time"] == minutes


def test_sbatchs_own_time_limit_wins_as_it_does_for_sbatch():
    """A job's --time in its script does not count where SBATCH_TIMELIMIT is set; submitit is told what counts."""
    assert slurm_launcher.sbatch_parameters("--time=90", "2:00:00")["time"] == 120
    assert slurm_launcher.sbatch_parameters("", "UNLIMITED")["time"] == 525600
    with pytest.raises(ValueError, match="^SBATCH_TIMELIMIT must be a time limit of sbatch"):
        slurm_launcher.sbatch_parameters("--time=90", "tomorrow")


def test_options_of_sbatch_reach_it_as_they_are_written():
    parameters = slurm_launcher.sbatch_parameters("--partition=gpu --gres gpu:1 --exclusive --cpus-per-task=8")
    assert parameters["additional_parameters"] == {
        "partition": "gpu", "gres": "gpu:1", "exclusive": True, "cpus-per-task": "8", "requeue": True
    }  # fmt: skip
    assert parameters["srun_args"] == ["--cpus-per-task=8"]
    assert parameters["time"] == 24 * 60


@pytest.mark.parametrize("options", ["-p gpu", "--time=tomorrow", "--array=0-3", "gpu"])
def test_options_that_cannot_be_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{slurm_launcher.OPTIONS}: "):
        slurm_launcher.sbatch_parameters(options)


def test_jobs_are_an_array_with_a_share_of_the_cores_and_the_sweeps_environment(sweep, slurm, monkeypatch, capsys):
    monkeypatch.setenv(slurm_launcher.OPTIONS, "--cpus-per-task=2")
    monkeypatch.setenv("WHO", "me")
    code = "record(0); print(os.environ['WHO'], os.environ['OMP_NUM_THREADS'], os.getcwd(), sys.executable); done()"
    assert slurm_launcher.slurm_launcher([sweep.job(name, code) for name in "ABC"]) == []
    printed = capsys.readouterr().out
    assert "3 jobs submitted to Slurm." in printed and "3/3 jobs succeeded." in printed
    for index, name in enumerate("ABC"):
        first, second = sweep.log(name).splitlines()
        assert first.startswith(f"--- attempt 1 of 2, Slurm job {job_id(sweep)}_{index}, requeued 0 times")
        assert second == f"me 2 {os.getcwd()} {sys.executable}"


def test_failed_job_is_retried_then_reported_with_the_end_of_its_log(sweep, slurm, capsys):
    bad = sweep.job("Bad", "attempt(); record(0); print('what went wrong'); sys.exit(3)", target="2")
    failures = slurm_launcher.slurm_launcher([bad, sweep.job("Good", "record(0); done()")])
    assert [failure.job.name for failure in failures] == ["Bad on D, target 2"]
    assert "state FAILED, exit code 3" in failures[0].cause
    printed = capsys.readouterr().out
    assert "    what went wrong" in printed
    assert printed.index("1 of 2 jobs FAILED") > printed.index("what went wrong")
    assert len(sweep.pids("Bad")) == 2
    assert sweep.steps("Bad") == [0]


def test_a_train_process_that_is_killed_is_started_again(sweep, slurm):
    launcher = start_launcher(sweep.job("A", sweep.KILLED_ONCE))
    train = sweep.wait_for_attempt("A", 1)
    sweep.wait_until(lambda: sweep.steps("A") == [0, 300])
    os.kill(train, signal.SIGKILL)
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert "1/1 jobs succeeded." in printed
    assert sweep.steps("A") == [0, 300, 600]
    print(printed, sweep.log("A"))


@pytest.mark.parametrize("how", ["requeue", "preempt", "requeue of one of an array"])
def test_requeued_job_restarts_without_duplicate_records(sweep, slurm, how):
    """By hand or for a lost node (SIGTERM, then SIGKILL); before preemption or time-out (submitit's SIGUSR2)."""
    jobs = [sweep.job("A", sweep.KILLED_ONCE)] + [sweep.job("B", "done()")] * ("array" in how)
    launcher = start_launcher(*jobs)
    train = sweep.wait_for_attempt("A", 1)
    sweep.wait_until(lambda: sweep.steps("A") == [0, 300])
    number = f"{job_id(sweep)}_0" if "array" in how else str(job_id(sweep))
    command = ["scancel", "--signal=USR2", number] if how == "preempt" else ["scontrol", "requeue", number]
    slurm(*command)
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert f"{len(jobs)}/{len(jobs)} jobs succeeded." in printed
    assert not sweep.is_running(train)
    assert sweep.steps("A") == [0, 300, 600]
    assert len(sweep.pids("A")) == 2
    assert "requeued 1 times" in sweep.log("A")
    print(printed, sweep.log("A"))


def test_a_preempted_job_waits_out_its_grace_and_runs_again_though_nothing_may_fail(sweep, slurm, monkeypatch):
    """SIGTERM comes at once, SIGKILL 10 s later; no retry is allowed."""
    monkeypatch.setenv(slurm_launcher.OPTIONS, "--partition=low")
    monkeypatch.setenv(attempts.RETRIES, "0")
    launcher = start_launcher(sweep.job("A", sweep.KILLED_ONCE))
    train = sweep.wait_for_attempt("A", 1)
    sweep.wait_until(lambda: sweep.steps("A") == [0, 300])
    slurm("sbatch", "--exclusive", "--wrap=true", "--output=/dev/null")
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert "1/1 jobs succeeded." in printed
    assert not sweep.is_running(train)
    assert sweep.steps("A") == [0, 300, 600]
    assert sweep.log("A").count("stopped by SIGTERM") == 1 and len(sweep.pids("A")) == 2
    print(printed, sweep.log("A"))


def test_a_job_out_of_the_time_that_sbatchs_variable_gives_is_requeued_as_often_as_retries_say(sweep, slurm):
    """submitit's signal comes 90 s before the end, of a job of a minute at once."""
    launcher = start_launcher(sweep.job("A", "attempt(); record(0); wait_for('never')"), SBATCH_TIMELIMIT="1")
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert printed.count("REQUEUED: ") == 1
    assert "state FAILED, Job not requeued because: timed-out too many times" in printed
    assert len(sweep.pids("A")) == 2
    print(printed, sweep.log("A"))


def test_a_cancelled_job_is_a_failure_and_is_not_tried_again(sweep, slurm):
    launcher = start_launcher(sweep.job("A", sweep.KILLED_ONCE), sweep.job("B", "done()"))
    train = sweep.wait_for_attempt("A", 1)
    slurm("scancel", f"{job_id(sweep)}_0")
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert "FAILED: A on D, target 0 (Slurm job" in printed and "state CANCELLED" in printed
    assert "1 of 2 jobs FAILED" in printed
    assert not sweep.is_running(train)
    assert len(sweep.pids("A")) == 1


@pytest.mark.parametrize("retries", [0, 1])
def test_an_attempt_that_sigterm_ended_has_not_failed_however_long_slurm_takes(sweep, retries):
    """Slurm's SIGTERM goes to all processes of a job; here it reaches the train process half a second earlier.

    Then GraceTime passes, hours perhaps: waits of more than 2 s take 2 s here.
    """
    code = """
    import subprocess
    attempt()
    subprocess.Popen(f"sleep 0.5; kill -TERM {os.getppid()}", shell=True, start_new_session=True)
    os.kill(os.getpid(), 15)
    """
    run = """if True:
    import sys, time
    from domainbed_reasoning.sweeps.launchers.slurm import SlurmJob
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 2))
    SlurmJob(sys.argv[1], int(sys.argv[2]))()
    """
    process = subprocess.Popen([sys.executable, "-c", run, sweep.job("A", code), str(retries)])
    try:
        sweep.wait_for_attempt("A", 1)
        sweep.wait_until(lambda: "stopped by SIGTERM; waiting until Slurm" in sweep.log("A"))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert len(sweep.pids("A")) == 1


def test_ctrl_c_leaves_the_jobs_running_and_says_how_to_follow_them(sweep, slurm):
    launcher = start_launcher(sweep.job("A", "attempt(); record(0); wait_for('go'); done()"))
    train = sweep.wait_for_attempt("A", 1)
    launcher.send_signal(signal.SIGINT)
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert launcher.returncode == 0
    assert "The jobs keep running." in printed
    assert printed.count(f"squeue --jobs={job_id(sweep)}") == 2
    assert sweep.is_running(train)
    (sweep.folder / "go").touch()
    sweep.wait_until((sweep.folder / "A" / "done").exists)


@pytest.mark.parametrize("names", ["A", "AB"])
def test_submit_without_waiting(sweep, slurm, monkeypatch, capsys, names):
    """A job and an array. While Slurm has them, `study` removes no folder of the sweep."""
    monkeypatch.setenv(slurm_launcher.WAIT, "0")
    assert slurm_launcher.slurm_launcher([sweep.job(name, "wait_for('go'); done()") for name in names]) == []
    number = job_id(sweep)
    printed = capsys.readouterr().out
    assert f"squeue --jobs={number}" in printed and "Do not run `sweep delete_incomplete`" in printed
    identifiers = {"A": {str(number)}, "AB": {f"{number}_0", f"{number}_1"}}[names]
    assert slurm_queue.with_slurm(sweep.folder).keys() == identifiers
    with pytest.raises(ValueError, match=f"Slurm still has {len(names)} jobs in .*scancel {number}"):
        restart.check_nothing_runs(sweep.folder)
    (sweep.folder / "go").touch()
    for name in names:
        sweep.wait_until((sweep.folder / name / "done").exists)
    sweep.wait_until(lambda: not slurm_queue.with_slurm(sweep.folder))
    restart.check_nothing_runs(sweep.folder)


def test_rejected_submission_error_suggests_a_fix(sweep, slurm, monkeypatch):
    monkeypatch.setenv(slurm_launcher.OPTIONS, "--partition=none")
    with pytest.raises(ValueError, match="sbatch rejected the jobs(?s:.)*invalid partition(?s:.)*delete_incomplete"):
        slurm_launcher.slurm_launcher([sweep.job("A", "")])


def test_missing_slurm_commands_are_reported_with_a_fix(sweep, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="`sbatch` was not found"):
        slurm_launcher.slurm_launcher([sweep.job("A", "")])


def test_invalid_retries_are_rejected(sweep, monkeypatch):
    monkeypatch.setenv(attempts.RETRIES, "often")
    with pytest.raises(ValueError, match=f"{attempts.RETRIES} must be an integer >= 0; got 'often'"):
        slurm_launcher.slurm_launcher([sweep.job("A", "")])


@pytest.mark.parametrize("what_dies", ["the node", "its daemon alone"])
def test_job_of_a_lost_node_reruns_on_another_without_duplicate_records(sweep, slurm2, what_dies):
    """Where only Slurm's daemon has died, the node's job lives on and writes into the folder that the next one uses."""
    code = """
    number = attempt()
    record(0)
    print("on", os.environ["SLURMD_NODENAME"], flush=True)
    while number == 1: record(300); time.sleep(0.1)
    record(600)
    done()
    """
    launcher = start_launcher(sweep.job("A", code), sweep.job("B", "record(0); done()"))
    train = sweep.wait_for_attempt("A", 1)
    sweep.wait_until(lambda: 300 in sweep.steps("A") and (sweep.folder / "B" / "done").exists())
    lost = slurm2("squeue", "--noheader", "--format=%N", f"--jobs={job_id(sweep)}_0").strip()
    one_machine.lose_node(slurm2.folder, lost, jobs=what_dies == "the node")
    assert sweep.is_running(train) == (what_dies != "the node")
    printed = launcher.communicate(timeout=1800)[0].decode()
    assert f"REQUEUED: A on D, target 0 (Slurm job {job_id(sweep)}_0)" in printed
    assert "2/2 jobs succeeded." in printed
    assert not sweep.is_running(train)
    assert len(sweep.pids("A")) == 2
    assert sweep.steps("A") == [0, 600] and sweep.steps("B") == [0]
    other = {"node1": "node2", "node2": "node1"}[lost]
    assert sweep.log("A").index(f"on {lost}") < sweep.log("A").index(f"on {other}")
    assert "requeued 1 times" in sweep.log("A")
    print(printed, sweep.log("A"))


def test_more_jobs_than_an_array_may_have_are_several_arrays(sweep, slurm2, capsys):
    """MaxArraySize is 3 on that Slurm."""
    assert slurm_launcher.slurm_launcher([sweep.job(name, "record(0); done()") for name in "ABCDE"]) == []
    first, second = job_ids(sweep)
    printed = capsys.readouterr().out
    assert f"5 jobs submitted to Slurm.\n    squeue --jobs={first},{second}\n" in printed
    assert "5/5 jobs succeeded." in printed


def test_rejected_arrays_are_failures_and_the_others_run(sweep, slurm2, monkeypatch, capsys):
    """Sites bound the jobs of a user. The advice to remove folders must not come while some of them run."""
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    submit = SlurmExecutor._submit_command
    submitted = []

    def once(executor, command):
        if submitted:
            raise FailedJobError("sbatch: error: QOSMaxSubmitJobPerUserLimit")
        submitted.append(submit(executor, command))
        return submitted[0]

    monkeypatch.setattr(SlurmExecutor, "_submit_command", once)
    failures = slurm_launcher.slurm_launcher([sweep.job(name, "record(0); done()") for name in "ABCDE"])
    assert [failure.job.name[0] for failure in failures] == ["D", "E"]
    printed = capsys.readouterr().out
    assert "2 jobs were NOT submitted. rejected by sbatch: sbatch: error: QOSMaxSubmitJobPerUserLimit" in printed
    assert "2 of 5 jobs FAILED" in printed
    assert all((sweep.folder / name / "done").exists() for name in "ABC")


def test_sweep_without_jobs_reports_it_and_submits_nothing(sweep, capsys):
    assert slurm_launcher.slurm_launcher([]) == []
    assert capsys.readouterr().out.startswith("No jobs to start.")


def test_sweeps_in_the_queue_side_by_side_are_waited_for_by_another_process(sweep, slurm, capsys, monkeypatch):
    """A job of each waits for the other sweep's; one more fails. Submitted before, they are found by their folders."""
    monkeypatch.setenv(slurm_launcher.WAIT, "0")
    monkeypatch.setenv(attempts.RETRIES, "0")
    meets = """
    (here.parent / folder.name).touch()
    record(0)
    while not (here.parent / OTHER).exists(): time.sleep(0.1)
    done()
    """
    folders = []
    for name, other, code in (("A", "B", "sys.exit(3)"), ("B", "A", "done()")):
        folders.append(sweep.folder / f"sweep_{name}")
        for job in (name, "C"):  # as the stock sweep does
            (folders[-1] / job).mkdir(parents=True)
        jobs = type(sweep)(folders[-1])
        slurm_launcher.slurm_launcher([jobs.job(name, meets.replace("OTHER", repr(other))), jobs.job("C", code)])
    moved = folders[1].rename(sweep.folder / "moved")
    folders[1].symlink_to(moved)  # its jobs still write where they were told to
    capsys.readouterr()
    failures = slurm_queue.wait_for_sweeps([folders[0], moved])
    assert [failure.job.folder for failure in failures] == [folders[0] / "C"]
    printed = capsys.readouterr().out
    assert "1 of 4 jobs FAILED" in printed and "state FAILED, exit code 3; Slurm's log: " in printed
    earlier = [identifier for folder in folders for identifier in slurm_queue.submitted_for(folder)]
    assert slurm_queue.wait_for_sweeps(folders, earlier) == []  # its end was reported


def test_folders_of_dead_jobs_are_distinguished_from_running_slurm_jobs(sweep, slurm, monkeypatch):
    """A sweep typed by hand is in the way, as everywhere; a job that Slurm runs on this machine is not."""
    monkeypatch.setenv(slurm_launcher.WAIT, "0")
    monkeypatch.setenv(attempts.RETRIES, "0")
    alive, dead, done, lost, foreign = (sweep.folder / (digit * 32) for digit in "abcde")
    codes = {alive: "attempt(); wait_for('end'); done()", dead: "sys.exit(3)", done: "done()"}
    commands = [f"{sweep.job(folder.name, code)} --as domainbed.scripts.train" for folder, code in codes.items()]
    slurm_launcher.slurm_launcher(commands)
    lost.mkdir()  # by a sweep that was killed before it submitted
    foreign.mkdir()  # another sweep's, which may run anywhere
    (foreign / "out.txt").write_text("")
    try:
        sweep.wait_for_attempt(alive.name, 1)
        sweep.wait_until(lambda: list(slurm_queue.with_slurm(sweep.folder).values()) == ["RUNNING"])
        monkeypatch.setenv("SQUEUE_PARTITION", "low")  # a user's own, which would hide the job
        assert restart.dead_beside_live(sweep.folder) == [dead, lost]
        noted = sweep.folder / "slurm" / "jobs.jsonl"
        text = noted.read_text()
        noted.write_text(text[:-40])  # a full disk: the last line is that of a job that is over
        slurm_queue.note_submitted({"0": parse_job(commands[2])}, noted.parent)
        assert list(slurm_queue.submitted_for(sweep.folder)) == [f"{job_id(sweep)}_0", f"{job_id(sweep)}_1", "0"]
        assert restart.dead_beside_live(sweep.folder) == [dead, lost]
        noted.write_text("")  # a launcher that was killed before it noted
        assert restart.dead_beside_live(sweep.folder) == []
        noted.write_text(text.replace('"cluster": "test"', '"cluster": "other"'))
        with pytest.raises(ValueError, match="they were submitted to the cluster other, not to test"):
            restart.dead_beside_live(sweep.folder)
        noted.write_text(text)
        code = "import time; print(flush=True); time.sleep(3600)"
        command = [sys.executable, "-c", code, "domainbed.scripts.sweep", "--output_dir", sweep.folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as by_hand:
            by_hand.stdout.readline()
            with pytest.raises(ValueError, match=f"already running:\\n    {by_hand.pid} "):
                restart.dead_beside_live(sweep.folder)
            by_hand.kill()
    finally:
        (sweep.folder / "end").touch()
    sweep.wait_until((alive / "done").exists)
    sweep.wait_until(lambda: restart.dead_beside_live(sweep.folder) is None)


STUDY = """
import dataclasses, sys
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.sweeps.studies import main_comparison
from domainbed_reasoning.sweeps.launchers import slurm_queue
from domainbed_reasoning.sweeps.studies.study import Grid, for_laptop
slurm_queue._POLL_SECONDS = 0.5
hparams = {"answer": "label", "both_answers": False}
grids = for_laptop(Grid(("MLLMZeroShot",), hparams=hparams), Grid(("LabelSFT",), hparams=hparams))
main_comparison.STUDY = dataclasses.replace(main_comparison.STUDY, mini=grids)
sys.exit(cli.main(["study", "main_comparison", "--scale", "mini", "--launch", "--launcher", "slurm", *sys.argv[1:]]))
"""


def test_study_submits_all_sweeps_and_rerun_restarts_dead_jobs(sweep, slurm, tmp_path):
    """Two sweeps of four jobs each, of which two targets, then one more, are asked for; the stand-in's are enough."""
    folder = tmp_path / "study"
    path = os.pathsep.join([str(CHECKOUT / "tests" / "without_pth"), str(CHECKOUT), os.environ["PYTHONPATH"]])
    stand_in = {"DOMAINBED_REASONING_DOMAINBED": str(CHECKOUT / "tests" / "standin"), "PYTHONPATH": path}

    def launch(targets, **variables):
        command = [sys.executable, "-c", STUDY, "--steps", "1", "--output_dir", str(folder)]
        environment = {**os.environ, **stand_in, "DOMAINBED_REASONING_TARGETS": targets, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    slurm("scontrol", "update", "PartitionName=main", "State=DOWN")  # jobs wait
    try:
        code, printed = launch("1 2", **{slurm_launcher.WAIT: "0"})
        assert code == 0 and "4 of 8 jobs are queued or running" in printed, printed
        first = job_ids(type(sweep)(folder))
        assert len(first) == 2, printed  # both sweeps are in the queue
        slurm("scancel", f"{first[0]}_0")
        code, printed = launch("1 2 3", **{slurm_launcher.WAIT: "0"})
        assert code == 0 and "6 of 8 jobs are queued or running" in printed, printed
    finally:
        slurm("scontrol", "update", "PartitionName=main", "State=UP")
    code, printed = launch("1 2 3")
    assert code == 1 and "6/8 jobs completed." in printed and "NOT STARTED: 2 jobs\nRerun the command" in printed, (
        printed
    )
    assert "FAILED" not in printed
    code, printed = launch("1 2 3", **{slurm_launcher.WAIT: "0"})
    assert code == 1 and "6/8 jobs completed." in printed, printed  # and the tables are there


def test_unavailable_controller_is_waited_for(sweep, slurm2, monkeypatch, capsys):
    """`squeue` fails twice."""
    states, failing = slurm_queue._states, [1, 2]

    def away_twice(identifiers):
        if failing:
            failing.pop()
            raise ConnectionError("Unable to contact slurm controller")
        return states(identifiers)

    monkeypatch.setattr(slurm_queue, "_states", away_twice)
    assert slurm_launcher.slurm_launcher([sweep.job("A", "record(0); done()")]) == []
    assert capsys.readouterr().err.count("Slurm does not respond (Unable to contact slurm controller)") == 1


def test_a_job_folder_that_cannot_be_written_is_a_failure_with_its_cause(sweep, slurm):
    """Something that is no folder stands there: root may write everywhere else."""
    (sweep.folder / "A").write_text("")
    (failure,) = slurm_launcher.slurm_launcher([sweep.job("A", "")])
    assert "File exists" in failure.cause


@pytest.mark.slow
def test_job_on_two_nodes_starts_a_torchrun_on_each(shared_job, check_two_ranks, meeting_nodes, monkeypatch):
    command, folder = shared_job
    commands_of(meeting_nodes, monkeypatch)
    monkeypatch.setenv(slurm_launcher.OPTIONS, "--nodes=2 --time=1:00:00")
    assert slurm_launcher.slurm_launcher([command]) == []
    check_two_ranks(folder)
