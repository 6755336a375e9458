"""The study in two regimes: a fair design, stock jobs, rates by source validation, and tables of what jobs did."""

import csv
import json
import re
from pathlib import Path

import pytest

from builders.study_jobs import write_job
from domainbed_reasoning.bridge.hparam_names import check_hparams
from domainbed_reasoning.images import creatures
from domainbed_reasoning.method.schedule import plan_stages
from domainbed_reasoning.sweeps.miniature import regimes, table
from domainbed_reasoning.sweeps.miniature.__main__ import main
from domainbed_reasoning.sweeps.miniature.regimes import BALANCED, MAIN, ROWS, TEACHERS, choices, job_of

TRAINED = [row for row in ROWS if row.algorithm not in ("ERM", "MLLMZeroShot")]


def test_every_row_takes_244_updates_with_the_same_batch_but_those_named_for_another_number():
    named = {row.name: row.steps for row in TRAINED if row.steps != 244}
    assert named == {
        "MTCT before rounds": 62, "LabelSFT paper's epochs": 145, "ReasoningSFT paper's epochs": 145,
        "MTCT paper's epochs": 145, "MTCT as many steps": 577, "RDMLDG paper's epochs": 577,
    }  # fmt: skip
    assert {row.hparams["batch_size"] for row in TRAINED} == {4}


def test_stages_are_of_equal_length_and_evaluated_at_their_ends_and_the_papers_epochs_are_its():
    """3 sources of 240 images, of which DomainBed trains on 192: 576 images are 48 steps of 3 x 4."""
    plan = plan_stages([1, 1, 1, 1], 1, regimes.STEPS)
    assert [stage.steps for stage in plan.stages] == [62, 61, 61, 60]
    assert [stage.last for stage in plan.stages][:-1] == [61 * k for k in (1, 2, 3)] and plan.checkpoint_freq == 61
    steps = 3 * int(creatures.SIZE_OF_DOMAIN * 0.8) // (3 * 4)
    assert plan_stages([3], steps).n_steps == regimes.PAPER_MTCT
    assert plan_stages([3, 3, 3, 3], steps).n_steps == regimes.PAPER_RDMLDG


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_every_hparam_is_one_that_something_reads(row):
    check_hparams(row.hparams, row.algorithm)


def test_names_and_folders_tell_rows_apart_and_every_cell_is_run_once():
    assert len({row.name for row in ROWS}) == len(ROWS)
    keys = [(row.name, regime, target, seed) for row, regime, target, seed in regimes.cells()]
    claims = {row.name for row in (*MAIN, *regimes.BALANCED, *regimes.FILTERS)}
    assert len(keys) == len(set(keys)) and [key[0] in claims for key in keys] == [True] * 248 + [False] * 360
    assert all([key[3] for key in part] == sorted(key[3] for key in part) for part in (keys[:248], keys[248:]))
    assert regimes.CHOICE_SEED not in regimes.TEST_SEEDS
    assert {row.hparams["teacher_error"] for row in TEACHERS} == {0.1, 0.4}
    own = [row for row in ROWS if row not in MAIN and not row.folder.startswith("common_")]
    assert len({row.folder for row in own}) == len(own)


def write_grid(output, accuracies, unparsed):
    """Write the whole grid: validation accuracy and unparsed chains by rate."""
    for row, rate in zip(choices(), regimes.RATES_TRIED * len(regimes.TUNED), strict=True):
        for regime in regimes.REGIMES:
            for target in regimes.CHOICE_TARGETS:
                job = job_of(row, regime, target, regimes.CHOICE_SEED, output / "choice", 1)
                write_job(job, accuracies[rate], unparsed[rate])


def test_best_rate_wins_unless_its_chains_stop_parsing(tmp_path, capsys):
    """Validation .6, .8 and .9, but a tenth of the last one's chains names no class."""
    low, middle, high = regimes.RATES_TRIED
    write_grid(tmp_path, {low: 0.6, middle: 0.8, high: 0.9}, {low: 0.0, middle: 0.01, high: 0.1})
    regimes.report_choice(tmp_path)
    printed = capsys.readouterr().out
    assert "0.900   unparsed 0.100  rejected" in printed and "learning_rates.json" in printed
    rates = regimes.learning_rates(tmp_path)
    assert rates == {regime: {row.name: middle for row in regimes.TUNED} for regime in regimes.REGIMES}
    of_mtct = {row.name: row for row in ROWS}["MTCT balanced"]
    assert json.loads(job_of(of_mtct, "clear", 0, 1, tmp_path).arguments["hparams"])["lr"] == middle


def continue_elsewhere(output, elsewhere):
    """Write an unfinished study's tables as another output folder's record of jobs."""
    table.write(output, elsewhere / "recorded", regimes)
    return elsewhere


def test_a_grid_is_completed_on_another_machine_by_the_jobs_that_its_table_lacks(tmp_path, capsys):
    """1 of 96 jobs is missing; the folder of the other machine has that one alone."""
    low, middle, high = regimes.RATES_TRIED
    write_grid(tmp_path / "here", {low: 0.6, middle: 0.7, high: 0.65}, dict.fromkeys(regimes.RATES_TRIED, 0.0))
    missing, *others = regimes.grid_jobs(tmp_path / "here")
    (missing.folder / "done").unlink()
    there = continue_elsewhere(tmp_path / "here", tmp_path / "there")
    assert missing.arguments == (own := regimes.grid_jobs(there)[0]).arguments and len(others) == 95
    regimes.report_choice(there)
    assert "1 jobs of the grid have not completed" in capsys.readouterr().out
    write_job(own, 0.6)
    assert main(["--choose", "--output_dir", str(there)]) == 0
    assert "95 of 96 jobs are recorded" in capsys.readouterr().out
    assert regimes.learning_rates(there)["clear"] == {row.name: middle for row in regimes.TUNED}


def test_lines_of_jobs_that_ran_elsewhere_enter_the_tables_as_they_are(tmp_path, capsys):
    """Two domains ran here and two there, equal in four decimals; at another learning rate their lines do not count."""
    label, chain = (next(row for row in ROWS if row.name == name) for name in ("LabelSFT", "ReasoningSFT"))

    def write_jobs(target, output):
        write_job(job_of(label, "clear", target, 1, output), 0.5 + target / 10)
        write_job(job_of(chain, "clear", target, 1, output), 0.5 + target / 10 + 1e-9)

    whole = tmp_path / "whole"
    for target in range(4):
        write_jobs(target, whole)
        if target < 2:
            write_jobs(target, tmp_path / "here")
    there = continue_elsewhere(tmp_path / "here", tmp_path / "there")
    for target in (2, 3):
        write_jobs(target, there)
    texts = {}
    for output in (there, whole):
        table.write(output, output / "results", regimes)
        texts[output] = [(output / "results" / name).read_text(encoding="utf-8") for name in ("rows.csv", "table.md")]
    assert texts[there] == texts[whole] and "| LabelSFT | 4 | 65.0 " in texts[there][1]
    assert "| reasoning only against label only | 4 | 0.0 ± 0.0 [± ?] | -0.6 | 0 : 0 |" in texts[there][1]
    capsys.readouterr()
    assert main(["--design", "--output_dir", str(there)]) == 0
    assert re.search(r"^LabelSFT +LabelSFT +244 +24 +4 ", capsys.readouterr().out, re.MULTILINE)

    (there / regimes.RATES_FILE).write_text('{"clear": {"LabelSFT": 6e-3, "ReasoningSFT": 6e-3}}')
    table.write(there, there / "other", regimes)
    assert len((there / "other" / "rows.csv").read_text().splitlines()) == 1


def test_a_record_that_does_not_name_its_jobs_is_refused(tmp_path, capsys):
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / "choice.csv").write_text("row,regime\nMTCT,clear\n")
    with pytest.raises(SystemExit):
        main(["--choose", "--output_dir", str(tmp_path)])
    assert "choice.csv has no column job" in capsys.readouterr().err


def test_incomplete_grid_selects_nothing(tmp_path, capsys):
    write_grid(tmp_path, dict.fromkeys(regimes.RATES_TRIED, 0.5), dict.fromkeys(regimes.RATES_TRIED, 0.0))
    (regimes.grid_jobs(tmp_path)[0].folder / "done").unlink()
    regimes.report_choice(tmp_path)
    assert "1 jobs of the grid have not completed" in capsys.readouterr().out
    assert not (tmp_path / regimes.RATES_FILE).exists()


def test_where_no_rate_qualifies_the_fewest_unparsed_chains_win():
    low, middle, high = regimes.RATES_TRIED
    lines = [
        {"row": f"SARR lr {rate:g}", "regime": "clear", "source_validation": accuracy, "unparsed": unparsed}
        for rate, accuracy, unparsed in ((low, "0.2", "0.1"), (middle, "0.9", "0.3"), (high, "0.9", "0.2"))
        for _ in regimes.CHOICE_TARGETS
    ]
    assert regimes.best_rates(lines) == {"clear": {"SARR": low}, "camouflaged": {}}


def test_published_rates_are_those_that_the_published_grid_selects():
    grid = Path(__file__).parents[2] / "results/regimes/choice.csv"
    assert grid.exists() == regimes.PUBLISHED_RATES.exists()
    if grid.exists():
        with grid.open(newline="") as file:
            assert regimes.best_rates(list(csv.DictReader(file))) == regimes.learning_rates()


def test_the_study_does_not_start_before_its_rates_are_selected(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(regimes, "PUBLISHED_RATES", tmp_path / "none.json")
    with pytest.raises(SystemExit):
        main(["--run", "--output_dir", str(tmp_path)])
    assert "run `--choose` first" in capsys.readouterr().err


def test_row_without_its_own_rate_takes_its_algorithms(tmp_path, monkeypatch):
    monkeypatch.setattr(regimes, "PUBLISHED_RATES", tmp_path / regimes.RATES_FILE)
    (tmp_path / regimes.RATES_FILE).write_text('{"clear": {"MTCT": 6e-3, "MTCT balanced": 7e-4}}')
    assert [regimes.rate_of(row.name, "MTCT", "clear") for row in (TEACHERS[0], BALANCED[0])] == [6e-3, 7e-4]
    assert regimes.rate_of("MTCT", "MTCT", "camouflaged") == regimes.COMMON_RATE


def test_row_at_the_common_rate_shares_the_main_tables_jobs_where_the_rates_are_equal(tmp_path):
    by_name = {row.name: row for row in ROWS}
    (tmp_path / regimes.RATES_FILE).write_text('{"clear": {"MTCT": 2e-3}, "camouflaged": {"MTCT": 6e-3}}')
    for regime, is_shared in (("clear", True), ("camouflaged", False)):
        jobs = [job_of(by_name[name], regime, 0, 1, tmp_path) for name in ("MTCT", "MTCT at the common rate")]
        assert (jobs[0].folder == jobs[1].folder) == is_shared
        assert json.loads(jobs[1].arguments["hparams"])["lr"] == regimes.COMMON_RATE


def test_tables_say_who_won_in_each_regime(tmp_path):
    """Reasoning only .1 below label only in the four domains of one regime, SARR level with it within .0001."""
    by_name = {row.name: row for row in ROWS}
    for target in range(4):
        write_job(job_of(by_name["LabelSFT"], "clear", target, 1, tmp_path), 0.8)
        write_job(job_of(by_name["ReasoningSFT"], "clear", target, 1, tmp_path), 0.7, well_formed=0.5)
        write_job(job_of(by_name["SARR"], "clear", target, 1, tmp_path), 0.6999)
    table.write(tmp_path, tmp_path / "results", regimes)
    text = (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    assert "## Clear creatures (as OfficeHome)" in text and "## Camouflaged creatures" in text
    assert "| reasoning only against label only | 4 | -10.0 ± 0.0 [± ?] | -0.6 | 0 : 4 |" in text
    assert "| SARR without the label path against reasoning only | 4 | 0.0 ± 0.0 [± ?] | +2.1 | 0 : 4 |" in text
    assert re.search(r"\| ReasoningSFT \| 4 \| 70\.0 ± 0\.0 \[± \?\] \|.*\| 70\.0 ± 0\.0 \[± \?\] \| 88\.8 \|", text)


def test_rounds_are_compared_within_a_job(tmp_path):
    """Evaluated after the first step, after the supervised stage and after each round: .5, then .6, .6 and .8."""
    row = next(row for row in ROWS if row.name == "RDMLDG well_formed")
    for target in range(4):
        job = job_of(row, "clear", target, 1, tmp_path)
        write_job(job, 0.8)
        last = json.loads((job.folder / "results.jsonl").read_text())
        earlier = [
            last | {f"env{target}_{split}_acc": value for split in ("in", "out")} for value in (0, 0.5, 0.6, 0.6)
        ]
        (job.folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (*earlier, last)))
    table.write(tmp_path, tmp_path / "results", regimes)
    text = (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    assert "| 50, 60, 60, 80 |" in text
    assert "| RDMLDG well_formed: one round against none | 4 | 10.0 ± 0.0 [± ?] | – | 4 : 0 |" in text
    assert "| RDMLDG well_formed: two against one | 4 | 0.0 ± 0.0 [± ?] | – | 0 : 0 |" in text


def test_the_papers_accuracy_is_that_of_its_own_answer():
    """Its ablation on OfficeHome and TerraIncognita, and on the latter its accuracy after each round."""
    of = regimes.papers_accuracy
    assert [of(regime, ("MTCT paper's epochs", "chain")) for regime in regimes.REGIMES] == [90.58, 67.19]
    assert of("clear", ("LabelSFT at the common rate", "label")) == 89.39 and of("clear", ("MTCT", "label")) is None
    assert [of("camouflaged", ("RDMLDG", f"after{rounds}")) for rounds in range(4)] == [67.19, 70.06, 70.59, 70.65]
    assert of("clear", ("RDMLDG", "after1")) is of("camouflaged", ("RDMLDG balanced", "after1")) is None
    assert of("clear", ("ERM", "accuracy")) is of("clear", ("RDMLDG consistent", "chain")) is None


def test_captions_are_read_as_the_class_whose_parts_they_name():
    for index in range(12):
        for teacher in creatures.TEACHERS:
            text = creatures.chain("clear", 0, index, teacher)
            assert regimes.described_class(text) == creatures.CLASS_NAMES[creatures.label(index)]
    assert regimes.described_class("no chain") is None


def test_the_design_is_printed_with_what_is_done_of_it(tmp_path, capsys):
    write_job(job_of(MAIN[1], "clear", 0, 1, tmp_path), 0.5)
    assert main(["--design", "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "LabelSFT         244    24     1" in printed
    # The common rate is that of four rows in one regime and of two in the other, with 12 jobs each.
    assert f"{len(regimes.cells())} cells, {len(regimes.cells()) - 6 * 12} jobs. The first: " in printed
