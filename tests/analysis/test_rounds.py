"""SARR's rounds from a job's records and checkpoints."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from builders.files import read_lines
from domainbed_reasoning.analysis import rounds
from domainbed_reasoning.analysis.checkpoints import open_checkpoint, records_of
from domainbed_reasoning.chains.chain import count_words
from domainbed_reasoning.commands.analyze_jobs import _distinct
from domainbed_reasoning.jobs.trained import JobError


def test_stages_and_accepted_shares_are_those_of_the_records(job):
    """21 steps: MTCT takes 0-10, the round 11-20."""
    rows = rounds.from_records(job, [3])
    assert [(row["step"], row["stage"]) for row in rows] == [(0, -1), (10, 0), (20, 1)]
    records = read_lines(job / "results.jsonl")
    assert [row["accepted"] for row in rows] == [None, None, records[-1]["sarr1_accepted"]]
    assert rows[-1]["target"] == records[-1]["env3_in_acc"]
    assert rows[-1]["source_out"] == pytest.approx(sum(records[-1][f"env{env}_out_acc"] for env in range(3)) / 3)


def test_the_last_rounds_share_is_exact_and_every_record_has_the_share_of_well_formed_chains(job):
    """A share of so many chains as the log counts: a mean of shares so far would be none."""
    records, log = read_lines(job / "results.jsonl"), (job / "out.txt").read_text()
    percent, written = re.search(r"kept ([\d.]+)% of (\d+) self-labeled chains", log).groups()
    kept = records[-1]["sarr1_accepted"] * int(written)
    assert kept == pytest.approx(round(kept), abs=1e-9) and f"{100 * kept / int(written):.1f}" == percent
    assert 0 < records[-1]["sarr1_well_formed"] <= 1
    rows = read_lines(job / "predictions.jsonl")
    assert records[-1]["well_formed"] == sum(row["well_formed"] for row in rows) / len(rows)
    assert not any("well_formed" in record for record in records[:-1])  # these evaluations answer by the class name


def test_a_job_says_at_its_start_what_an_epoch_is_and_how_often_it_passes_over_each_domain(job):
    """112 training images a domain; 11 steps of 6 are 0.6 passes, and leave (111/112)^66 = 55% undrawn."""
    log = (job / "out.txt").read_text()
    assert (
        "RDMLDG: an epoch is 19 steps of 6 images from each of 3 source domains, drawn with replacement: 342 draws"
        in log
    )
    assert "RDMLDG: passes (never drawn) in supervised stage (steps 0-10): photo 0.6 (55%), cartoon 0.6 (55%)" in log
    assert log.index("an epoch is") < log.index("steps 0-10) of 21 steps")


def test_the_share_of_a_round_is_the_one_that_stands_after_it(tmp_path):
    """Two rounds of two evaluations each. Of the first the share that the second's records repeat, 0.5; of the last the
    mean over its last steps, 0.8. The record's own stage is a mean, 1.5 where the evaluation spans both rounds."""
    told = [(0, {}), (10, {1: 0.9}), (20, {1: 0.7}), (30, {1: 0.55, 2: 0.6}), (40, {1: 0.5, 2: 0.8})]
    lines = [
        {"step": step, "stage": step / 20, "env0_in_acc": 0.1, "env1_out_acc": 0.2}
        | {f"sarr{k}_accepted": share for k, share in shares.items()}
        for step, shares in told
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = rounds.from_records(tmp_path, [0])
    assert [row["stage"] for row in rows] == [-1, 1, 1, 2, 2]
    assert [row["accepted"] for row in rows] == [None, 0.5, 0.5, 0.8, 0.8]


def test_checkpoints_answer_as_the_job_recorded(job, material, checkpoint):
    """Asked about every image of the target's training split, the last checkpoint has the recorded accuracies."""
    answered = read_lines(job / "predictions.jsonl")
    kept = [row for row in answered if row["env"] == 3 and row["split"] == "in"][:40]
    samples = [(3, row["index"]) for row in kept]
    found = rounds.from_checkpoints(job, [0, 10, 20], material, samples)
    assert list(found) == [0, 10, 20]
    assert found[20]["chain"] == sum(row["chain_answer"] == row["label"] for row in kept) / 40
    assert found[20]["label"] == sum(row["label_answer"] == row["label"] for row in kept) / 40
    assert found[20]["agreement"] == sum(row["chain_answer"] == row["label_answer"] for row in kept) / 40
    assert found[20]["words"] == sum(count_words(row["chain"]) for row in kept) / 40
    assert found[0] != found[20]


def test_checkpoints_of_a_job_that_votes_answer_by_vote(material, trained, monkeypatch):
    """Three chains an image at the votes' temperature: wug, dax, dax make dax."""
    samples = [(3, index) for index in range(7)]
    drawn, asked = iter(["wug", "dax", "dax"]), []

    def generate(self, images, question, max_new_tokens, *sampling):
        asked.append(sampling)
        return [f"<CONCLUSION>{answer}</CONCLUSION>" for answer in [next(drawn)] * len(images)]

    monkeypatch.setattr(type(trained), "generate", generate)
    found = rounds.answer_both_ways(trained, material, samples, 40, 7, 3, 0.9)
    assert asked == [(0.9,)] * 3
    assert found["chain"] == sum(material.name(sample) == "dax" for sample in samples) / 7


def test_a_restarted_jobs_newest_records_count_and_what_is_no_record_does_not(tmp_path):
    lines = [{"step": 0, "x": 1}, {"step": 5, "x": 1}, {"step": 0, "x": 2}, 7, [1], {"x": 1}, {"step": "six"}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    assert records_of(tmp_path) == [{"step": 0, "x": 2}]
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write("\n" + json.dumps({"step": 5, "x": 2}) + "\n")
    assert records_of(tmp_path) == [{"step": 0, "x": 2}, {"step": 5, "x": 2}]


def test_evaluations_that_first_evaluation_skipped_are_no_rows(tmp_path):
    """Their accuracies are those of answering class 0."""
    shared = {"stage": 0, "hparams": {"first_evaluation": 11}, "env0_in_acc": 0.1, "env1_out_acc": 0.2}
    lines = [json.dumps({"step": step, **shared}) + "\n" for step in (0, 10, 20)]
    (tmp_path / "results.jsonl").write_text("".join(lines))
    assert [row["step"] for row in rounds.from_records(tmp_path, [0])] == [10, 20]
    (tmp_path / "results.jsonl").write_text(lines[0])
    with pytest.raises(ValueError, match="has not reached its hparam first_evaluation"):
        rounds.from_records(tmp_path, [0])


def test_jobs_without_stages_or_records_are_named(tmp_path):
    with pytest.raises(ValueError, match="no records in results.jsonl"):
        rounds.from_records(tmp_path, [0])
    (tmp_path / "results.jsonl").write_text('{"step": 0, "args": {"algorithm": "ERM"}}\n')
    with pytest.raises(ValueError, match="ERM has no stages"):
        rounds.from_records(tmp_path, [0])
    with pytest.raises(JobError, match="not a job of an MLLM algorithm"):
        open_checkpoint(str(tmp_path))


def test_jobs_whose_folders_share_a_name_are_told_apart():
    folders = ["/a/seed0/out", "/a/seed1/out", "/a/other"]
    jobs = [SimpleNamespace(where=Path(one).name, job=SimpleNamespace(folder=Path(one))) for one in folders]
    assert _distinct(jobs) == ["seed0/out", "seed1/out", "other"]
    assert _distinct(jobs[:1]) == ["out"]
