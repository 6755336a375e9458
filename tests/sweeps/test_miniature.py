"""The miniature study: a fair design, stock jobs, and tables that match the jobs."""

import csv
import json
import re

import pytest

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.hparam_names import check_hparams
from domainbed_reasoning.images import shapes
from domainbed_reasoning.sweeps.launchers import restart
from domainbed_reasoning.sweeps.miniature import study as miniature
from domainbed_reasoning.sweeps.miniature import table as miniature_table
from domainbed_reasoning.sweeps.miniature.__main__ import main
from domainbed_reasoning.sweeps.miniature.study import (
    BEYOND,
    CLAIMS,
    CNNS,
    MAIN,
    OTHER_BASE,
    ROWS,
    choices,
    job_of,
    weights,
)
from domainbed_reasoning.sweeps.studies.train_jobs import TrainJob


def test_every_mllm_method_takes_the_same_number_of_updates_with_the_same_batch():
    """But for rows that are named for another number: before the rounds, and the paper's own epochs."""
    trained = [arm for arm in ROWS if arm.algorithm not in CNNS and arm.algorithm != "MLLMZeroShot"]
    named = {arm.name: arm.steps for arm in trained if arm.steps != miniature.STEPS}
    assert named == {
        "MTCT before rounds": 61, "ReasoningSFT before rounds": 61,
        "MTCT paper's epochs": 85, "RDMLDG paper's epochs": 337, "MTCT as many steps": 337,
        "MTCT paper's epochs at RDMLDG's rate": 85, "MTCT as many steps at RDMLDG's rate": 337,
    }  # fmt: skip
    assert {arm.hparams["batch_size"] for arm in trained} == {4}
    assert {(arm.steps, arm.hparams["batch_size"]) for arm in MAIN if arm.algorithm in CNNS} == {
        (miniature.CNN_STEPS, 4)
    }


def test_the_papers_epochs_are_its_three_and_three_a_round():
    """3 sources of 140 images, of which DomainBed trains on 112: 336 images are 28 steps of 3 x 4."""
    from domainbed_reasoning.method.schedule import plan_stages

    steps = 3 * int(shapes.SIZE_OF_DOMAIN * 0.8) // (3 * 4)
    assert plan_stages([3], steps).n_steps == miniature.PAPER_MTCT
    assert plan_stages([3, 3, 3, 3], steps).n_steps == miniature.PAPER_RDMLDG


def test_the_rows_are_the_papers_methods_and_the_baselines_each_with_its_own_name():
    random_weights = {"CLIPZeroShot", "CLIPLoRA"}  # on the embedded dataset, so their row would say nothing
    assert {arm.algorithm for arm in MAIN} == {*registry.ALGORITHMS, *CNNS} - random_weights
    assert len({arm.name for arm in ROWS}) == len(ROWS)
    assert len({arm.folder for arm in ROWS}) == 1 + len(BEYOND) + len(CLAIMS) + len(OTHER_BASE)


def test_main_rows_differ_from_the_papers_settings_in_nothing_but_size_and_rate():
    """What goes beyond the paper is in a row of its own; the teacher writes otherwise than the model, as there."""
    size = {
        "batch_size",
        "first_evaluation",
        "lr",
        "both_answers",
        "mtct_epochs",
        "sarr_epochs",
        "sarr_rounds",
        "teacher",
    }
    assert {name for arm in MAIN for name in arm.hparams} <= size


@pytest.mark.parametrize("arm", [arm for arm in ROWS if arm.algorithm not in CNNS], ids=lambda arm: arm.name)
def test_every_hparam_is_one_that_something_reads(arm):
    check_hparams(arm.hparams, arm.algorithm)


def test_the_seed_that_chose_is_not_compared_and_a_cell_has_enough_images():
    assert miniature.CHOICE_SEED not in miniature.TEST_SEEDS
    assert {seed for arm in (*choices(), *weights()) for seed in arm.seeds} == {miniature.CHOICE_SEED}
    assert miniature.TARGET_PER_CLASS * len(shapes.CLASS_NAMES) >= 500


def test_rounds_share_the_steps_with_the_supervised_stage_in_halves():
    from domainbed_reasoning.method.schedule import plan_stages

    for rounds in (1, 2, 3):
        stages = miniature.sarr(rounds)
        epochs = [stages["mtct_epochs"]] + [stages["sarr_epochs"]] * stages["sarr_rounds"]
        plan = plan_stages(epochs, 1, miniature.STEPS)
        assert [stage.steps for stage in plan.stages] == [61] + [60 // rounds] * rounds


def test_seeds_are_run_one_after_the_other_and_every_cell_once():
    keys = [(arm.name, regime, target, seed) for arm, regime, target, seed in miniature.cells()]
    assert len(set(keys)) == len(keys)
    main = [seed for name, _, _, seed in keys if name == "MTCT"]
    assert main == sorted(main)
    assert keys.count(("MTCT", "rho0", 0, 1)) == 1


def test_a_job_has_the_folder_and_the_command_of_a_stock_sweep(tmp_path, run_stock, domainbed_root):
    """Trial 0 as `sweep` launches it, and the same arguments here; the study adds when to evaluate."""
    arm = miniature.StudyRow("ERM", "ERM", {"lr": 0.5}, steps=3)
    job = job_of(arm, "rho0", 2, 0, tmp_path)
    arguments = {key: value for key, value in job.arguments.items() if key != "checkpoint_freq"}
    ours = TrainJob(arguments, tmp_path / "sweep")
    done = run_stock(
        domainbed_root, "sweep", "launch", "--algorithms", "ERM", "--datasets", "ShapesReasoning", "--n_hparams", "1",
        "--n_trials", "1", "--single_test_envs", "--command_launcher", "dummy", "--skip_confirmation", "--steps", "3",
        "--data_dir", arguments["data_dir"], "--output_dir", tmp_path / "sweep", "--hparams", arguments["hparams"],
        cwd=tmp_path,
    )  # fmt: skip
    launched = re.findall("Dummy launcher: (.*)", done.stdout)
    assert ours.command in launched
    assert ours.folder.is_dir()


def write_job(job, accuracy, predictions=(), answers=None, **values):
    """Write what the train script and our records leave of a job: ``accuracy`` on both splits of the target."""
    job.folder.mkdir(parents=True)
    target = job.arguments["test_envs"][0]
    args = {**job.arguments, "holdout_fraction": 0.2}
    splits = {f"env{env}_{split}_acc": 0.9 for env in range(4) for split in ("in", "out")}
    splits |= {f"env{target}_{split}_acc": accuracy for split in ("in", "out")}
    last = {"step": 60, "hparams": json.loads(job.arguments["hparams"]), "args": args, **splits, **values}
    (job.folder / "results.jsonl").write_text(json.dumps(last) + "\n")
    if answers:
        (job.folder / "answers.json").write_text(json.dumps({f"env{target}": {"in": answers, "out": answers}}))
    if predictions:
        lines = [json.dumps({"env": target, **line}) + "\n" for line in predictions]
        (job.folder / "predictions.jsonl").write_text("".join(lines))
    (job.folder / "done").touch()


def arm(name):
    return next(row for row in ROWS if row.name == name)


def test_rows_are_written_again_as_they_were_and_tables_say_who_won(tmp_path, capsys):
    """MTCT's chain .2 below reasoning only in four domains: a difference of -20 points, 0 wins and 4 losses."""
    for target in range(4):
        both = {"label": 0.8, "chain": 0.5 + target / 100, "unparsed": 0.0}
        write_job(job_of(arm("MTCT"), "rho8", target, 1, tmp_path), both["chain"], answers=both)
        alone = {"label": None, "chain": 0.7 + target / 100, "unparsed": 0.0}
        write_job(job_of(arm("ReasoningSFT"), "rho8", target, 1, tmp_path), alone["chain"], answers=alone)
    write_job(job_of(arm("RDMLDG"), "rho8", 0, 1, tmp_path), 0.5, sarr1_accepted=0.75)
    results = tmp_path / "results"
    miniature_table.write(tmp_path, results, miniature)
    with (results / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows].count("MTCT") == 4
    first = next(row for row in rows if row["row"] == "MTCT" and row["target"] == "photo")
    assert (first["chain"], first["label"], first["source_validation"]) == ("0.5000", "0.8000", "0.9000")
    assert first["commit"] and first["date"] and "--algorithm MTCT" in first["command"]
    assert str(tmp_path) not in (results / "rows.csv").read_text()
    table = (results / "table.md").read_text()
    assert "| MTCT's chain against reasoning only | 4 | -20.0 ± 0.0 [± ?] | – | 0 : 4 | <.001 | ? |" in table
    assert re.search(r"\| MTCT \| 4 \| 51\.5 ± 2\.1 \[± \?\] \| 80\.0 ± 0\.0", table)
    assert re.search(r"\| RDMLDG \| 1 \| 50\.0 ± \? .*\| 75 \|", table)
    # Where a row was run is not overwritten by where it is tabulated.
    text = (results / "rows.csv").read_text().replace(first["hardware"], "another machine, elsewhere")
    (results / "rows.csv").write_text(text)
    miniature_table.write(tmp_path, results, miniature)
    assert (results / "rows.csv").read_text() == text
    # What a job says of its commit stands above what an earlier table had, of the run that it took the place of.
    job = job_of(arm("MTCT"), "rho8", 0, 1, tmp_path)
    recorded = {"domainbed-reasoning": {"version": "0.1.0", "commit": "0123456789abcdef", "modified": False}}
    (job.folder / "versions.json").write_text(json.dumps(recorded))
    miniature_table.write(tmp_path, results, miniature)
    with (results / "rows.csv").open(newline="") as file:
        commits = {(row["row"], row["target"]): row["commit"] for row in csv.DictReader(file)}
    assert commits.pop(("MTCT", "photo")) == "0123456"
    assert set(commits.values()) == {first["commit"]}


def prediction(label, chain_answer, caption):
    chain = f"<SUMMARY>a</SUMMARY><CAPTION>{caption}</CAPTION><REASONING>b</REASONING><REFLECTION>c</REFLECTION>"
    return {
        "label": label,
        "label_answer": None,
        "chain_answer": chain_answer,
        "chain": f"{chain}<CONCLUSION>{chain_answer}</CONCLUSION>",
    }


def described(name, **changes):
    kinds = [shapes.KINDS[part][kind] for part, kind in enumerate(shapes.CODES[shapes.CLASS_NAMES.index(name)])]
    return ", ".join(changes.get(part, kind) for part, kind in zip(shapes.PARTS, kinds, strict=True))


def test_captions_are_read_as_the_class_whose_parts_they_name():
    assert miniature.described_class(prediction("dax", "dax", described("dax"))["chain"]) == "dax"
    altered = described("dax", head="eared")
    assert miniature.described_class(prediction("dax", "dax", altered)["chain"]) == "dax"
    assert miniature.described_class(shapes.chain(0, 1, "other")) == shapes.CLASS_NAMES[1]
    assert miniature.described_class(prediction("dax", "dax", "round, horned")["chain"]) is None
    assert miniature.described_class("no chain") is None


def test_faithfulness_counts_captions_conclusions_and_the_misleading_cue():
    """Of four daxes: right by its caption; right against it; the caption's wrong class; the background's class."""
    cue = shapes.CLASS_NAMES[(shapes.CLASS_NAMES.index("dax") + shapes.MISLEADING_SHIFT) % 7]
    lines = [
        prediction("dax", "dax", described("dax")),
        prediction("dax", "dax", described("wug")),
        prediction("dax", "wug", described("wug")),
        prediction("dax", cue, described("dax")),
    ]
    found = miniature_table.faithfulness(lines, miniature)
    assert found == {"caption_right": 0.5, "follows_caption": 0.5, "follows_cue": 0.25}
    broken = {"label": "dax", "label_answer": "dax", "chain_answer": None, "chain": "<SUMMARY>a</SUMMARY><CAPT"}
    found = miniature_table.faithfulness([*lines, *[broken] * 4], miniature)
    assert found == {"caption_right": 0.25, "follows_caption": 0.25, "follows_cue": 0.125}
    assert miniature_table.faithfulness([broken], miniature) == {
        "caption_right": 0,
        "follows_caption": 0,
        "follows_cue": 0,
    }
    label_only = [{"label": "dax", "label_answer": cue, "chain_answer": None, "chain": None}]
    assert miniature_table.faithfulness(label_only, miniature) == {"follows_cue": 1.0}


def test_design_is_printed_with_completed_jobs(tmp_path, capsys, monkeypatch):
    write_job(job_of(arm("MTCT"), "rho8", 0, 1, tmp_path), 0.5)
    assert main(["--study", "miniature", "--design", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"MTCT +MTCT +121 +40 +1 ", printed)
    cells = len(miniature.cells())  # each has a job of its own
    assert f"{cells} cells, {cells} jobs. The first: python -m domainbed.scripts.train" in printed


def test_completed_jobs_are_not_rerun_and_remains_of_dead_ones_are_removed(tmp_path):
    done, dead, new = (job_of(arm("ERM"), "rho0", target, 1, tmp_path) for target in range(3))
    write_job(done, 0.5)
    dead.folder.mkdir(parents=True)
    (dead.folder / "results.jsonl").write_text("of a job that died")
    launched = []
    assert miniature.run([done, dead, new], tmp_path, lambda commands: launched.extend(commands) or []) == 0
    assert launched == [dead.command, new.command]
    assert not (dead.folder / "results.jsonl").exists() and done.done


def test_one_process_at_a_time_runs_the_jobs_of_a_folder(tmp_path, capsys):
    """A second would remove the folders of the first's running jobs."""
    with restart.sole_launch(tmp_path):
        assert main(["--study", "miniature", "--run", "--output_dir", str(tmp_path)]) == 1
    assert f"{tmp_path} is being launched by another process" in capsys.readouterr().err
    assert not (tmp_path / "rho0").exists()


def test_the_choice_is_printed_with_its_measurements(tmp_path, capsys):
    for regime, target in miniature.CHOICE_CELLS:
        job = job_of(weights()[0], regime, target, miniature.CHOICE_SEED, tmp_path / "choice", target_per_class=1)
        write_job(job, 0.1)
    miniature.report_choice(tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(weights()[0].name))
    assert line.endswith("0.900   [0.9, 0.9, 0.9, 0.9]")
