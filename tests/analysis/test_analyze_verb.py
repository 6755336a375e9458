"""The verb `analyze`: tables, CSV files and plots of a real job, and faults with their cures."""

import csv
import json
import shutil
import weakref

import pytest
import torch

from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.analysis import encoders, target_tokens
from domainbed_reasoning.analysis.checkpoints import Checkpoint
from domainbed_reasoning.analysis.results import results_at
from domainbed_reasoning.images.shapes import DOMAINS
from domainbed_reasoning.mllm.loading import TINY

PNG = b"\x89PNG"


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def analyze(job, tmp_path, capsys):
    """``analyze("token-shift", "--after", "JOB")`` runs the verb; returns what it printed and its folder."""

    def run(*words, code=0):
        given = [str(job) if word == "JOB" else word.replace("JOB/", f"{job}/") for word in words]
        assert cli.main(["analyze", *given, "--output", str(tmp_path / "out")]) == code
        printed = capsys.readouterr()
        return (printed.out if code == 0 else printed.err), tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("arguments", "file", "expected"),
    [
        (["entropy", "--after", "JOB", "--images", "24"], "entropy_RDMLDG_negative_rdmldg", "in both lists of 15"),
        (["divergence", "--dataset", "ShapesReasoning", "--encoder", "tiny", "--images", "8"],
         "divergence_ShapesReasoning_tiny_linear", "0.239"),
        (["sarr-rounds", "JOB", "--images", "8"], "sarr_rounds_RDMLDG_negative_rdmldg", "39.5%"),
        (["faithfulness", "JOB", "--images", "8"], "faithfulness_RDMLDG_negative_rdmldg", "swapped image"),
    ],
)  # fmt: skip
def test_each_analysis_prints_its_table_and_writes_csv_text_and_plot(arguments, file, expected, analyze):
    pytest.importorskip("matplotlib")
    printed, folder = analyze(*arguments)
    assert expected in printed
    text = (folder / f"{file}.txt").read_text(encoding="utf-8")
    assert "paper" in text and text.splitlines()[-1].startswith(f"command: domainbed-reasoning analyze {arguments[0]} ")
    assert all(str(folder / f"{file}{suffix}") in printed for suffix in (".txt", ".csv", ".png"))
    rows = rows_of(folder / f"{file}.csv")
    assert rows and all(row["dataset"] == "ShapesReasoning" for row in rows)
    if file.startswith("sarr_rounds"):
        assert all(0 <= float(row["target"]) <= 1 and row["held_out"] in DOMAINS for row in rows)
    assert (folder / f"{file}.png").read_bytes()[:4] == PNG


@pytest.mark.parametrize(("targets", "paper"), [("label", "+43.38"), ("teacher", "+1.88"), ("own", "+29.74")])
def test_token_shift_prints_what_its_table_holds_and_the_papers_number_beside_what_has_risen(targets, paper, analyze):
    printed, folder = analyze("token-shift", "--after", "JOB", "--targets", targets, "--images", "24")
    rows = rows_of(folder / f"token_shift_{targets}_RDMLDG_negative_rdmldg.csv")
    assert {(row["before"], row["after"], row["targets"]) for row in rows} == {("tiny", "rdmldg", targets)}
    share = {key: 100 * float(value) for key, value in rows[0].items() if key[:3] in ("low", "hig", "ris", "fal")}
    assert f"moved from below 0.25 to above 0.75: {share['risen']:+.2f} points (paper: {paper})\n" in printed
    net = share["risen"] - share["fallen"]
    assert f"minus those that fell from above 0.75 to below 0.25: {net:+.2f} points\n" in printed
    high = f"share above 0.75: {share['high_before']:.2f}% before, {share['high_after']:.2f}% after: "
    assert high + f"{share['high_after'] - share['high_before']:+.2f} points (paper: not reported)\n" in printed
    assert ("own chains are what --before writes" in printed) == (targets == "own")


def test_training_raises_the_class_tokens_and_the_other_way_round_it_lowers_them(analyze):
    """`--before` names one of the job's checkpoints; before and after change places."""
    _, folder = analyze("token-shift", "--after", "JOB", "--targets", "label", "--images", "24")
    analyze("token-shift", "--before", "JOB", "--after", "JOB/model_step0.pkl", "--targets", "label", "--images", "24")
    forth, back = (
        {row["tokens"]: row for row in rows_of(folder / f"token_shift_label_RDMLDG_negative_rdmldg{step}.csv")}
        for step in ("", "_step0")
    )
    assert float(forth["class"]["high_after"]) > float(forth["class"]["high_before"]) + 0.05
    assert float(forth["class"]["low_after"]) < float(forth["class"]["low_before"])
    assert float(back["class"]["high_after"]) < float(back["class"]["high_before"]) - 0.05
    assert back["class"]["high_before"] == forth["class"]["high_after"]
    assert (back["class"]["before"], back["class"]["after"]) == ("rdmldg", "rdmldg/model_step0.pkl")


def test_models_that_cut_text_differently_are_named_before_the_second_pass(analyze, tmp_path, monkeypatch):
    """The embedded model, its tokenizer with the first hundred of its merges alone."""
    other = shutil.copytree(TINY, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    del tokenizer["model"]["merges"][100:]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    read, passes = target_tokens.read_tokens, []
    monkeypatch.setattr(target_tokens, "read_tokens", lambda *given: passes.append(1) or read(*given))
    words = ["token-shift", "--before", str(other), "--after", "JOB", "--images", "6"]
    message, _ = analyze(*words, code=1)
    assert "other and RDMLDG (negative held out) have different tokenizers" in message
    assert len(passes) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["token-shift", "--after", "JOB"],
        ["entropy", "--after", "JOB", "--after-own", "JOB/model_step10.pkl"],
        ["sarr-rounds", "JOB"],
        ["faithfulness", "JOB", "JOB/model_step10.pkl"],
    ],
)
def test_a_model_is_gone_before_the_next_one_loads(words, analyze, monkeypatch):
    load, loaded = Checkpoint.load, []

    def counted(self, model=None):
        assert not [one for one in loaded if one() is not None]
        mllm = load(self, model)
        loaded.append(weakref.ref(mllm.network))
        return mllm

    monkeypatch.setattr(Checkpoint, "load", counted)
    analyze(*words, "--images", "4" if words[0] != "entropy" else "24")
    assert len(loaded) > 1


def test_analyses_lie_beside_the_job_and_side_by_side(job, tmp_path, capsys):
    """Of the same command the files are written anew, of another one under a number; old ones stay."""
    sweep = tmp_path / "sweep"
    shutil.copytree(job, sweep / ("0a" * 16))
    words = ["analyze", "sarr-rounds", str(sweep / ("0a" * 16))]
    for more in ([], [], ["--domains", "sources"]):
        assert cli.main([*words, *more]) == 0
    assert str(sweep / "analysis" / "sarr_rounds_RDMLDG_negative_0a0a0a0a-2.csv") in capsys.readouterr().out
    left = sorted(path.name for path in (sweep / "analysis").glob("*.csv"))
    assert left == ["sarr_rounds_RDMLDG_negative_0a0a0a0a-2.csv", "sarr_rounds_RDMLDG_negative_0a0a0a0a.csv"]
    assert rows_of(sweep / "analysis" / left[0])[0]["job"] == "0a" * 16
    assert cli.main(["report", str(sweep)]) == 0
    text = (sweep / "report.md").read_text(encoding="utf-8")
    assert text.count("SARR by round, 1 job") == 2 and "--domains sources" in text


def test_a_negative_number_of_images_is_refused_by_name(capsys):
    command = ["analyze", "divergence", "--dataset", "ShapesReasoning", "--encoder", "tiny", "--images", "-8"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "argument --images: must be non-negative; got -8" in capsys.readouterr().err


def test_files_that_nobody_owns_are_not_written_over(tmp_path):
    (tmp_path / "entropy_x.csv").write_text("old")
    assert results_at(tmp_path, "entropy_x", "a").path(".csv") == tmp_path / "entropy_x-2.csv"
    assert results_at(tmp_path, "entropy_y", "a").path(".csv") == tmp_path / "entropy_y.csv"


def test_one_bad_job_costs_no_other(job, analyze, tmp_path, capsys):
    """The second job's adapters are of another model; a job that is none is refused before the first is looked at."""
    bad = shutil.copytree(job, tmp_path / "bad")
    saved = torch.load(bad / "model.pkl", weights_only=True)
    saved["model_dict"].popitem()
    torch.save(saved, bad / "model.pkl")
    message, folder = analyze("faithfulness", "JOB", str(bad), "JOB/model_step0.pkl", "--images", "4", code=1)
    assert f"{bad}: the checkpoint's adapters do not match" in message
    rows = rows_of(folder / "faithfulness_ShapesReasoning_RDMLDG.csv")
    assert {row["job"] for row in rows} == {"rdmldg", "rdmldg/model_step0.pkl"}
    assert len(rows_of(folder / "faithfulness_ShapesReasoning_RDMLDG_answers.csv")) == 8
    assert str(bad) in (folder / "faithfulness_ShapesReasoning_RDMLDG.txt").read_text(encoding="utf-8")
    message, _ = analyze("faithfulness", "JOB", str(tmp_path / "nowhere"), "--images", "4", code=1)
    assert "nowhere is not a job folder" in message


def test_steps_without_a_checkpoint_are_named_with_what_saves_them(job, tmp_path, capsys):
    bare = shutil.copytree(job, tmp_path / "bare", ignore=shutil.ignore_patterns("model_step*"))
    assert cli.main(["analyze", "sarr-rounds", str(bare), "--images", "4"]) == 0
    printed = "bare: no checkpoint of step 0, 10; train --save_model_every_checkpoint saves them"
    assert printed in capsys.readouterr().out
    assert printed in next((tmp_path / "analysis").glob("*.txt")).read_text(encoding="utf-8")


def test_an_encoder_that_is_a_job_takes_its_base_from_model(job, analyze, tmp_path):
    """The job's own base is not where it found it."""
    moved = shutil.copytree(job, tmp_path / "moved")
    task = json.loads((moved / "task.json").read_text(encoding="utf-8"))
    task["hparams"]["model"] = "/nowhere/tiny"
    (moved / "task.json").write_text(json.dumps(task), encoding="utf-8")
    words = ["divergence", "--dataset", "ShapesReasoning", "--images", "8"]
    analyze(*words, "--encoder", str(moved), code=1)
    printed, folder = analyze(*words, "--encoder", str(moved), "--model", "tiny")
    assert "ShapesReasoning, RDMLDG (negative held out), linear kernel" in printed
    message, _ = analyze(*words, "--encoder", "tiny", "--model", "tiny", code=1)
    assert "--encoder tiny is not a job" in message


def test_chains_are_encoded_without_their_tags(analyze, monkeypatch):
    seen = []
    texts = encoders.MLLMEncoder.texts
    monkeypatch.setattr(encoders.MLLMEncoder, "texts", lambda self, chains: seen.extend(chains) or texts(self, chains))
    analyze("divergence", "--dataset", "ShapesReasoning", "--encoder", "tiny", "--images", "4")
    assert len(seen) == 16 and seen[0].startswith("compare parts ")
    assert not any("<" in text or "\n" in text for text in seen)


def test_without_matplotlib_the_numbers_are_written_and_the_cure_is_named(analyze, monkeypatch):
    from domainbed_reasoning import plot_styles

    monkeypatch.setattr(plot_styles, "has_matplotlib", lambda: False)
    printed, folder = analyze("sarr-rounds", "JOB")
    assert "pip install 'domainbed-reasoning[plots]'" in printed
    assert len(rows_of(folder / "sarr_rounds_RDMLDG_negative_rdmldg.csv")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token-shift", "--after", "tiny"], "not a job folder"),
        (["token-shift", "--after", "JOB/model_step7.pkl"], "no model_step7.pkl: it has model.pkl, model_step0.pkl"),
        (["faithfulness", "JOB", "tiny"], "tiny is not a job folder"),
        (["token-shift", "--after", "JOB", "--domains", "photos"], "Did you mean 'photo'"),
        (["token-shift", "--after", "JOB", "--domains", "target"], "no image with a chain"),
        (["token-shift", "--after", "JOB", "--targets", "nowhere.jsonl"], "nowhere.jsonl"),
        (["divergence", "--dataset", "ShapeReasoning", "--encoder", "tiny"], "Did you mean 'ShapesReasoning'"),
        (["divergence", "--dataset", "ShapesReasoning", "--encoder", "none"], "neither a folder nor a hub id"),
    ],
)
def test_faults_end_with_a_message(arguments, message, analyze):
    assert message in analyze(*arguments, code=1)[0]


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["analyze", "--help"])
    assert "analyze faithfulness sweep/" in capsys.readouterr().out
