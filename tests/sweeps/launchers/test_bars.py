"""Bars of a launcher: all jobs and each running job on a terminal, and nothing elsewhere."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from domainbed_reasoning.jobs import progress
from domainbed_reasoning.sweeps.launchers.bars import Bars
from domainbed_reasoning.sweeps.launchers.jobs import Failure, parse_job


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def jobs(tmp_path):
    command = "python -m domainbed.scripts.train --algorithm {} --dataset PACS --test_envs 1 --output_dir {}"
    return [parse_job(command.format(name, tmp_path / name)) for name in ("MTCT", "ERM")]


def test_every_running_job_has_a_bar_with_its_current_task(jobs, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bars(jobs) as bars:
        files = [bars.start(job, waiting=1 - place)[progress.VARIABLE] for place, job in enumerate(jobs)]
        Path(files[0]).write_text('{"task": "MTCT\'s updates", "done": 30, "total": 40}')
        assert bars.shown
        bars.refresh()
        bars.end(jobs[0], None)
        bars.end(jobs[1], Failure(parse_job(jobs[1].command), 3))
    printed = terminal.getvalue()
    assert "MTCT on PACS, target 1: MTCT's updates:  75%" in printed and "30/40" in printed
    assert "ERM on PACS, target 1:   0%" in printed and "2 running, 0 waiting" in printed
    assert "2/2" in printed and "FAILED: ERM on PACS, target 1 (exit code 3)" in printed
    assert not Path(files[0]).parent.exists()


def test_without_a_terminal_only_failures_are_printed(jobs, monkeypatch):
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    with Bars(jobs) as bars:
        bars.start(jobs[0], waiting=1)
        bars.end(jobs[0], None)
        bars.end(jobs[1], Failure(jobs[1], None, "canceled"))
    assert not bars.shown
    assert output.getvalue().strip() == "FAILED: ERM on PACS, target 1 (canceled)"


def test_a_job_reports_at_most_once_a_second(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "now"))
    clock = iter([0.0, 0.5, 1.5, 2.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = progress.ProgressLog("MTCT's updates", 40, "update")
    log.add(1, 0.5)
    assert not (tmp_path / "now").exists()
    log.add(1, 1.0)
    log.add(1, 0.5)
    assert json.loads((tmp_path / "now").read_text()) == {"task": "MTCT's updates", "done": 2, "total": 40}


def test_a_job_whose_launcher_has_ended_continues(tmp_path, monkeypatch):
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "gone" / "now"))
    clock = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = progress.ProgressLog("MTCT's updates", 40, "update")
    log.add(1, 1.0)
    assert progress.VARIABLE not in os.environ
    log.add(1, 1.0)
