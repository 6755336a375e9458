"""Atomic writes, leftovers of killed processes, and names planted by others."""

import fcntl
import os
import signal
import stat

import pytest

from builders.processes import run_python
from domainbed_reasoning.chains.store import write_records
from domainbed_reasoning.files import atomic
from domainbed_reasoning.files.atomic import name_beside, replace_text, replacing

WRITE_AND_DIE = (
    "import os, sys; from pathlib import Path; from domainbed_reasoning.files.atomic import replacing\n"
    "with replacing(Path(sys.argv[1])) as file:\n"
    "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
)


def others(path):
    return sorted(entry.name for entry in path.parent.iterdir() if entry != path)


def write_and_die(path):
    assert run_python("-c", WRITE_AND_DIE, path).returncode == -signal.SIGKILL


def test_leftovers_of_a_killed_process_are_removed_at_the_next_write(tmp_path):
    path = tmp_path / "versions.json"
    write_and_die(path)
    (left,) = others(path)
    assert left.startswith(".versions.json.") and not path.exists()
    replace_text(path, "whole")
    assert path.read_text() == "whole" and others(path) == []


def test_only_our_own_stale_files_are_removed(tmp_path):
    """One that is being written now, and files that are merely called alike, stay."""
    path = tmp_path / "a[1].json"
    alike = [".a[1].json.1234", ".a[1].json.notes.part", ".a1.json.0123456789abcdef.part", "a[1].json.part"]
    for name in alike:
        (tmp_path / name).write_text("mine")
    with replacing(path) as first:
        first.write(b"first")
        replace_text(path, "second")  # as another process would
        assert path.read_text() == "second"
    assert path.read_text() == "first" and others(path) == sorted(alike)


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Neither where the next name is guessed nor where the link stands in the target's place."""
    victim, path = tmp_path / "victim", tmp_path / "out.json"
    victim.write_text("precious")
    names = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: next(names))
    planted = tmp_path / f".out.json.{'0' * 16}.part"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_text(path, "text")
    assert victim.read_text() == "precious" and planted.is_symlink()  # no file of ours: it stays
    path.symlink_to(victim)
    replace_text(path, "text")
    assert victim.read_text() == "precious" and path.read_text() == "text" and not path.is_symlink()


def test_names_cannot_be_guessed(tmp_path):
    names = {name_beside(tmp_path / "a").name for _ in range(100)}
    assert len(names) == 100 and not any(str(os.getpid()) == name.split(".")[2] for name in names)
    assert len(name_beside(tmp_path / ("ä" * 120)).name.encode()) < 255


@pytest.mark.parametrize("durable", [False, True])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, durable):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path, durable) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and others(path) == []
    with replacing(path, durable) as file:
        file.write(b"new")
    assert path.read_text() == "new" and others(path) == []


def test_the_files_have_the_modes_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        replace_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_file_system_without_locks_is_written_but_not_cleaned(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_and_die(path)
    (left,) = others(path)

    def refuse(descriptor, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    replace_text(path, "text")
    assert path.read_text() == "text" and others(path) == [left]


def test_a_chain_file_is_replaced_in_the_same_way(tmp_path):
    path = tmp_path / "c.jsonl"
    write_and_die(path)
    assert write_records(path, [{"image": "a.png", "chain": "c"}]) == 1
    assert others(path) == []
