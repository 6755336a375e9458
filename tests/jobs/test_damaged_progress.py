"""Progress files that were modified: the job restarts from step 0 with a message, or the result is unchanged."""

import json
import os
import random
import shutil

import pytest
import torch

from domainbed_reasoning.jobs.replay_log import Answers, Progress
from domainbed_reasoning.jobs.results_file import own_records, set_aside
from domainbed_reasoning.jobs.resume_store import JobIsRunning, list_progress

JOB = {"args": {"algorithm": "RDMLDG", "dataset": "D", "test_envs": [0], "output_dir": "nowhere"}}
ADAPTERS = [{"lora": torch.arange(4.0) + step} for step in range(2)]
WEIGHTS = torch.arange(40.0)


def write_progress(root):
    """The folder of a job that was killed in the evaluation after its second step, of which every model is kept."""
    progress = Progress(JOB, root)
    for step in range(2):
        progress.record_step({"loss": step / 7, "stage": float(step)}, [(0, step, "chain", True)])
        progress.save(step + 1, lambda: {"weights": WEIGHTS}, now=True)
        progress.record_answers(Answers([step, 1], ["a", "b"], None))
        if step == 0:
            assert progress.kept("adapters-1.pt", ADAPTERS[0], replays=False) is ADAPTERS[0]
    progress.close()
    return progress.folder


@pytest.fixture(scope="module")
def progress_folder(tmp_path_factory):
    return write_progress(tmp_path_factory.mktemp("past"))


@pytest.fixture
def kept(progress_folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(progress_folder, tmp_path / progress_folder.name)


def restart(folder, capsys):
    """Start the job again; return what it replays, None where it begins at step 0, and what is printed."""
    capsys.readouterr()
    progress = Progress(JOB, folder.parent)
    printed = capsys.readouterr().out
    assert (progress.state is not None) == progress.replays
    replayed = None
    if progress.replays:
        replayed = [progress.next_step(), progress.next_answers(2)]
        kept = progress.kept("adapters-1.pt", {"lora": torch.zeros(4)}, replays=True)
        assert torch.equal(kept["lora"], ADAPTERS[0]["lora"]) and torch.equal(progress.state["weights"], WEIGHTS)
        replayed += [progress.next_step()]
        if progress.replays:  # of the last evaluation, which the state came before
            replayed += [progress.next_answers(2)]
        assert not progress.replays
    else:
        assert {path.name for path in folder.iterdir()} == {"lock", "log.jsonl", "job.json"}
        assert (folder / "log.jsonl").read_bytes() == b""
    progress.close()
    return replayed, printed


def test_intact_progress_is_replayed_silently(kept, capsys):
    assert restart(kept, capsys) == (
        [
            {"loss": 0.0, "stage": 0.0},
            Answers([0, 1], ["a", "b"], None),
            {"loss": 1 / 7, "stage": 1.0},
            Answers([1, 1], ["a", "b"], None),
        ],
        "",
    )


def test_any_flipped_bit_restarts_at_step_0_or_has_no_effect(progress_folder, tmp_path, capsys):
    """In each file at places drawn at random: nothing but the undisturbed past is ever replayed."""
    draw = random.Random(0)
    sound, _ = restart(shutil.copytree(progress_folder, tmp_path / "sound" / progress_folder.name), capsys)
    begun_anew = {}
    for name in ("state.pt", "log.jsonl", "adapters-1.pt", "job.json"):
        for number in range(40):
            folder = shutil.copytree(progress_folder, tmp_path / f"{name}-{number}" / progress_folder.name)
            data = bytearray((folder / name).read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(data)
            replayed, printed = restart(folder, capsys)
            assert replayed in (None, sound, sound[:3])
            assert (replayed is None) == ("cannot be used" in printed and "Starting from step 0" in printed)
            assert replayed is not None or f": {name} " in printed
            begun_anew[name] = begun_anew.get(name, 0) + (replayed is None)
    assert begun_anew["state.pt"] == begun_anew["adapters-1.pt"] == 40 and begun_anew["job.json"] == 0
    assert begun_anew["log.jsonl"] > 20  # the rest are answers after the state, which are asked for again


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_text(path):
    path.write_text("not found")


def replace_by_folder(path):
    path.unlink()
    (path / "inner").mkdir(parents=True)


def replace_by_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replace_by_object(path):
    torch.save([1], path)


def repeat(path):
    path.write_bytes(path.read_bytes() * 2)


DAMAGES = (remove, empty, cut, replace_by_text, replace_by_folder, replace_by_link, replace_by_object, repeat)


@pytest.mark.parametrize("name", ["state.pt", "log.jsonl", "adapters-1.pt"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_missing_or_replaced_files_are_named_and_the_job_restarts(kept, capsys, name, damage):
    damage(kept / name)
    replayed, printed = restart(kept, capsys)
    if (name, damage) == ("log.jsonl", repeat):  # what follows the sound part belongs to nothing
        assert replayed is not None and len(replayed) == 4
        return
    assert replayed is None and printed.count("\n") == 1
    assert f"cannot be used: {name} " in printed and "Starting from step 0" in printed


@pytest.mark.parametrize("line", [0, 1, 2])
def test_dropped_changed_or_deeply_nested_lines_are_detected(kept, capsys, line):
    log = kept / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    changes = {
        "dropped": [*lines[:line], *lines[line + 1 :]],
        "swapped": [*lines[:line], lines[line + 1], lines[line], *lines[line + 2 :]],
        "changed": [*lines[:line], lines[line].replace(b"1", b"2", 1), *lines[line + 1 :]],
        "nested": [*lines[:line], b"[" * 100_000 + b"\n", *lines[line + 1 :]],
    }
    for number, (name, damaged) in enumerate(changes.items()):
        folder = shutil.copytree(kept, kept.parent / str(number) / kept.name)
        (folder / "log.jsonl").write_bytes(b"".join(damaged))
        replayed, printed = restart(folder, capsys)
        assert replayed is None and "log.jsonl is damaged or cut off" in printed, name


@pytest.mark.parametrize(
    "state", [[1], {"format": 1}, {"steps": 1}, {"format": 2, "steps": "two"}, None, 3, torch.ones(2)]
)
def test_valid_file_of_another_kind_is_not_a_state(kept, capsys, state):
    from domainbed_reasoning.jobs.sealed import write_tensors

    write_tensors(kept / "state.pt", state)
    replayed, printed = restart(kept, capsys)
    assert replayed is None and "state.pt is not a saved state" in printed


def test_progress_of_a_newer_version_is_refused_and_kept_and_of_an_older_one_the_job_starts_over(kept, capsys):
    from domainbed_reasoning.jobs.sealed import read_tensors, write_tensors

    state = read_tensors(kept / "state.pt")
    write_tensors(kept / "state.pt", state | {"format": 3})
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(RuntimeError, match=r"version 3.*up to version 2\. Upgrade domainbed-reasoning.* jobs --clear"):
        Progress(JOB, kept.parent)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    write_tensors(kept / "state.pt", state | {"format": 1})
    replayed, said = restart(kept, capsys)
    assert replayed is None and "has format 1, this version reads 2" in said


def test_adapters_of_another_run_are_rejected(kept, capsys):
    """They are sound themselves, but not those that the state was saved with."""
    from domainbed_reasoning.jobs.sealed import write_tensors

    write_tensors(kept / "adapters-1.pt", ADAPTERS[1])
    replayed, printed = restart(kept, capsys)
    assert replayed is None and "adapters-1.pt does not belong to the saved state" in printed


def test_adapters_deleted_during_replay_raise_with_a_fix(kept):
    """Initial weights are never handed out for trained ones."""
    progress = Progress(JOB, kept.parent)
    (kept / "adapters-1.pt").unlink()
    with pytest.raises(RuntimeError, match=r"adapters-1.pt is missing.*jobs --clear"):
        progress.kept("adapters-1.pt", {"lora": torch.zeros(4)}, replays=True)
    progress.close()


def test_adapters_newer_than_the_state_are_rewritten(kept):
    """The checkpoint at which the job was killed may be truncated."""
    progress = Progress(JOB, kept.parent)
    (kept / "adapters-2.pt").write_bytes(b"PK")
    progress.kept("adapters-2.pt", ADAPTERS[1], replays=False)
    progress.record_step({"loss": 1.0, "stage": 1.0}, [])
    progress.save(3, lambda: {"weights": WEIGHTS}, now=True)
    progress.close()
    again = Progress(JOB, kept.parent)
    assert torch.equal(again.kept("adapters-2.pt", {}, replays=True)["lora"], ADAPTERS[1]["lora"])
    again.close()


def test_failed_start_releases_the_lock(kept, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("DOMAINBED_REASONING_UNFINISHED_GB", "many")
        with pytest.raises(ValueError, match="number of gigabytes"):
            Progress(JOB, kept.parent)
    progress = Progress(JOB, kept.parent)
    assert progress.replays
    with pytest.raises(JobIsRunning):
        Progress(JOB, kept.parent)
    progress.close()
    Progress(JOB, kept.parent).close()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"args": {"output_dir": 5}}', '{"args": {"output_dir": "a\\u0000b"}}', "\udcff", "{}"]
)
def test_damaged_description_of_another_job_is_ignored(kept, text):
    (kept / "job.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (found,) = list_progress(kept.parent)
    assert found.steps == 2 and not found.done
    Progress({"args": {"output_dir": "mine"}}, kept.parent).close()


def test_deeply_nested_or_undecodable_records_are_set_aside(tmp_path):
    """Lines that are no record go with those of the job; another job's stay as they are, byte for byte."""
    other = b'{"args": {"seed": 2}, "name": "\xc3\xa4"}\n'
    odd = b"[" * 100_000 + b'\n\xff\xfe{"step": 1\n{"args": {"seed": 1}, "step": 0}\n'
    (tmp_path / "results.jsonl").write_bytes(other + odd)
    assert json.loads(own_records(tmp_path, {"seed": 1}))["step"] == 0
    moved = set_aside(tmp_path, {"seed": 1})
    assert moved.endswith('{"args": {"seed": 1}, "step": 0}\n')
    assert (tmp_path / "results.jsonl").read_bytes() == other
    assert (tmp_path / "results.earlier.jsonl").read_bytes() == odd
    assert sorted(os.listdir(tmp_path)) == ["results.earlier.jsonl", "results.jsonl"]
