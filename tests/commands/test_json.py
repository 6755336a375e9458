"""``--json``: one document on standard output, with the numbers of the text, whatever the verb prints otherwise."""

import json

import pytest

from domainbed_reasoning.commands.arguments import as_json
from domainbed_reasoning.jobs.replay_log import Progress


def document(verb, *words, code=0):
    ended, out, err = verb(*words, "--json")
    assert ended == code, err
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=pytest.fail)


def test_numbers_that_json_lacks_become_null_and_other_objects_texts(tmp_path):
    numpy = pytest.importorskip("numpy")
    value = {"a": float("nan"), 1: (numpy.float32(0.5), numpy.int64(3), True), "b": tmp_path, "c": float("inf")}
    assert json.loads(as_json(value)) == {"a": None, "1": [0.5, 3, True], "b": str(tmp_path), "c": None}


def test_jobs_lists_what_is_saved(verb, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    progress = Progress({"args": {"algorithm": "MTCT", "output_dir": "job"}})
    found = document(verb, "jobs")
    progress.close()
    assert found["folder"] == str(progress.folder.parent)
    (job,) = found["jobs"]
    assert (job["key"], job["state"], job["steps"]) == (progress.key, "running", 0)
    assert job["args"] == {"algorithm": "MTCT", "output_dir": "job"} and job["bytes"] > 0
    assert verb("jobs", "--json", "--clear", "all")[0] == 2


def test_doctor_lists_its_findings(verb):
    ended, out, _ = verb("doctor", "--json")
    found = json.loads(out)
    assert found["ready"] is (ended == 0)
    assert {"Plug-in", "Packages", "DomainBed", "Devices"} <= found["checks"].keys()
    assert all(finding.keys() == {"text", "fix", "fatal"} for part in found["checks"].values() for finding in part)


def test_studies_are_listed_and_described_with_the_commands_of_the_text(verb):
    assert "ablation" in [study["name"] for study in document(verb, "study")]
    found = document(verb, "study", "ablation", "--scale", "mini")
    text = verb("study", "ablation", "--scale", "mini")[1]
    assert found["jobs"] == 28 and all(command in text.splitlines() for command in found["commands"])
    assert verb("study", "ablation", "--json", "--launch")[0] == 2


def test_plan_has_the_hours_and_the_memory_of_the_text(verb):
    words = ("plan", "--dataset", "PACS", "--model", "tiny", "--gpu", "H200")
    found = document(verb, *words)
    assert (found["images"], found["domains"], found["fits"]) == (9991, 4, True)
    hours = found["hours"]
    assert hours["job"] == pytest.approx(hours["training"] + hours["labeling"] + hours["evaluation"])
    assert f"{60 * hours['job']:.1f} min" in verb(*words)[1] or f"{hours['job']:.1f} hours" in verb(*words)[1]
    assert hours["table"] == pytest.approx(4 * hours["job"]) and found["jobs"]["sweep"] == 4 * 60
    assert {"hparams", "hours", "drawback"} == found["cheaper"][0].keys()
    assert found["basis"] == "counted" and not any(rate["measured"] for rate in found["rates"].values())
