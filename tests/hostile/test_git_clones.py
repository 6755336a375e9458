"""Untrusted git clones: `doctor` and versions read them, and nothing that they configure runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from builders.processes import git
from domainbed_reasoning.bridge import upstream


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that the planted programs make."""
    return tmp_path / "owned"


@pytest.fixture
def clone(tmp_path: Path, trap: Path) -> Path:
    """A clone whose configuration, attributes and hooks name a program wherever git runs one."""
    folder = tmp_path / "clone"
    (folder / "domainbed").mkdir(parents=True)
    (folder / "domainbed" / "__init__.py").write_text("")
    (folder / "data.bin").write_text("data\n")
    (folder / "left").write_text("left\n")
    (folder / ".gitattributes").write_text("*.bin filter=own diff=own\n*.py filter=own\n")
    (folder / ".gitignore").write_text("*.pyc\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "one")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho \"$0\" >> '{trap}'\ncat\n")
    program.chmod(0o755)
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("post-index-change", "fsmonitor-watchman", "post-checkout", "reference-transaction", "pre-auto-gc"):
        (hooks / name).write_bytes(program.read_bytes())
        (hooks / name).chmod(0o755)
        (folder / ".git" / "hooks").mkdir(exist_ok=True)
        (folder / ".git" / "hooks" / name).write_bytes(program.read_bytes())
        (folder / ".git" / "hooks" / name).chmod(0o755)
    included = tmp_path / "included"
    included.write_text(f"[core]\n\tfsmonitor = {program}\n")
    for name, value in {
        "core.fsmonitor": program,
        "core.hooksPath": hooks,
        "core.pager": program,
        "core.sshCommand": program,
        "core.editor": program,
        "core.askPass": program,
        "core.gitProxy": program,
        "core.alternateRefsCommand": program,
        "diff.external": program,
        "diff.own.textconv": program,
        "diff.own.command": program,
        "filter.own.clean": program,
        "filter.own.smudge": program,
        "filter.own.process": program,
        "alias.status": f"!{program}",
        "alias.rev-parse": f"!{program}",
        "gpg.program": program,
        "credential.helper": f"!{program}",
        "include.path": included,
        "uploadpack.packObjectsHook": program,
        "remote.origin.url": f"ext::{program}",
        "remote.origin.promisor": "true",
    }.items():
        git(folder, "config", name, str(value))
    (folder / "data.bin").touch()  # git has to look into it again
    return folder


def _commit(folder: Path) -> str:
    return (folder / ".git" / "refs" / "heads" / _branch(folder)).read_text().strip()


def _branch(folder: Path) -> str:
    return (folder / ".git" / "HEAD").read_text().strip().rpartition("/")[2]


def test_planted_programs_run_with_plain_git(clone: Path, trap: Path) -> None:
    """Else the next test would show nothing."""
    subprocess.run(["git", "-C", str(clone), "status"], capture_output=True)
    assert trap.exists()


def test_inspecting_a_clone_runs_no_configured_program(clone: Path, trap: Path) -> None:
    assert upstream.commit_of(clone) == _commit(clone)
    assert upstream.is_modified(clone) is False
    assert f"is at commit {_commit(clone)}" in (upstream.problem_with(clone) or "")
    assert "not the pinned one" in upstream.describe(clone) and "modified" not in upstream.describe(clone)
    assert not trap.exists()


@pytest.mark.parametrize("change", ["edited", "added", "deleted", "edited and marked as unchanged"])
def test_modified_clone_is_detected_without_running_programs(clone: Path, trap: Path, change: str) -> None:
    if change == "added":
        (clone / "domainbed" / "more.py").write_text("")
    elif change == "deleted":
        (clone / "left").unlink()
    else:
        if "marked" in change:
            git(clone, "-c", "core.fsmonitor=false", "update-index", "--assume-unchanged", "left")
            trap.unlink(missing_ok=True)
        (clone / "left").write_text("here\n")
    assert upstream.is_modified(clone) is True
    assert not trap.exists()


def test_ignored_files_are_not_modifications(clone: Path, trap: Path) -> None:
    (clone / "a.pyc").write_text("")
    (clone / "mine.txt").write_text("")
    (clone / ".git" / "info").mkdir(exist_ok=True)
    (clone / ".git" / "info" / "exclude").write_text("mine.txt\n")
    assert upstream.is_modified(clone) is False and not trap.exists()


def test_git_environment_variables_are_ignored(
    clone: Path, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(tmp_path / "program"))
    assert upstream.commit_of(clone) == _commit(clone) and upstream.is_modified(clone) is False
    assert not trap.exists()


def test_inspecting_a_clone_does_not_modify_it(clone: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in clone.rglob("*")}
    upstream.is_modified(clone)
    assert {path: path.stat().st_mtime_ns for path in clone.rglob("*")} == before
