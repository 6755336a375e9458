"""The search for a better variant: comparable candidates, the grid's jobs, the rule that picks one, and its test."""

import csv
import json
from pathlib import Path

import pytest

from builders.processes import environment, run_python
from builders.study_jobs import write_job
from domainbed_reasoning.bridge.hparam_names import check_hparams
from domainbed_reasoning.method.schedule import plan_stages
from domainbed_reasoning.sweeps.miniature import regimes, study, table, variants
from domainbed_reasoning.sweeps.miniature.__main__ import main
from domainbed_reasoning.sweeps.miniature.variants import CANDIDATES

RESULTS = Path(__file__).parents[2] / "results"
BY_NAME = {row.name: row for row in CANDIDATES}
RATES = {"clear": {"RDMLDG": 2e-3, "RDMLDG balanced": 7e-4}, "camouflaged": {"RDMLDG": 6e-3, "RDMLDG balanced": 2e-3}}


@pytest.fixture
def output(tmp_path):
    """An output folder with learning rates."""
    (tmp_path / regimes.RATES_FILE).write_text(json.dumps(RATES))
    return tmp_path


def write_search(output, gains, unparsed=None):
    """Write the jobs of a search: RD-MLDG at .5, candidates at .5 plus their gain by regime, or at .4."""
    for row, regime, job in variants._search(output):
        by_regime = gains.get(row.name, (-0.1, -0.1)) if row is not variants.BASELINE else (0.0, 0.0)
        write_job(job, 0.5 + by_regime[regimes.REGIMES.index(regime)], (unparsed or {}).get(row.name, 0.0))


def picked(output):
    return json.loads((output / variants.VARIANT_FILE).read_text())


@pytest.mark.parametrize("row", CANDIDATES, ids=lambda row: row.name)
def test_candidates_take_244_updates_with_the_stages_that_their_names_say(row):
    """The first stage has one more update, the last one fewer; DomainBed evaluates at the end of each."""
    check_hparams(row.hparams, row.algorithm)
    rounds = row.hparams["sarr_rounds"]
    epochs = [row.hparams["mtct_epochs"], *[row.hparams["sarr_epochs"]] * rounds]
    plan = plan_stages(epochs, 1, row.steps)
    stages = {"one late": [184, 60], "late": [123, 61, 60]}
    expected = next((steps for words, steps in stages.items() if words in row.name), [62, 61, 61, 60])
    assert [stage.steps for stage in plan.stages] == expected and sum(expected) == row.steps == 244
    assert plan.checkpoint_freq == row.hparams["first_evaluation"] == 61
    assert all(row.hparams[key] == variants.BASELINE.hparams[key] for key in ("batch_size", "teacher"))


def test_candidates_have_names_and_folders_of_their_own_and_leave_the_study_as_it_is():
    new = [row for row in CANDIDATES if row not in regimes.ROWS]
    assert [row.name for row in CANDIDATES if row not in new] == [
        "RDMLDG well_formed", "RDMLDG consistent", "RDMLDG balanced",
    ]  # fmt: skip
    for key in ("name", "folder"):
        own = [getattr(row, key) for row in new]
        assert len(set(own)) == len(new) == 6 and not {getattr(row, key) for row in regimes.ROWS} & set(own)
    assert not {row.name for row in new} & {row.name for row, *_ in regimes.cells()}


def test_the_search_shares_the_jobs_that_the_grid_has_run(output):
    """RD-MLDG and the balanced one at their chosen rates, in two regimes with two targets each: 8 jobs."""
    grid = {job.folder for job in regimes.grid_jobs(output)}
    shared = {(row.name, regime) for row, regime, job in variants._search(output) if job.folder in grid}
    assert shared == {(name, regime) for name in ("RDMLDG", "RDMLDG balanced") for regime in regimes.REGIMES}
    folders = {job.folder for job in variants.search_jobs(output)}
    assert len(folders) == 40 and len(folders & grid) == 8


def test_balanced_candidates_take_the_balanced_ones_rate(output):
    rates = {
        (row.name, regime): json.loads(job.arguments["hparams"])["lr"] for row, regime, job in variants._search(output)
    }
    for name in BY_NAME:
        own = "RDMLDG balanced" if "balanced" in name else "RDMLDG"
        assert [rates[name, regime] for regime in regimes.REGIMES] == [RATES[regime][own] for regime in regimes.REGIMES]


def test_the_largest_gain_in_the_worse_regime_wins(output, capsys):
    """.3 and 0 lose to .1 and .05; .2 and .2 is rejected, as 6% of its chains name no class."""
    gains = {"RDMLDG well_formed": (0.3, 0.0), "RDMLDG late rounds": (0.05, 0.1)}
    gains["RDMLDG falling loss consistent"] = (0.2, 0.2)
    write_search(output, gains, {"RDMLDG falling loss consistent": 0.06, "RDMLDG late rounds": 0.04})
    variants.report(output)
    printed = capsys.readouterr().out
    assert "RDMLDG late rounds (gains in both regimes)" in printed and "unparsed 0.060  rejected" in printed
    found = picked(output)
    assert found["picked"] == "RDMLDG late rounds" and found["beats_baseline"]
    assert found["seed"] == 0 and found["targets"] == [0, 2]
    assert found["learning_rates"] == {"clear": 2e-3, "camouflaged": 6e-3}
    assert found["candidates"]["RDMLDG late rounds"] == {
        "source_validation": pytest.approx({"clear": 0.55, "camouflaged": 0.6}),
        "gains": {"clear": 0.05, "camouflaged": 0.1},
        "worst_gain": 0.05,
        "unparsed": pytest.approx(0.04),
        "rejected": False,
    }
    assert found["candidates"]["RDMLDG falling loss consistent"]["rejected"]


def test_one_job_whose_chains_do_not_parse_rejects_a_candidate(output):
    """In one regime with one target only."""
    write_search(output, {"RDMLDG balanced": (0.2, 0.2), "RDMLDG consistent": (0.1, 0.1)})
    lines = variants.search_rows(output)
    next(one for one in lines if one["row"] == "RDMLDG balanced")["unparsed"] = 0.2
    assert variants.pick(lines)["picked"] == "RDMLDG consistent"


def test_a_tie_goes_to_the_earlier_candidate_and_a_loss_is_recorded(output, capsys):
    """-.02 in the worse regime of both: the best, but no gain."""
    write_search(output, {"RDMLDG falling loss": (-0.02, 0.1), "RDMLDG balanced late rounds": (0.3, -0.02)})
    variants.report(output)
    found = picked(output)
    assert found["picked"] == "RDMLDG falling loss" and not found["beats_baseline"]
    assert found["candidates"]["RDMLDG falling loss"]["worst_gain"] == -0.02
    assert "no candidate gains in both regimes" in capsys.readouterr().out


def test_no_variant_is_picked_while_jobs_are_missing_or_if_all_are_rejected(output, capsys):
    write_search(output, {}, dict.fromkeys(BY_NAME, 0.5))
    done = [job.folder / "done" for job in variants.search_jobs(output)[-3:]]
    for path in done:
        path.unlink()
    variants.report(output)
    assert "3 jobs of the search have not completed: no variant is picked" in capsys.readouterr().out
    for path in done:
        path.touch()
    variants.report(output)
    assert "All candidates are rejected" in capsys.readouterr().out
    assert not (output / variants.VARIANT_FILE).exists() and variants.test_jobs(output) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test"], "variant.json: run `--search` first, which writes it"),
        (["--search"], "learning_rates.json: run `--choose` first, which writes it"),
        (["--search", "--study", "miniature"], "--search and --test need `--study regimes`"),
        (["--test", "--study", "miniature"], "--search and --test need `--study regimes`"),
    ],
)
def test_what_a_verb_needs_is_named(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(regimes, "PUBLISHED_RATES", tmp_path / "none.json")
    with pytest.raises(SystemExit):
        main([*arguments, "--output_dir", str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", BY_NAME)
def test_a_picked_row_of_the_study_has_its_jobs_and_a_new_one_has_its_own(output, name):
    """24 cells: 3 seeds, 4 targets, 2 regimes."""
    (output / variants.VARIANT_FILE).write_text(json.dumps({"picked": name}))
    jobs, studys = variants.test_jobs(output), {regimes.job_of(*cell, output).folder for cell in regimes.cells()}
    assert len({job.folder for job in jobs}) == 24
    assert sum(job.folder in studys for job in jobs) == (24 if BY_NAME[name] in regimes.ROWS else 0)
    assert {job.arguments["trial_seed"] for job in jobs} == set(regimes.TEST_SEEDS)
    rates = {json.loads(job.arguments["hparams"])["lr"] for job in jobs}
    own = "RDMLDG balanced" if "balanced" in name else "RDMLDG"
    assert rates == {RATES[regime][own] for regime in regimes.REGIMES}
    study = variants.with_picked(output)
    assert len(study.cells()) == len(regimes.cells()) + (0 if BY_NAME[name] in regimes.ROWS else 24)
    assert {study.job_of(*cell, output).folder for cell in study.cells()} == studys | {job.folder for job in jobs}


def test_tables_compare_the_picked_row_with_the_main_rows(output):
    """Four targets of one seed in one regime: .8 against RD-MLDG's .7, MTCT's .75 and label only's .9."""
    rows = {row.name: row for row in regimes.ROWS}
    for target in range(4):
        for name, accuracy in (("RDMLDG", 0.7), ("MTCT", 0.75), ("LabelSFT", 0.9)):
            write_job(regimes.job_of(rows[name], "clear", target, 1, output), accuracy)
        write_job(variants.job_of(BY_NAME["RDMLDG late rounds"], "clear", target, 1, output), 0.8)
    table.write(output, output / "before", variants.with_picked(output))
    assert "picked variant" not in (output / "before" / "table.md").read_text(encoding="utf-8").casefold()

    (output / variants.VARIANT_FILE).write_text('{"picked": "RDMLDG late rounds"}')
    assert main(["--table", "--output_dir", str(output), "--results_dir", str(output / "after")]) == 0
    text = (output / "after" / "table.md").read_text(encoding="utf-8")
    assert "| RDMLDG late rounds | 4 | 80.0 ± 0.0 [± ?] |" in text
    assert "The picked variant, RDMLDG late rounds: paired differences" in text
    assert "| picked variant against RD-MLDG, chain | 4 | 10.0 ± 0.0 [± ?] | – | 4 : 0 |" in text
    assert "| picked variant against RD-MLDG, label | 4 | 10.0 ± 0.0 [± ?] | – | 4 : 0 |" in text
    assert "| picked variant against MTCT for as many steps, chain | 4 | 5.0 ± 0.0 [± ?] | – | 4 : 0 |" in text
    assert "| picked variant's chain against label only | 4 | -10.0 ± 0.0 [± ?] | – | 0 : 4 |" in text


def published(results):
    """The picked variant of a results folder, and that which its ``choice.csv`` selects."""
    with (results / "choice.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    its = json.loads((results / variants.VARIANT_FILE).read_text())
    return {key: its[key] for key in ("picked", "beats_baseline", "candidates")}, variants.pick(lines)


def test_the_variant_is_published_with_the_lines_that_picked_it(output):
    write_search(output, {"RDMLDG late rounds": (0.12345, 0.1)})
    variants.report(output)
    assert main(["--table", "--output_dir", str(output), "--results_dir", str(output / "results")]) == 0
    its, selected = published(output / "results")
    assert its["picked"] == "RDMLDG late rounds" and its.items() <= selected.items()


@pytest.mark.parametrize("name", ["miniature", "regimes"])
def test_the_published_table_is_what_the_published_rows_give(name):
    results = RESULTS / name
    with (results / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = [row | {"seed": int(row["seed"])} for row in csv.DictReader(file)]
    its = variants.with_picked(results) if name == regimes.NAME else study
    assert len(rows) == len(its.cells())
    assert table.render(rows, its) == (results / "table.md").read_text(encoding="utf-8")


def test_the_published_variant_is_the_one_that_the_published_search_selects():
    its, selected = published(RESULTS / "regimes")
    assert its.items() <= selected.items()


@pytest.mark.slow
@pytest.mark.parametrize("domainbed_root", ["standin"], indirect=True)
def test_search_and_test_run_resume_and_are_tabulated(output, domainbed_root):
    """RD-MLDG and one candidate, one regime, target and seed, four updates: an update a stage."""
    code = (
        "import sys\nfrom dataclasses import replace\nfrom domainbed_reasoning.sweeps.miniature import variants\n"
        "from domainbed_reasoning.sweeps.miniature.__main__ import main\n"
        "def short(row): return replace(row, steps=4, seeds=(1,), hparams=row.hparams | {'first_evaluation': 4})\n"
        "variants.BASELINE = short(variants.BASELINE)\n"
        "variants.CANDIDATES = [short(row) for row in variants.CANDIDATES if row.name == 'RDMLDG falling loss']\n"
        "variants.REGIMES, variants.CHOICE_TARGETS, variants.TARGETS = ('clear',), (2,), (2,)\n"
        "variants.MOST_UNPARSED = 1\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ("--output_dir", str(output), "--results_dir", str(output / "results"))
    variables = {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(output / "cache")}
    for verb, done_jobs in (("--search", 2), ("--search", 2), ("--test", 3), ("--table", 3)):
        done = run_python("-c", code, verb, *arguments, cwd=output, env=environment(domainbed_root, **variables))
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list(output.rglob("done"))) == done_jobs
    assert picked(output)["picked"] == "RDMLDG falling loss"
    assert "| RDMLDG falling loss | 1 |" in (output / "results" / "table.md").read_text(encoding="utf-8")
