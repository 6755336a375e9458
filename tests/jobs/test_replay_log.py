"""The replay log of a job, and resuming from a truncated one."""

import atexit
import fcntl
import json
import os
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from builders.files import read_lines
from builders.processes import run_python
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.jobs import resume_store as resume_store
from domainbed_reasoning.jobs.replay_log import Answers, Progress
from domainbed_reasoning.jobs.results_file import add_to_record, own_records, restore_measured, set_aside
from domainbed_reasoning.jobs.resume_store import JobIsRunning, clear, list_progress, prune

JOB = {"args": {"algorithm": "MTCT", "dataset": "ShapesReasoning", "test_envs": [2], "output_dir": "nowhere"}}


def end_process(progress):
    """Let go of a progress as the end of its process would, which a test does not wait for."""
    os.close(progress._lock)


def write_progress(root, steps=3, job=JOB):
    """The progress of a job that saved a state after ``steps`` steps and took one more."""
    progress = Progress(job, root)
    for step in range(steps):
        progress.record_step({"loss": step / 7, "stage": float(step > 1)}, [(0, step, "chain", True)])
    progress.save(steps, lambda: {"weights": torch.arange(3.0)}, now=True)
    progress.record_step({"loss": 99.0, "stage": 1.0}, [(0, 9, "lost", True)])
    end_process(progress)
    return progress


def test_restart_replays_only_events_before_the_state(tmp_path):
    write_progress(tmp_path)
    again = Progress(JOB, tmp_path)
    assert [again.next_step()["loss"] for _ in range(3)] == [0.0, 1 / 7, 2 / 7]
    assert not again.replays
    assert torch.equal(again.state["weights"], torch.arange(3.0)) and again.state["steps"] == 3
    assert again.labeled(1) == [(0, 2, "chain", True)]  # of step 2, the only one in the round
    again.record_step({"loss": 3.0, "stage": 1.0}, [])
    again.save(4, lambda: {}, now=True)
    end_process(again)
    third = Progress(JOB, tmp_path)
    assert [third.next_step()["loss"] for _ in range(4)][-1] == 3.0


def test_answers_of_the_evaluation_after_the_state_are_replayed(tmp_path):
    progress = Progress(JOB, tmp_path)
    progress.record_step({"loss": 1.0, "stage": 0.0}, [])
    progress.save(1, lambda: {}, now=True)
    progress.record_answers(Answers([1, 0], ["a", "\udc80b"], None))
    end_process(progress)
    again = Progress(JOB, tmp_path)
    again.next_step()
    assert again.next_answers(2) == Answers([1, 0], ["a", "\udc80b"], None)
    assert not again.replays


def test_chains_generated_ahead_of_an_interrupted_evaluation_are_restored(tmp_path):
    """Those of the evaluation before are among its answers; the step after the state is cut off."""
    progress = Progress(JOB, tmp_path)
    for step in range(2):
        progress.record_ahead(f"state {step}", "picture", "other")
        progress.record_answers(Answers([1], ["other"], None))
        progress.record_step({"loss": 1.0, "stage": 0.0}, [])
    progress.save(2, lambda: {}, now=True)
    progress.record_ahead("state 2", "picture", "chain \udc80")
    progress.record_answers(Answers([1], ["chain \udc80"], None))
    progress.record_ahead("state 2", "another", "more")
    end_process(progress)
    again = Progress(JOB, tmp_path)
    assert again.ahead == {"state 2": {"picture": "chain \udc80", "another": "more"}}
    for _ in range(2):
        again.next_answers(1)
        again.next_step()
    again.next_answers(1)
    assert not again.replays


def test_mismatched_replay_raises_with_a_fix(tmp_path):
    write_progress(tmp_path)
    with pytest.raises(RuntimeError, match=r"answers requested, values.*jobs --clear"):
        Progress(JOB, tmp_path).next_answers(5)


@pytest.mark.parametrize("size", range(0, 800, 40))
def test_truncated_log_is_never_partially_used(tmp_path, size):
    """The state says how long its log is: with less, the job begins at step 0; more is cut off."""
    folder = write_progress(tmp_path).folder
    log = folder / "log.jsonl"
    needed = torch.load(folder / "state.pt", weights_only=True)["log_bytes"]
    assert 0 < needed < 800
    log.write_bytes(log.read_bytes()[:size])
    again = Progress(JOB, tmp_path)
    assert again.replays == (size >= needed)
    assert (again.state is None) == (size < needed)
    assert log.stat().st_size == (needed if size >= needed else 0)


def test_unreadable_state_restarts_at_step_0_with_a_message(tmp_path, capsys):
    folder = write_progress(tmp_path).folder
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:500])
    again = Progress(JOB, tmp_path)
    assert again.state is None and not again.replays
    assert "Starting from step 0" in capsys.readouterr().out


def test_different_arguments_are_a_different_job(tmp_path):
    write_progress(tmp_path)
    other = {"args": {**JOB["args"], "test_envs": [3]}}
    assert Progress(other, tmp_path).state is None


def test_running_job_cannot_be_started_again(tmp_path):
    Progress(JOB, tmp_path)
    with pytest.raises(JobIsRunning, match="another --output_dir"):
        Progress(JOB, tmp_path)
    with pytest.raises(JobIsRunning, match="Stop it first"):
        clear(next(list_progress(tmp_path)))


def test_full_disk_stops_recording_but_not_the_job(tmp_path, capsys):
    """A limit on the size of files gives the error of a full disk."""
    progress = Progress(JOB, tmp_path)
    progress.record_step({"loss": 1.0, "stage": 0.0}, [])
    progress.save(1, lambda: {"weights": torch.zeros(4)}, now=True)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        progress.save(2, lambda: {"weights": torch.zeros(100_000)}, now=True)
        progress.record_step({"loss": 2.0, "stage": 0.0}, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "can no longer be saved" in capsys.readouterr().out
    assert not list(progress.folder.glob(".state*"))
    end_process(progress)
    assert Progress(JOB, tmp_path).state["steps"] == 1


def test_pruning_deletes_completed_jobs_first_then_the_oldest(tmp_path, monkeypatch, capsys):
    folders = []
    for number in range(3):
        output = tmp_path / f"out{number}"
        output.mkdir()
        job = {"args": {"algorithm": "MTCT", "dataset": "D", "output_dir": str(output)}}
        folders.append(write_progress(tmp_path / "kept", job=job).folder)
        for path in folders[-1].iterdir():
            os.utime(path, (1000 + number, 1000 + number))
    (tmp_path / "out2" / "done").write_text("done")
    monkeypatch.setenv("DOMAINBED_REASONING_UNFINISHED_GB", str(1.5 * sum_of_sizes(folders[1]) / 1e9))
    prune(tmp_path / "kept", keep=tmp_path)
    assert [folder.exists() for folder in folders] == [False, True, False]
    assert capsys.readouterr().out.count("Deleted the progress of an interrupted job") == 1
    monkeypatch.setenv("DOMAINBED_REASONING_UNFINISHED_GB", "many")
    with pytest.raises(ValueError, match="number of gigabytes"):
        prune(tmp_path / "kept", keep=tmp_path)


def sum_of_sizes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_concurrent_jobs_do_not_interfere(tmp_path):
    """Each start looks at all other jobs' folders, which their ends delete."""

    def start_and_end(number):
        output = tmp_path / f"out{number}"
        output.mkdir()
        for _ in range(100):
            progress = Progress({"args": {"output_dir": str(output)}}, tmp_path / "kept")
            progress.record_step({"loss": 1.0, "stage": 0.0}, [])
            assert not progress.replays
            (output / "done").write_text("done")
            progress._tidy_up(str(output))
            atexit.unregister(progress._tidy_up)
            end_process(progress)
            os.close(progress._log)

    with ThreadPoolExecutor(6) as pool:  # a lock is as foreign to another thread as to another process
        list(pool.map(start_and_end, range(6)))
    assert list((tmp_path / "kept").iterdir()) == []


def test_concurrent_clearing_does_not_interfere(tmp_path, monkeypatch):
    """The cache is over its bound: every start deletes what others have just left."""
    monkeypatch.setenv("DOMAINBED_REASONING_UNFINISHED_GB", "0")

    def start_and_be_killed(number):
        for _ in range(60):
            progress = Progress({"args": {"output_dir": str(number)}}, tmp_path)
            atexit.unregister(progress._tidy_up)
            end_process(progress)
            os.close(progress._log)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(start_and_be_killed, range(6)))


def test_briefly_held_lock_is_waited_for_and_must_belong_to_the_folder(tmp_path, monkeypatch):
    """As somebody holds it who lists jobs; and as it is where the folder is deleted while its lock is being taken."""
    monkeypatch.setattr(resume_store, "_PATIENCE", 60)  # however busy the machine is
    folder = tmp_path / "job"
    held = resume_store.lock_folder(folder)
    threading.Timer(0.2, os.close, [held]).start()
    again = resume_store.lock_folder(folder)
    assert again is not None
    os.close(again)
    lock, replaced = fcntl.flock, []

    def deleted_meanwhile(descriptor, how):
        if not replaced:
            replaced.append(True)
            resume_store.delete(folder)
        return lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    taken = resume_store.lock_folder(folder)
    assert replaced and os.path.samestat(os.fstat(taken), os.stat(folder / "lock"))
    os.close(taken)


@pytest.mark.parametrize("text", ["[]", "3", '{"args": null}', '{"args": 5}', "{"])
def test_unrelated_folders_are_ignored(tmp_path, text):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "job.json").write_text(text)
    (tmp_path / "loop").symlink_to("loop")
    assert [job.args for job in list_progress(tmp_path)] == [{}]
    Progress(JOB, tmp_path)


def test_interrupted_deletions_complete_at_the_next_start(tmp_path):
    rest = write_progress(tmp_path).folder.rename(tmp_path / ".rest")
    assert list(list_progress(tmp_path)) == []
    Progress(JOB, tmp_path)
    assert not rest.exists()


def test_jobs_verb_lists_and_clears(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = write_progress(tmp_path / "domainbed-reasoning" / "unfinished").folder.name
    assert cli.main(["jobs"]) == 0
    listed = capsys.readouterr().out
    assert (
        key[:8] in listed
        and "MTCT on ShapesReasoning, targets [2], nowhere" in listed
        and "1 interrupted job," in listed
    )
    assert cli.main(["jobs", "--clear", "zzz"]) == 1
    assert "no interrupted job has the key zzz" in capsys.readouterr().err
    assert cli.main(["jobs", "--clear", key[:8]]) == 0
    assert cli.main(["jobs"]) == 0
    assert "0 interrupted jobs, 0.0 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "failure"),
    [
        ([""], "an argument is empty"),
        ([" "], "an argument is empty"),
        (["ab00", ""], "an argument is empty"),
        ([], "expected at least one argument"),
        (["ab"], "2 jobs have a key that starts with ab"),
        (["ab00", "zzz"], "no interrupted job has the key zzz"),
        (["ALL"], "no interrupted job has the key ALL"),
        (["*"], "no interrupted job has the key *"),
        (["."], "no interrupted job has the key ."),
    ],
)
def test_unknown_or_ambiguous_key_clears_nothing(tmp_path, monkeypatch, capsys, keys, failure):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "domainbed-reasoning" / "unfinished"
    root.mkdir(parents=True)
    for name in ("ab00" + "0" * 28, "ab11" + "0" * 28):
        write_progress(tmp_path / "made").folder.rename(root / name)
    try:
        code = cli.main(["jobs", "--clear", *keys])
    except SystemExit as exit:
        code = exit.code
    assert code and failure in capsys.readouterr().err
    assert len(list(list_progress(root))) == 2
    assert cli.main(["jobs", "--clear", "ab00", "ab00"]) == 0
    assert [job.folder.name[:4] for job in list_progress(root)] == ["ab11"]
    assert cli.main(["jobs", "--clear", "all"]) == 0 and list(list_progress(root)) == []


def test_dangling_cache_link_is_named_in_the_error(tmp_path):
    (tmp_path / "cache").symlink_to("/gone/cache")
    with pytest.raises(FileNotFoundError, match=r"cache is a link to /gone/cache, which does not exist"):
        Progress(JOB, tmp_path / "cache" / "unfinished")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for name in ("loop", "file"):
        with pytest.raises(OSError) as error:
            Progress(JOB, tmp_path / name / "unfinished")
        assert not isinstance(error.value, JobIsRunning)


def test_without_file_locks_nothing_is_saved_but_listing_works(tmp_path, monkeypatch, capsys):
    """As on network file systems that are mounted without them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "domainbed-reasoning" / "unfinished"
    key = write_progress(root).folder.name

    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Operation not supported"):
        Progress(JOB, root)
    assert cli.main(["jobs"]) == 0 and "1 interrupted job," in capsys.readouterr().out
    assert cli.main(["jobs", "--clear", key]) == 1 and "Operation not supported" in capsys.readouterr().err
    assert (root / key / "state.pt").exists()
    prune(root, keep=tmp_path)


def test_missing_home_folder_is_reported(monkeypatch, capsys):
    from domainbed_reasoning.bridge import upstream
    from domainbed_reasoning.files.cache import NoCacheFolder, cache_folder

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", upstream.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(NoCacheFolder, match="set HOME, or XDG_CACHE_HOME"):
        cache_folder()
    with pytest.raises(OSError, match="no home folder"):
        Progress(JOB)
    assert upstream.find_cached_spec() is None  # an import of a DomainBed that is nowhere fails as any other
    for name in ("jobs", "get-domainbed"):
        assert cli.main([name]) == 1 and "set HOME, or XDG_CACHE_HOME" in capsys.readouterr().err


def test_full_disk_at_the_start_releases_the_lock(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Progress(JOB, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    end_process(Progress(JOB, tmp_path))


def record(step, **more):
    return {"step": step, "loss": 0.5, "args": {"seed": 1}, "step_time": 1.5, "mem_gb": 0.25, **more}


def test_earlier_records_are_moved_and_those_of_other_jobs_stay(tmp_path):
    ours, other = [record(0), record(40)], record(0, args={"seed": 2})
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in (ours[0], other, ours[1])]
    (tmp_path / "results.jsonl").write_text("".join(lines) + '{"step": 80, "lo')
    assert own_records(tmp_path, {"seed": 2}) == lines[1]
    moved = set_aside(tmp_path, {"seed": 1})
    assert moved == lines[0] + lines[2] + '{"step": 80, "lo\n'
    assert (tmp_path / "results.jsonl").read_text() == lines[1]
    assert (tmp_path / "results.earlier.jsonl").read_text() == moved
    # The replay writes them again, with its own times; what was measured the first time counts.
    replayed = [record(0, step_time=0.001), record(40, step_time=0.001, loss=0.75)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in replayed))
    restore_measured(tmp_path, moved)
    rows = read_lines(tmp_path / "results.jsonl")
    assert [row["step_time"] for row in rows] == [1.5, 0.001]


def test_evaluation_values_are_added_only_to_their_own_record(tmp_path):
    results = tmp_path / "results.jsonl"
    assert not add_to_record(tmp_path, {"seed": 1}, 40, {"well_formed": 0.5})  # no records yet
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in (record(0), record(40))]
    results.write_text("".join(lines))
    for args, step in (({"seed": 1}, 0), ({"seed": 2}, 40)):  # the newest is of another step, of another job
        assert not add_to_record(tmp_path, args, step, {"well_formed": 0.5})
    assert results.read_text() == "".join(lines)
    for _ in range(2):
        assert add_to_record(tmp_path, {"seed": 1}, 40, {"well_formed": 0.5})
        assert read_lines(results) == [record(0), record(40, well_formed=0.5)]
    results.write_text("".join(lines) + '{"step": 80, "lo')
    assert not add_to_record(tmp_path, {"seed": 1}, 40, {"well_formed": 0.5})


def test_job_killed_before_a_complete_record_keeps_its_measured_values(tmp_path):
    """The replay completes the record; times and memory are those of the first time."""
    earlier = json.dumps(record(0)) + "\n"
    (tmp_path / "results.jsonl").write_text(json.dumps(record(0, step_time=0.001, well_formed=0.5)) + "\n")
    restore_measured(tmp_path, earlier)
    assert read_lines(tmp_path / "results.jsonl") == [record(0, well_formed=0.5)]


def test_set_aside_leaves_a_folder_without_records_alone(tmp_path):
    assert set_aside(tmp_path, {}) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = "import sys, os; from domainbed_reasoning.jobs.replay_log import Progress; from pathlib import Path; "
    code += f"Progress({JOB!r}, Path(sys.argv[1])); print('ready', flush=True); os.kill(os.getpid(), 9)"
    assert run_python("-c", code, tmp_path).returncode == -9
    Progress(JOB, tmp_path)
