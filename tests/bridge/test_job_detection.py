"""A train job is recognized however the script is started: its steps, and records beside the results."""

import json
import shutil

import pytest

from builders.files import read_lines
from builders.processes import environment, run_python
from domainbed_reasoning.bridge.versions import FILE

HPARAMS = {"target_per_class": 1, "first_evaluation": 3, "answer": "label", "both_answers": False, "batch_size": 2}
OPTIONS = ["--dataset", "ShapesReasoning", "--algorithm", "MTCT", "--test_envs", "1", "--steps", "3", "--hparams"]
MODULE = "domainbed.scripts.train"
WAYS = {
    "file": ["domainbed/scripts/train.py"],
    "copy": ["-m", "domainbed.scripts.train_mine"],
    "cProfile": ["-m", "cProfile", "-o", "profile", "-m", MODULE],
}


@pytest.fixture
def clone(domainbed_root, tmp_path):
    """A clone of the user's own, with a copy of the train script in it."""
    shutil.copytree(domainbed_root / "domainbed", tmp_path / "clone" / "domainbed")
    scripts = tmp_path / "clone" / "domainbed" / "scripts"
    shutil.copy(scripts / "train.py", scripts / "train_mine.py")
    return tmp_path / "clone"


def start(clone, way, *more, **changes):
    """Run the job in a process of its own, and return it with its output folder."""
    out = clone / "out"
    options = [*OPTIONS, json.dumps(HPARAMS | changes), "--output_dir", out, *more]
    env = environment(clone, XDG_CACHE_HOME=str(clone / "cache"))
    return run_python(*WAYS[way], *options, cwd=clone, env=env), out


@pytest.mark.parametrize(
    ("domainbed_root", "way"),
    [("standin", "file"), ("upstream", "file"), pytest.param("standin", "cProfile", marks=pytest.mark.slow)],
    indirect=["domainbed_root"],
)
def test_a_job_is_recognized_however_it_is_started(clone, way):
    done, out = start(clone, way)
    assert done.returncode == 0, done.stderr
    assert "MTCT: supervised stage (steps 0-2) of 3 steps" in done.stdout
    assert "found no arguments" not in done.stdout
    assert json.loads((out / "task.json").read_text())["test_envs"] == [1]
    assert {FILE, "answers.json", "predictions.jsonl", "done"} <= {file.name for file in out.iterdir()}
    assert (
        list((clone / "cache" / "domainbed-reasoning" / "unfinished").iterdir()) == []
    )  # kept for a restart, then gone


def test_a_fork_that_copies_the_hparams_trains_on_the_datasets_names_and_chains(clone):
    script = clone / "domainbed" / "scripts" / "train_mine.py"
    code = script.read_text()
    script.write_text(code.replace("len(args.test_envs), hparams)", "len(args.test_envs), dict(hparams))"))
    assert script.read_text() != code
    done, out = start(clone, "copy")
    assert done.returncode == 0, done.stderr
    records = read_lines(out / "results.jsonl")
    assert records[0]["chain_share"] == 1.0
    assert "class 0" not in json.loads((out / "task.json").read_text())["class_names"]


def test_a_batch_that_no_split_fills_ends_a_baselines_job_instead_of_hanging_it(clone):
    done, out = start(clone, "file", "--algorithm", "ERM", batch_size=113)
    assert done.returncode == 1
    assert "has 112 images, fewer than batch_size 113" in done.stdout + done.stderr + (out / "err.txt").read_text()
    assert not (out / "results.jsonl").exists()
