"""An attempt at a job: what it leaves when it dies, and that no record is duplicated."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from domainbed_reasoning.jobs.results_file import without_replaced
from domainbed_reasoning.sweeps.launchers import attempts, jobs


def lines(*steps, run="a"):
    return [json.dumps({"step": step, "run": run}) for step in steps]


def run(command, printed="attempt 1 of 1"):
    return attempts.Attempt(jobs.parse_job(command), printed, os.environ).run()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 300, 600), (0, 300), {0: "b", 300: "b"}),  # it started again
        ((0, 300, 600), (600, 900), {0: "a", 300: "a", 600: "b", 900: "b"}),  # it resumed after 300
        ((0, 300), (600,), {0: "a", 300: "a", 600: "b"}),
        ((0, 300), (), {0: "a", 300: "a"}),  # it died before its first record
        ((), (0, 300), {0: "b", 300: "b"}),
    ],
)
def test_a_record_replaces_those_of_its_step_and_of_later_ones(first, second, expected):
    """The letters name the attempt that a kept record is from."""
    kept = [json.loads(line) for line in without_replaced([*lines(*first), *lines(*second, run="b")])]
    assert [(record["step"], record["run"]) for record in kept] == list(expected.items())


def test_a_line_that_a_kill_cut_short_is_dropped():
    whole = lines(0, 300)
    assert without_replaced([*whole, whole[1][:9]]) == whole


def test_second_attempt_finds_no_records_and_leaves_no_duplicates(sweep):
    """While it runs, `collect_results` sees its records alone."""
    code = """
    number = attempt()
    assert not (folder / "results.jsonl").exists()
    record(0); record(300)
    if number == 1: sys.exit(3)
    record(600)
    """
    command = sweep.job("A", code)
    assert run(command, "attempt 1 of 2") == 3
    assert sweep.steps("A") == [0, 300]
    assert run(command, "attempt 2 of 2") == 0
    assert sweep.steps("A") == [0, 300, 600]
    first, second = sweep.pids("A")
    aside = (sweep.folder / "A" / "results.earlier.jsonl").read_text()
    assert str(first) in aside and str(second) not in aside
    assert [line[:18] for line in sweep.log("A").splitlines()] == ["--- attempt 1 of 2", "--- attempt 2 of 2"]


def test_records_that_an_older_version_set_aside_come_first(sweep):
    """It numbered its files, one an attempt; here two of them died before the third resumed."""
    folder = sweep.folder / "A"
    command = sweep.job("A", "record(900)")
    folder.mkdir()
    for number, steps in ((10, (600,)), (2, (0, 300, 600))):
        (folder / f"results.jsonl.attempt-{number}").write_text("".join(f"{line}\n" for line in lines(*steps)))
    assert run(command) == 0
    assert sweep.steps("A") == [0, 300, 600, 900]


def test_an_attempt_that_resumes_is_joined_to_the_first(sweep):
    """The first dies after 300; the second continues at 600, with or without records elsewhere."""
    code = "if attempt() == 1: record(0); record(300); sys.exit(9)\nrecord(600); record(900)"
    command = sweep.job("A", code)
    assert run(command) == 9
    assert run(command) == 0
    assert sweep.steps("A") == [0, 300, 600, 900]


def test_failed_job_leaves_no_partial_line(sweep):
    """Stock `collect_results` reads every line of every job, and ends at one that is no JSON."""
    command = sweep.job("A", "record(0); (folder / 'results.jsonl').open('a').write('{\"step\": 30'); sys.exit(1)")
    assert run(command) == 1
    assert sweep.steps("A") == [0]


def test_a_job_that_is_done_is_not_run_again(sweep):
    """A queue may start a job again that ended as its node was lost."""
    command = sweep.job("A", "attempt(); record(0); done()")
    assert run(command) == run(command) == 0
    assert len(sweep.pids("A")) == 1


def test_the_end_of_input_ends_the_train_process_and_its_children(sweep):
    """Whoever holds the other end of the pipe may have been killed with SIGKILL."""
    code = """
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    (here / "child").write_text(str(child.pid))
    attempt()
    wait_for("never")
    """
    module = [sys.executable, "-m", "domainbed_reasoning.sweeps.launchers.attempts", "--command", sweep.job("A", code)]
    process = subprocess.Popen(module, stdin=subprocess.PIPE)
    train = sweep.wait_for_attempt("A", 1)
    child = int((sweep.folder / "child").read_text())
    process.stdin.close()
    assert process.wait(600) == 128 + 15
    sweep.wait_until(lambda: not sweep.is_running(train) and not sweep.is_running(child))


def test_attempt_still_running_elsewhere_ends_when_the_next_one_starts(sweep):
    """A node that its queue has given up may run its job to the end, and write into the same folder all the while."""
    code = """
    number = attempt()
    record(0)
    if number == 1:
        while True: record(300); time.sleep(0.05)
    record(600)
    done()
    """
    command = sweep.job("A", code)
    first = attempts.Attempt(jobs.parse_job(command), "attempt 1 of 2", os.environ)
    exit_codes = []
    thread = threading.Thread(target=lambda: exit_codes.append(first.run()))
    thread.start()
    train = sweep.wait_for_attempt("A", 1)
    assert run(command, "attempt 2 of 2") == 0
    thread.join(600)
    assert first.replaced and exit_codes == [-15]
    assert not sweep.is_running(train)
    assert sweep.steps("A") == [0, 600]
    assert "attempt 1 of 2: replaced by a later attempt" in sweep.log("A")
    assert not list((sweep.folder / "A").glob("*.running"))


def test_attempt_that_died_with_its_node_is_only_waited_for_briefly(sweep, monkeypatch):
    monkeypatch.setattr(attempts, "_REPLACE_SECONDS", 0.5)
    command = sweep.job("A", "record(0); done()")
    (sweep.folder / "A").mkdir()
    dead = sweep.folder / "A" / "attempt-0.running"
    dead.write_text("runs")
    looks = []
    sleep = time.sleep
    monkeypatch.setattr(attempts.time, "sleep", lambda seconds: (looks.append(dead.exists()), sleep(seconds)))
    assert run(command) == 0
    assert looks[0]  # it was waited for, and not for ever
    assert sweep.steps("A") == [0]
    assert not dead.exists()
