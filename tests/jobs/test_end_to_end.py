"""Stock commands as separate processes with our names, on the stand-in and on upstream."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from builders.files import read_lines

FEW = json.dumps({"max_new_tokens": 8, "batch_size": 2, "sarr_rounds": 1, "mtct_epochs": 1, "sarr_epochs": 1})


@pytest.fixture
def sweep(domainbed_root, run_stock, tmp_path):
    """A sweep of ERM and RDMLDG on one target of ShapesReasoning, three steps each."""
    arguments = ["--algorithms", "ERM", "RDMLDG", "--datasets", "ShapesReasoning", "--steps", 3]
    arguments += ["--n_hparams", 1, "--n_trials", 1, "--single_test_envs", "--skip_confirmation"]
    arguments += ["--data_dir", tmp_path, "--output_dir", tmp_path / "sweep", "--hparams", FEW]
    env = {"DOMAINBED_REASONING_TARGETS": "2"}
    launched = run_stock(
        domainbed_root, "sweep", "launch", *arguments, "--command_launcher", "parallel", cwd=domainbed_root, env=env
    )
    assert "8 jobs: 0 done, 0 incomplete, 8 not launched." in launched.stdout
    assert "2/2 jobs succeeded." in launched.stdout
    removed = run_stock(
        domainbed_root, "sweep", "delete_incomplete", *arguments, "--command_launcher", "parallel", cwd=domainbed_root
    )
    assert "8 jobs: 2 done, 6 incomplete, 0 not launched." in removed.stdout
    return domainbed_root, tmp_path / "sweep"


def jobs(folder):
    found = {}
    for path in folder.glob("*/results.jsonl"):
        records = read_lines(path)
        found[records[0]["args"]["algorithm"]] = (path.parent, records)
    return found


def test_a_stock_sweep_runs_ours_beside_erm_and_tabulates_both(sweep, run_stock):
    root, folder = sweep
    (erm, erm_records), (job, records) = (jobs(folder)[name] for name in ("ERM", "RDMLDG"))
    assert [record["step"] for record in records] == [0, 1, 2]
    assert [record["stage"] for record in records] == [0, 0, 1]
    assert "sarr1_accepted" in records[-1]
    accuracies = {f"env{env}_{split}_acc" for env in range(4) for split in ("in", "out")}
    assert accuracies <= records[-1].keys() and accuracies <= erm_records[-1].keys()

    shown = run_stock(root, "collect_results", "--input_dir", folder, cwd=root).stdout
    assert f"Total records: {len(erm_records) + len(records)}" in shown
    assert (folder / "results.txt").read_text() == shown
    for row in ("ERM", "RDMLDG"):
        assert re.search(rf"^{row} +X +X +\d+\.\d \+/- 0\.0 +X", shown, re.MULTILINE), shown
    latex = run_stock(root, "collect_results", "--input_dir", folder, "--latex", cwd=root).stdout
    assert "RDMLDG" in latex and "\\end{document}" in latex
    top = run_stock(root, "list_top_hparams",
        "--input_dir", folder, "--dataset", "ShapesReasoning", "--algorithm", "RDMLDG", "--test_env", 2,
        cwd=root,
    )  # fmt: skip
    assert "lora_rank: 8" in top.stdout

    for folder_of_job in (erm, job):
        versions = json.loads((folder_of_job / "versions.json").read_text())
        assert versions["domainbed-reasoning"]["version"] and versions["libraries"]["torch"]
        assert bool(versions["DomainBed"].get("stand_in")) == (root.name == "standin")
    check_records(job, records[-1])
    saved = torch.load(job / "model.pkl", weights_only=True)
    assert all("lora_" in name for name in saved["model_dict"])
    assert saved["model_hparams"]["algorithm"] == "RDMLDG"
    assert (job / "model.pkl").stat().st_size < 2**20


def check_records(job, last):
    """Both answers' files agree with DomainBed's own accuracies and its splits."""
    rows = read_lines(job / "predictions.jsonl")
    answers = json.loads((job / "answers.json").read_text())
    assert len({(row["env"], row["index"]) for row in rows}) == len(rows)
    for env in range(4):
        for split in ("in", "out"):
            part = [row for row in rows if row["env"] == env and row["split"] == split]
            assert answers[f"env{env}"][split]["n"] == len(part)
            # DomainBed's accuracy: the chain's answer, and the label path's where the chain names no class.
            right = [(row["chain_answer"] or row["label_answer"]) == row["label"] for row in part]
            assert last[f"env{env}_{split}_acc"] == pytest.approx(sum(right) / len(right))
            assert answers[f"env{env}"][split]["chain_or_label"] == pytest.approx(sum(right) / len(right))
            whole = sum(row["well_formed"] for row in part) / len(part)
            assert answers[f"env{env}"][split]["well_formed"] == pytest.approx(whole)
    assert last["well_formed"] == pytest.approx(sum(row["well_formed"] for row in rows) / len(rows))


def test_samples_held_out_for_domain_adaptation_are_neither_in_nor_out(domainbed_root, run_stock, tmp_path):
    """DomainBed's own accuracies of the three splits of the target, here the first domain."""
    hparams = json.dumps({"answer": "label", "both_answers": False})
    run_stock(domainbed_root, "train",
        "--data_dir", tmp_path, "--dataset", "ShapesReasoning", "--algorithm", "MLLMZeroShot", "--test_envs", 0,
        "--uda_holdout_fraction", 0.3, "--hparams", hparams, "--output_dir", tmp_path / "job", cwd=domainbed_root,
    )  # fmt: skip
    record = json.loads((tmp_path / "job" / "results.jsonl").read_text().splitlines()[-1])
    rows = read_lines(tmp_path / "job" / "predictions.jsonl")
    answers = json.loads((tmp_path / "job" / "answers.json").read_text())
    assert list(answers["env0"]) == ["in", "out", "uda"] and list(answers["env1"]) == ["in", "out"]
    for split in ("in", "out", "uda"):
        part = [row["label_answer"] == row["label"] for row in rows if row["env"] == 0 and row["split"] == split]
        assert record[f"env0_{split}_acc"] == pytest.approx(sum(part) / len(part))
        assert answers["env0"][split]["label"] == pytest.approx(record[f"env0_{split}_acc"])


@pytest.mark.parametrize("algorithm", [pytest.param("MLLMZeroShot", marks=pytest.mark.slow), "SARR"])
def test_debug_datasets_train_through_the_stock_script(domainbed_root, run_stock, tmp_path, algorithm):
    run_stock(domainbed_root, "train",
        "--data_dir", tmp_path, "--dataset", "Debug28", "--algorithm", algorithm, "--test_envs", 0,
        "--steps", 5, "--checkpoint_freq", 4, "--hparams", FEW, "--output_dir", tmp_path / "job",
        cwd=domainbed_root,
    )  # fmt: skip
    assert (tmp_path / "job" / "done").exists()
    records = read_lines(tmp_path / "job" / "results.jsonl")
    assert [record["step"] for record in records] == [0, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "PACSReasoning"], r"PACSReasoning: folder .*PACS not found.*--data_dir"),
        (["--dataset", "ShapesReasoning", "--hparams", '{"lora_rnak": 4}'], r"lora_rnak.*Did you mean 'lora_rank'"),
        (["--dataset", "ShapesReasoning", "--hparams", '{"model": "a/b/c"}'], r"neither a folder nor a hub id"),
    ],
)
def test_invalid_jobs_fail_immediately_with_one_message(domainbed_root, run_stock, tmp_path, arguments, message):
    done = run_stock(domainbed_root, "train",
        "--data_dir", tmp_path, "--algorithm", "MTCT", "--output_dir", tmp_path / "job", *arguments,
        cwd=domainbed_root, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    printed = (done.stderr + done.stdout).strip()  # the train script tees its stderr to stdout
    assert re.search(message, printed.splitlines()[-1]), printed
    assert not (tmp_path / "job" / "results.jsonl").exists()


@pytest.mark.parametrize("domainbed_root", ["standin"], indirect=True)
def test_ctrl_c_ends_training_with_one_sentence(domainbed_root, stock_environment, tmp_path):
    """The process ends by the signal, which a shell shows as exit code 130; so the job's own files say, too."""
    arguments = ["--dataset", "ShapesReasoning", "--algorithm", "LabelSFT", "--test_envs", "3", "--steps", "10000"]
    command = [sys.executable, "-m", "domainbed.scripts.train", *arguments, "--output_dir", "job"]
    hparams = ["--hparams", json.dumps({"answer": "label", "both_answers": False, "batch_size": 2})]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(
        [*command, *hparams],
        cwd=tmp_path,
        env=stock_environment(domainbed_root),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may ignore it
        **output,
    )
    while not (tmp_path / "job" / "results.jsonl").exists() and child.poll() is None:
        time.sleep(0.1)
    while child.poll() is None:  # an interrupt during a library's call from C can be lost: a user presses again
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(300)
    out, err = child.communicate()
    assert child.returncode == -signal.SIGINT, err
    # DomainBed prints standard error on standard output, and into err.txt.
    assert out.endswith("\nInterrupted. Rerun the same command to resume from the saved progress.\n")
    assert "Traceback" not in out + err + (tmp_path / "job" / "err.txt").read_text()
