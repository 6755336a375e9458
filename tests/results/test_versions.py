"""`versions.json`: what a job ran on, written once, never at the job's expense, and mixed versions reported."""

import argparse
import json

import pytest

from builders.processes import as_train_script, git
from domainbed_reasoning.bridge import upstream, versions
from domainbed_reasoning.results import collect
from domainbed_reasoning.results.report.commands import versions_table as versions_beside_ours
from domainbed_reasoning.results.tables import versions_table


@pytest.fixture
def train_job(monkeypatch):
    """``train_job(folder)`` makes this process look like the stock train script with that ``--output_dir``."""

    def install(folder):
        names = ("algorithm", "dataset", "test_envs", "steps", "trial_seed", "holdout_fraction")
        as_train_script(monkeypatch, args=argparse.Namespace(**dict.fromkeys(names), output_dir=str(folder)))

    return install


def test_a_job_writes_its_versions_once(train_job, tmp_path, monkeypatch):
    train_job(tmp_path)
    versions.record_for_job()
    recorded = json.loads((tmp_path / versions.FILE).read_text())
    assert set(recorded) == {"domainbed-reasoning", "DomainBed", "libraries", "device"}
    assert set(recorded["domainbed-reasoning"]) == {"version", "digest", "commit", "modified"}
    assert recorded["libraries"]["torch"] == versions.installed("torch") and recorded["libraries"]["Python"]
    monkeypatch.setattr(versions, "current", lambda: pytest.fail("asked again"))
    versions.record_for_job()


def test_without_a_job_no_file_is_written(monkeypatch):
    monkeypatch.setattr(versions, "current", lambda: pytest.fail("asked"))
    versions.record_for_job()


def test_errors_in_version_recording_do_not_stop_the_job(train_job, tmp_path, capsys):
    train_job(tmp_path / "nowhere")
    versions.record_for_job()
    assert "Could not record the versions of this job: FileNotFoundError" in capsys.readouterr().out


def test_a_commit_is_named_and_whether_files_differ_from_it(tmp_path):
    """No clone, a clone as committed, one with a further file, one in a folder above: that is not the package's."""
    nothing = {"commit": None, "modified": None}
    assert versions._commit(tmp_path) == nothing
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    commit = upstream.commit_of(tmp_path)
    assert versions._commit(tmp_path) == {"commit": commit, "modified": False} and len(commit) == 40
    (tmp_path / "b").write_text("2")
    assert versions._commit(tmp_path) == {"commit": commit, "modified": True}
    (tmp_path / "site-packages").mkdir()
    assert versions._commit(tmp_path / "site-packages") == nothing


def test_without_git_no_commit_is_recorded(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert versions._commit(tmp_path) == {"commit": None, "modified": None}
    assert upstream.is_modified(tmp_path) is None


def test_versions_are_read_from_any_file_content():
    assert versions.spelt({}) == {}
    assert versions.spelt({"domainbed-reasoning": [1], "DomainBed": 2, "libraries": "x", "device": {}}) == {}
    ours = {"version": "0.1.0", "commit": "0123456789abcdef", "modified": True}
    text = versions.spelt({"domainbed-reasoning": ours, "DomainBed": {"stand_in": True}, "libraries": {"a": None}})
    assert text == {"domainbed-reasoning": "0.1.0, commit 0123456789ab, modified", "DomainBed": "stand-in"}


def test_codes_without_a_commit_are_distinguished_by_their_files():
    """As of wheels, or of two states of a checkout with changes; a commit alone says it where nothing differs."""

    def spelt(**recorded):
        return versions.spelt({"domainbed-reasoning": {"version": "0.1.0", "digest": "0123456789abcdef", **recorded}})

    assert list(spelt(commit=None, modified=None).values()) == ["0.1.0, files 0123456789ab"]
    assert list(spelt(commit="a" * 40, modified=True).values()) == [
        "0.1.0, commit aaaaaaaaaaaa, modified, files 0123456789ab"
    ]
    assert list(spelt(commit="a" * 40, modified=False).values()) == ["0.1.0, commit aaaaaaaaaaaa"]
    assert list(spelt(digest=None).values()) == ["0.1.0"]


def test_jobs_of_two_commits_are_named_and_counted(write_job):
    """Three jobs, one of another commit and torch; a fourth recorded nothing, which is no other version."""
    jobs = [write_job(name, target=target) for target, name in enumerate(("one", "two", "three"))]
    for job in jobs:
        write_versions(job, "a" * 40, "2.8.0")
    write_versions(jobs[2], "b" * 40, "2.9.1")
    write_job("old", "CORAL")
    frame = collect(write_job.folder)
    (problem,) = [one for one in frame.attrs["problems"] if one["kind"] == "mixed versions"]
    assert problem["job"] == "1 of 4 jobs" and problem["folders"] == ("three",)
    assert "torch: 2.8.0 (2 jobs), 2.9.1 (1 job)" in problem["detail"]
    assert "commit aaaaaaaaaaaa (2 jobs)" in problem["detail"] and "commit bbbbbbbbbbbb (1 job)" in problem["detail"]
    table = dict(versions_table(frame).rows)
    assert table["torch"] == "2.8.0 (2 jobs), 2.9.1 (1 job)" and table["device"] == "CPU"
    assert set(frame["version"].dropna()) == {"0.1.0, commit aaaaaaaaaaaa", "0.1.0, commit bbbbbbbbbbbb"}


def test_report_has_recorded_and_current_versions(write_job):
    from domainbed_reasoning.results.job_folders import read_jobs

    write_versions(write_job("one"), "a" * 40, "2.8.0")
    rows = {name: (then, now) for name, then, now in versions_beside_ours(read_jobs(write_job.folder)).rows}
    assert rows["torch"] == ("2.8.0", versions.installed("torch"))
    assert rows["domainbed-reasoning"][0] == "0.1.0, commit aaaaaaaaaaaa"


def write_versions(job, commit, torch):
    recorded = {
        "domainbed-reasoning": {"version": "0.1.0", "commit": commit, "modified": False},
        "DomainBed": {"commit": upstream.COMMIT, "modified": False},
        "libraries": {"torch": torch},
        "device": "CPU",
    }
    (job / versions.FILE).write_text(json.dumps(recorded))
