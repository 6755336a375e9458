"""The verb `analyse`: tables, CSV files and plots of a real job, and faults with their cures."""

import csv

import pytest

from domainbed_reasoning import cli
from domainbed_reasoning.shapes import DOMAINS

PNG = b"\x89PNG"


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("arguments", "file", "said"),
    [
        (["token-shift", "--after", "JOB", "--images", "9"], "token_shift_teacher", "(paper: +1.88)"),
        (["token-shift", "--after", "JOB", "--targets", "label", "--images", "9"], "token_shift_label", "+43.38"),
        (["entropy", "--after", "JOB", "--images", "24"], "entropy", "tokens that both lists of 15 share"),
        (["divergence", "--dataset", "ShapesReasoning", "--encoder", "tiny", "--images", "8"], "divergence", "0.239"),
        (["sarr-rounds", "JOB", "--images", "8"], "sarr_rounds", "39.5%"),
        (["faithfulness", "JOB", "--images", "8"], "faithfulness", "swapped image"),
    ],
)  # fmt: skip
def test_each_analysis_prints_its_table_and_writes_csv_and_plot(arguments, file, said, job, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    given = [str(job) if word == "JOB" else word for word in arguments]
    assert cli.main(["analyse", *given, "--output", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
    assert "paper" in (tmp_path / f"{file}.txt").read_text(encoding="utf-8")
    rows = rows_of(tmp_path / f"{file}.csv")
    assert rows
    if file == "sarr_rounds":
        assert all(0 <= float(row["target"]) <= 1 and row["held_out"] in DOMAINS for row in rows)
    assert (tmp_path / f"{file}.png").read_bytes()[:4] == PNG


def test_without_matplotlib_the_numbers_are_written_and_the_cure_is_named(job, tmp_path, capsys, monkeypatch):
    from domainbed_reasoning.analysis import plots

    monkeypatch.setattr(plots, "plots_are_there", lambda: False)
    assert cli.main(["analyse", "sarr-rounds", str(job), "--output", str(tmp_path)]) == 0
    assert "pip install 'domainbed-reasoning[plots]'" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "sarr_rounds.csv")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token-shift", "--after", "tiny"], "no folder of a job"),
        (["token-shift", "--after", "JOB", "--domains", "photos"], "Did you mean 'photo'"),
        (["token-shift", "--after", "JOB", "--domains", "target"], "no image with a chain"),
        (["token-shift", "--after", "JOB", "--targets", "nowhere.jsonl"], "nowhere.jsonl"),
        (["divergence", "--dataset", "ShapeReasoning", "--encoder", "tiny"], "Did you mean 'ShapesReasoning'"),
        (["divergence", "--dataset", "ShapesReasoning", "--encoder", "none"], "neither a folder nor a hub id"),
    ],
)
def test_faults_end_with_a_message(arguments, message, job, tmp_path, capsys):
    given = [str(job) if word == "JOB" else word for word in arguments]
    assert cli.main(["analyse", *given, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["analyse", "--help"])
    assert "analyse faithfulness sweep/" in capsys.readouterr().out
