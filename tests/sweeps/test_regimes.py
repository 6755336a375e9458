"""The study in two regimes: a fair design, stock jobs, rates by source validation, and tables of what jobs did."""

import json

import pytest

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
    assert len(keys) == len(set(keys)) and [key[3] for key in keys] == sorted(key[3] for key in keys)
    assert regimes.CHOICE_SEED not in regimes.TEST_SEEDS
    assert {row.hparams["teacher_error"] for row in TEACHERS} == {0.1, 0.4}
    own = [row for row in ROWS if row not in MAIN and not row.folder.startswith("common_")]
    assert len({row.folder for row in own}) == len(own)


def write_job(job, accuracy, unparsed=0.0, **more):
    """Write the files of a finished job whose validation accuracy is ``accuracy``."""
    job.folder.mkdir(parents=True)
    record = {"args": dict(job.arguments), "hparams": json.loads(job.arguments["hparams"]), "step": 243, **more}
    record["args"].setdefault("holdout_fraction", 0.2)
    answers = {}
    for env in range(4):
        record |= {f"env{env}_in_acc": accuracy, f"env{env}_out_acc": accuracy}
        both = {"label": accuracy, "chain": accuracy, "unparsed": unparsed}
        answers[f"env{env}"] = {"in": both, "out": both}
    (job.folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    (job.folder / "answers.json").write_text(json.dumps(answers))
    (job.folder / "done").write_text("done")


def test_the_best_rate_wins_unless_its_chains_stop_parsing(tmp_path, capsys):
    """Validation .6, .8 and .9, but a tenth of the last one's chains names no class."""
    for rate, accuracy, unparsed in zip(regimes.RATES_TRIED, (0.6, 0.8, 0.9), (0.0, 0.01, 0.1), strict=True):
        row = next(row for row in choices() if row.name == f"MTCT balanced lr {rate:g}")
        for target in regimes.CHOICE_TARGETS:
            write_job(job_of(row, "clear", target, regimes.CHOICE_SEED, tmp_path / "choice", 1), accuracy, unparsed)
    assert regimes.chosen_rates(tmp_path) == {("MTCT balanced", "clear"): regimes.RATES_TRIED[1]}
    regimes.print_choice(tmp_path)
    assert f'("MTCT balanced", "clear"): {regimes.RATES_TRIED[1]:g},' in capsys.readouterr().out
    assert len(regimes.choice_rows(tmp_path)) == 6


def test_a_row_without_a_rate_of_its_own_takes_its_algorithms(monkeypatch):
    rates = {("MTCT", "clear"): 6e-3, ("MTCT balanced", "clear"): 7e-4}
    monkeypatch.setattr(regimes, "LEARNING_RATES", rates)
    assert [regimes.rate_of(row, "clear") for row in (TEACHERS[0], BALANCED[0])] == [6e-3, 7e-4]
    assert regimes.rate_of(TEACHERS[0], "camouflaged") == regimes.COMMON_RATE


def test_tables_say_who_won_in_each_regime(tmp_path):
    """Reasoning only .1 below label only in the four domains of one regime."""
    by_name = {row.name: row for row in ROWS}
    for target in range(4):
        write_job(job_of(by_name["LabelSFT"], "clear", target, 1, tmp_path), 0.8)
        write_job(job_of(by_name["ReasoningSFT"], "clear", target, 1, tmp_path), 0.7, well_formed=0.5)
    table.write(tmp_path, tmp_path / "results", regimes)
    text = (tmp_path / "results" / "table.md").read_text(encoding="utf-8")
    assert "## Clear creatures (as OfficeHome)" in text and "## Camouflaged creatures" in text
    assert "| reasoning only against label only | 4 | -10.0 ± 0.0 [± ?] | 0 : 4 |" in text
    assert "| ReasoningSFT | 4 | 70.0 ± 0.0 [± ?] |" in text


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
    assert "LabelSFT         244    24     1" in printed and f"{len(regimes.cells())} jobs. The first: " in printed
