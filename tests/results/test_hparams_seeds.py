"""Sweeps with several hparams seeds or folders, and hparams and files that DomainBed's own tables accept."""

import json

import pytest

from builders.files import read_lines
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.jobs import job_files
from domainbed_reasoning.results import collect
from domainbed_reasoning.results.job_folders import read_jobs
from domainbed_reasoning.results.report import content, read_report
from domainbed_reasoning.results.report.markdown import render_markdown
from domainbed_reasoning.results.tables import (
    accuracy_tables,
    answers_table,
    costs_table,
    hparams_table,
    one_source_tables,
    rounds_table,
)


def test_hparams_may_be_lists(write_job):
    """As in the guide on adapters: the layers that LoRA adapts."""
    for target, layers in enumerate((["q_proj", "v_proj"], ["q_proj"], None)):
        write_job(str(target), "LabelSFT", target=target, hparams={"lora_target_modules": layers, "lr": 0.1})
    frame = collect(write_job.folder)
    assert len(frame[frame["selection"] == frame["selection"].iloc[0]]) == 3
    assert "damaged" not in [problem["kind"] for problem in frame.attrs["problems"]]
    (row,) = hparams_table(frame).rows
    assert row[3:] == ("lr 0.1", "lora_target_modules: ['q_proj', 'v_proj'], ['q_proj'], None")


def test_tables_beside_the_accuracies_are_of_the_runs_of_one_selection_method(write_job):
    """Seed 0 is best on the sources, seed 1 on the target, which only the oracle may see."""
    for seed, (source, target, answer) in enumerate(((0.9, 0.4, 0.4), (0.5, 0.8, 0.8))):
        job = write_job(
            f"{seed}", "RDMLDG", "ShapesReasoning", accs=(target,), args={"hparams_seed": seed},
            hparams={"sarr_rounds": 1}, sarr1_accepted=0.2 + 0.4 * seed, stage=1.0,
            **{f"env{env}_{split}_acc": source for env in (1, 2, 3) for split in ("in", "out")},
        )  # fmt: skip
        record = json.loads((job / "results.jsonl").read_text())
        record |= {f"env{env}_{split}_acc": source for env in (1, 2, 3) for split in ("in", "out")}
        (job / "results.jsonl").write_text(json.dumps(record) + "\n")
        shares = {"n": 10, "label": answer, "chain": answer, "chain_or_label": answer, "unparsed": 0, "well_formed": 1}
        (job / "answers.json").write_text(json.dumps({"env0": {"in": shares}}))
    frame = collect(write_job.folder)
    assert set(frame["hparams_seed"]) == {0, 1}
    assert answers_table(frame).rows[0][3] == "40.0" and rounds_table(frame).rows[0][3] == "20.0"
    assert costs_table(frame).rows[0][2] == "1"
    for table in (answers_table(frame), rounds_table(frame), costs_table(frame)):
        assert table.note.endswith("Runs selected by training-domain validation set.")


def test_tables_name_no_selection_method_where_all_choose_the_same_runs(write_job):
    write_job("one", accs=(0.1, 0.2))
    assert "selected" not in costs_table(collect(write_job.folder)).note


def test_of_a_single_sources_hparams_seeds_its_validation_chooses_one(write_job):
    """Seed 0: source .3, targets .2. Seed 1: source .9, targets .8."""
    for seed, (source, target) in enumerate(((0.3, 0.2), (0.9, 0.8))):
        args = {"test_envs": [0, 2, 3], "hparams_seed": seed}
        job = write_job(f"{seed}", "ERM", "ShapesReasoning", accs=(0,), args=args)
        record = json.loads((job / "results.jsonl").read_text())
        record |= {f"env{env}_in_acc": target for env in (0, 2, 3)} | {"env1_out_acc": source}
        (job / "results.jsonl").write_text(json.dumps(record) + "\n")
    frame = collect(write_job.folder)
    (row,) = frame.attrs["one_source"]
    assert row["hparams_seed"] == 1 and row["accuracy"] == pytest.approx(0.8)
    (table,) = one_source_tables(frame)
    assert table.rows == (("ERM", "X", "80.0", "X", "X", "X"),)


def test_a_folder_of_one_sweep_per_dataset_has_averages_over_datasets(write_job):
    for dataset in ("PACSReasoning", "VLCSReasoning"):
        for target in range(4):
            write_job(f"{target}", "MTCT", dataset, target=target, accs=(0.5,), sweep=f"sweep/{dataset}")
    averages = accuracy_tables(collect(write_job.folder))[-1]
    assert averages.head == ("Algorithm", "VLCSReasoning", "PACSReasoning", "Avg")
    assert averages.rows == (("MTCT", "50.0", "50.0", "50.0"),)


def test_as_stock_counts_what_stock_counts_and_says_so(write_job, capsys):
    """An unfinished job, and one whose answers.json, which stock never reads, is damaged."""
    write_job("unfinished", target=0, done=False)
    (write_job("damaged", target=1) / "answers.json").write_text("{")
    assert len(collect(write_job.folder)) == 0
    frame = collect(write_job.folder, as_stock=True)
    assert set(frame["target"]) == {0, 1}
    effects = {problem["kind"]: problem["effect"] for problem in frame.attrs["problems"] if problem["folders"]}
    assert effects["incomplete"] == effects["damaged"] == "Counted, as by DomainBed"
    assert cli.main(["collect", str(write_job.folder), "--as-stock", "--format", "csv"]) == 0
    assert "Left out" not in capsys.readouterr().err


def test_predictions_of_a_large_dataset_are_read_whole(write_job, monkeypatch):
    """DomainNet's have 683 MB; other files of a job are a thousandth of that."""
    job = write_job("one", "MTCT", "ShapesReasoning", accs=(0.5,))
    answers = {"label_answer": "fep", "chain_answer": None, "chain": None, "well_formed": None}
    line = {"env": 0, "index": 0, "split": "in", "image": "x", "label": "fep"} | answers
    (job / "predictions.jsonl").write_text((json.dumps(line) + "\n") * 50)
    monkeypatch.setattr(job_files, "_MAX_BYTES", 4000)
    assert (job / "predictions.jsonl").stat().st_size > 4000 > (job / "results.jsonl").stat().st_size
    report = read_report(write_job.folder)
    assert "Classes" in [section.title for section in report.sections]


def test_training_curves_and_examples_are_of_the_chosen_runs(write_job):
    """Seed 0, 20% in the target, is chosen on the sources; seed 1 has 90%."""
    for seed, (source, target) in enumerate(((0.9, 0.2), (0.5, 0.9))):
        job = write_job(f"{seed}", "MTCT", "ShapesReasoning", accs=(target, target), args={"hparams_seed": seed})
        records = read_lines(job / "results.jsonl")
        for record in records:
            record |= {f"env{env}_{split}_acc": source for env in (1, 2, 3) for split in ("in", "out")}
        (job / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        line = {"env": 0, "index": 0, "split": "in", "image": "x", "label": "fep", "label_answer": None}
        chain = {
            "chain": "<CONCLUSION>fep</CONCLUSION>",
            "chain_answer": "fep" if seed else "mip",
            "well_formed": False,
        }
        (job / "predictions.jsonl").write_text(json.dumps(line | chain) + "\n")
    report = read_report(write_job.folder)
    text = render_markdown(report)
    assert "0 of 1 chains conclude correctly" in text and "1 of 1 chains" not in text
    chosen = [job for job in read_jobs(write_job.folder) if job.folder.name == "0"]
    assert content._chosen(collect(write_job.folder), read_jobs(write_job.folder)) == chosen


def test_the_page_is_not_overwritten_by_its_markdown(write_job, tmp_path, capsys):
    write_job("one")
    with pytest.raises(SystemExit):
        cli.main(["report", str(write_job.folder), "--output", str(tmp_path / "out.md")])
    assert "--output names the HTML page" in capsys.readouterr().err and not (tmp_path / "out.md").exists()
