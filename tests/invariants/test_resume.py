"""A killed and restarted job ends like an undisturbed one, bit for bit, on the CPU in float32."""

import json
import signal
from pathlib import Path

import pytest
import torch

from builders.processes import environment, run_python

KILLING = Path(__file__).with_name("killing.py")


# Three tokens name no class: the answers that are replayed are "no class".
UNPARSED = ["--algorithm", "MLLMZeroShot", "--kills", "1", "--steps", "1", "--answer", "chain", "--hparams"]


@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm", "RDMLDG", "--kills", "4", "--steps", "10"],
        pytest.param(
            ["--algorithm", "MLLMZeroShot", "--kills", "1", "--steps", "1", "--signal", "TERM"], marks=pytest.mark.slow
        ),
        pytest.param([*UNPARSED, '{"max_new_tokens": 3, "on_parse_failure": "wrong"}'], marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(options[1::8]),
)
def test_killed_job_resumes_and_ends_as_if_uninterrupted(either_domainbed, tmp_path, options):
    printed = run_script(either_domainbed, tmp_path, "killing.py", "--answer", "label", *options)
    assert printed["differing"] == [] and printed["left"] == []
    assert printed["kills"] == int(options[3])


@pytest.mark.slow
def test_killed_job_of_averaged_adapters_ends_as_if_uninterrupted(either_domainbed, tmp_path):
    """Evaluations after updates 3, 5 and 6 of one stage: rank 8 three times, whichever process computed them."""
    averaged = ["--checkpoint_freq", "2", "--hparams", '{"average_adapters": true}']
    options = ["--algorithm", "MTCT", "--kills", "3", "--steps", "6", "--answer", "label", *averaged]
    printed = run_script(either_domainbed, tmp_path, "killing.py", *options)
    assert printed["kills"] == 3 and printed["differing"] == [] and printed["left"] == []
    for name, rank in (("model_step0", 8), ("model_step2", 8), ("model_step4", 16), ("model", 24)):
        weights = torch.load(tmp_path / "killed" / f"{name}.pkl", weights_only=True)["model_dict"]
        assert {weight.shape[0] for key, weight in weights.items() if ".lora_A." in key} == {rank}, name


def run_script(domainbed, tmp_path, name, *options):
    """Run a script of this folder and return what it prints."""
    script = Path(__file__).with_name(name)
    done = run_python(script, "--folder", tmp_path, *options, env=environment(domainbed))
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("options", [pytest.param((), marks=pytest.mark.slow), ("--no-copy",)], ids=["copy", "no copy"])
def test_job_killed_during_evaluations_generates_no_chain_twice(either_domainbed, tmp_path, options):
    """Two kills in the first evaluation, one in the second; the round reuses chains of the first."""
    printed = run_script(either_domainbed, tmp_path, "mid_evaluation.py", *options)
    assert printed["ended"] == [signal.SIGKILL] * 3 + [0]
    assert printed["generated"] == printed["distinct"] == printed["images"] * printed["evaluations"]
    assert printed["evaluations"] == 2 and printed["accepted"] > 0
    assert printed["on_demand"] == 0 and printed["differing"] == []


SETTINGS = {"sarr_filter": "well_formed", "sarr_epoch_over": "kept", "on_parse_failure": "wrong", "answer": "chain"}


@pytest.mark.parametrize("settings", [{}, pytest.param(SETTINGS, marks=pytest.mark.slow)], ids=["paper", "settings"])
def test_job_killed_inside_sarr_rounds_ends_as_if_uninterrupted(either_domainbed, tmp_path, settings):
    """Records, self-labeled chains, answers and every checkpoint's adapters are equal, whatever was resumed.

    It would not be so if a resumed round labelled with the weights of the restart, forgot its labels or what they
    support, or entered the next round when it is resumed at its end.
    """
    printed = run_script(either_domainbed, tmp_path, "stops.py", "--hparams", json.dumps(settings))
    assert (printed["surplus"] > 0) == bool(settings)
    assert printed["killed"] == [signal.SIGKILL] * 4 and printed["ended"] == [0, 0]
    assert printed["differing"] == []
    assert min(printed["rounds"]) >= 3 and 0 < printed["kept"] < printed["chains"]  # else the test would show little


@pytest.mark.slow
def test_job_restarted_on_damaged_files_or_without_a_cache_ends_as_if_uninterrupted(either_domainbed, tmp_path):
    """Damaged files restart at step 0, an unusable cache disables saved progress; each is reported once."""
    printed = run_script(either_domainbed, tmp_path, "restarts.py")
    assert printed["ended"] == 0 and printed["killed"] == signal.SIGKILL
    for what, found in printed["found"].items():
        assert (found["status"], found["differing"], found["steps"]) == (0, [], [0, 2, 4]), what
        without_cache, resumed = what.startswith("cache"), found["goes on"]
        assert found["not kept"] == without_cache, what
        assert resumed + found["anew"] == (not without_cache), what
        if what in ("nothing", "flip job.json", "nest results.jsonl"):
            assert resumed, what
        elif not what.startswith("flip log"):  # a bit behind the state's part of it costs the evaluation alone
            assert not resumed, what
