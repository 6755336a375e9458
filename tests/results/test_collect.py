"""`collect`: equal to stock's numbers to the digit, with a report of what stock counts silently."""

import importlib.util
import io
import json
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from builders.files import read_lines, write_lines
from builders.processes import environment, run_python
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.results import collect, summarize
from domainbed_reasoning.results.base_to_new import base_to_new_tables
from domainbed_reasoning.results.job_folders import read_jobs
from domainbed_reasoning.results.problems import validate_jobs
from domainbed_reasoning.results.render import latex, markdown
from domainbed_reasoning.results.report import read_report
from domainbed_reasoning.results.report.markdown import render_markdown
from domainbed_reasoning.results.tables import Table, accuracy_tables, answers_table, one_source_tables, rounds_table

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
TRAINING, LEAVE_ONE_OUT, ORACLE = (
    "training-domain validation set",
    "leave-one-domain-out cross-validation",
    "test-domain validation set (oracle)",
)


def problems(folder, **options):
    return {(problem["kind"], problem["job"]): problem for problem in collect(folder, **options).attrs["problems"]}


def accuracies(folder, **options):
    frame = collect(folder, **options)
    return list(frame[frame["selection"] == TRAINING]["accuracy"])


def seeded_records(folder, names):
    """Write some of the contract's seeded sweeps: ties, gaps, pairs of targets, unknown algorithms."""
    spec = importlib.util.spec_from_file_location("contract_records", HERE.parent / "contract" / "records.py")
    records = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = records
    spec.loader.exec_module(records)
    for name in names:
        records.write_records(folder / name, *records.SETS[name])


def tables_of(printed):
    """Yield (title, method, head, rows) of what collect_results printed."""
    for block in printed.split("-------- ")[1:]:
        title, head, *rows = [line for line in block.splitlines() if line.strip()]
        name, _, method = title.partition(", model selection method: ")
        yield (
            name.removeprefix("Dataset: "),
            method,
            *([re.split(r"\s{2,}", line.strip()) for line in part] for part in ([head], rows)),
        )


def test_every_cell_and_average_is_what_stock_prints(domainbed_root, tmp_path):
    """Ties, gaps, missing trials and algorithms that DomainBed does not know included."""
    names = ["full", "gaps", "ties"]
    seeded_records(tmp_path, names)
    run_python(HERE / "both_tables.py", "seen.json", *names, cwd=tmp_path, env=environment(domainbed_root), check=True)
    compared = averages = 0
    for seen in json.loads((tmp_path / "seen.json").read_text()).values():
        for name, method, (head,), rows in tables_of(seen["stock"]):
            for algorithm, *cells, average in rows:
                if name == "Averages":
                    mine = seen["ours"]["averages"].get(
                        f"Averages over target domains, selected by {method}|{algorithm}"
                    )
                    assert (mine is None) == (set(cells) == {"X"}), "we leave out algorithms without any average"
                    for stock, ours in zip([average, *cells], mine or [], strict=mine is not None):
                        assert stock.replace("+/-", "±") in (ours, f"{ours} ± 0.0")
                        averages += 1
                    continue
                for domain, stock in zip(head[1:-1], cells, strict=True):
                    assert seen["ours"]["cells"].get(f"{method}|{name}|{algorithm}|{domain}", "X") == stock
                    compared += 1
                caption = f"{name}: accuracy in the target domain, selected by {method}"
                assert seen["ours"]["averages"].get(f"{caption}|{algorithm}", ["X"]) == [average]
    assert compared > 100 and averages > 10


def test_the_step_and_run_that_were_chosen_are_known(write_job):
    """Sources are best at step 20; the oracle takes the last step, and of two hparams seeds the better out-split."""
    write_job("a", accs=(0.1, 0.7, 0.4), args={"hparams_seed": 0})
    write_job("b", accs=(0.3, 0.2), args={"hparams_seed": 1})
    frame = collect(write_job.folder).set_index("selection")
    assert list(frame.index) == [TRAINING, ORACLE]
    assert frame["step"].to_list() == [20, 20] and frame["folder"].to_list() == ["a", "a"]
    assert frame["train_seconds"].to_list() == [10.5, 10.5]  # 21 steps of half a second


def test_mean_and_standard_error_over_trials(write_job):
    """.2 and .4: mean .3, population deviation .1, divided by √2 = .0707."""
    write_job("a", accs=(0.2,), trial=0)
    write_job("b", accs=(0.4,), trial=1)
    row = summarize(collect(write_job.folder)).iloc[0]
    assert row["trials"] == 2
    assert (row["accuracy"], row["accuracy_error"]) == pytest.approx((0.3, 0.0707), abs=1e-4)


def test_the_error_of_a_single_trial_is_missing_unless_stocks_numbers_are_asked_for(write_job, tmp_path):
    write_job("a", accs=(0.2,))
    assert math.isnan(summarize(collect(write_job.folder)).iloc[0]["accuracy_error"])
    assert summarize(collect(write_job.folder, as_stock=True)).iloc[0]["accuracy_error"] == 0
    cells = tmp_path / "cells.csv"
    assert cli.main(["collect", str(write_job.folder), "--format", "csv", "--output", str(cells)]) == 0
    assert (
        pd.read_csv(cells)["accuracy_error"].isna().all()
        and "0.0" not in accuracy_tables(collect(write_job.folder))[0].rows[0]
    )


def test_latex_is_tables_to_include_and_no_document(write_job, capsys):
    """Tabulars for booktabs alone, captions and what was left out as comments; hostile names stay in their line."""
    write_job("one", accs=(0.25,))
    write_job("died", trial=1, done=False)
    assert cli.main(["collect", str(write_job.folder), "--format", "latex"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(line for line in lines if not line.startswith("%"))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 2
    for word in ("documentclass", "usepackage", r"{document}", r"{table}", "adjustbox", "caption"):
        assert word not in text
    comments = [line for line in lines if line.startswith("%")]
    assert any("Debug28: accuracy in the target domain" in line for line in comments)
    assert any("incomplete: ERM on Debug28" in line for line in comments)
    table = Table("two\nlines\\end", ("A",), (("1",),), "note\rmore")
    assert latex(table).splitlines()[:4] == ["% two", "% lines\\end", "% note", "% more"]


def test_dead_job_is_reported_with_its_last_error_and_excluded(write_job):
    write_job("good", accs=(0.2,))
    died = write_job("died", accs=(0.9,), trial=1, done=False)
    (died / "err.txt").write_text("Traceback\n  …\nRuntimeError: CUDA out of memory\n")
    assert accuracies(write_job.folder) == [0.2]
    found = problems(write_job.folder)["incomplete", "ERM on Debug28, target 0, trial 1, hparams seed 0"]
    assert found["folders"] == ("died",) and "CUDA out of memory" in found["detail"]
    assert "delete_incomplete" in found["fix"]
    assert accuracies(write_job.folder, as_stock=True) == [0.2, 0.9]


def test_jobs_that_never_started_are_reported_together(write_job):
    write_job("good")
    for digit in "ab":
        (write_job.folder / (digit * 32)).mkdir()
    (write_job.folder / "analysis").mkdir()
    found = problems(write_job.folder)
    assert found["never started", "2 jobs"]["folders"] == ("a" * 32, "b" * 32)
    assert len(found) == 1


def test_a_restarted_job_counts_once(write_job):
    """Its first life ended after step 10 with better luck; stock picks the best of both lives."""
    job = write_job("twice", accs=(0.1, 0.2, 0.3))
    lines = (job / "results.jsonl").read_text().splitlines()
    lucky = [
        line.replace('"env0_in_acc": 0.2', '"env0_in_acc": 0.8').replace('_out_acc": 0.1', '_out_acc": 0.9')
        for line in lines
    ]
    (job / "results.jsonl").write_text("\n".join([*lucky[:2], *lines]) + "\n")
    assert accuracies(write_job.folder) == [0.3]
    assert accuracies(write_job.folder, as_stock=True) == [0.8]
    ((kind, _), found), *rest = problems(write_job.folder).items()
    assert kind == "repeated records" and "2 runs of the same job, 5 records" in found["detail"] and not rest


@pytest.mark.parametrize("name", ["results.earlier.jsonl", "results.jsonl.attempt-1"])
def test_records_that_were_set_aside_do_not_count(write_job, name):
    """Under today's name and that of older versions."""
    job = write_job("once", accs=(0.1, 0.2))
    (job / name).write_text((job / "results.jsonl").read_text().replace("0.1", "0.9"))
    assert accuracies(write_job.folder) == [0.2] and problems(write_job.folder) == {}


def test_incomplete_restart_does_not_replace_a_complete_run(write_job):
    job = write_job("twice", accs=(0.1, 0.2))
    text = (job / "results.jsonl").read_text()
    (job / "results.jsonl").write_text(text + text.splitlines()[0] + "\n")
    assert accuracies(write_job.folder) == [0.2]


def test_the_same_job_in_two_folders_counts_once(write_job):
    write_job("one", accs=(0.2,))
    write_job("two", accs=(0.6,))
    assert accuracies(write_job.folder) == [0.2]
    ((kind, _), found), *_ = problems(write_job.folder).items()
    assert kind == "repeated job" and found["folders"] == ("one", "two")


def test_two_settings_in_one_cell_are_not_mixed(write_job):
    write_job("one", hparams={"lr": 0.001})
    write_job("two", hparams={"lr": 0.01}, args={"steps": 50})
    write_job("other", target=1)
    frame = collect(write_job.folder)
    assert set(frame["folder"]) == {"other"}
    found = problems(write_job.folder)["mixed settings", "ERM on Debug28, target 0, trial 0, hparams seed 0"]
    assert "--steps (null / 50), lr (0.001 / 0.01)" in found["detail"]


def test_a_row_whose_cells_had_different_settings_is_named(write_job):
    for target in range(3):
        write_job(str(target), target=target, hparams={"lr": 0.01 if target == 2 else 0.001})
    found = problems(write_job.folder)["uneven settings", "ERM on Debug28, hparams seed 0, every trial"]
    assert found["folders"] == ("2",) and "lr (" in found["detail"]
    assert len(accuracies(write_job.folder)) == 3


def test_invalid_lines_are_reported_and_the_rest_is_used(write_job):
    job = write_job("one", accs=(0.2, 0.3))
    with open(job / "results.jsonl", "a") as file:
        file.write('{"step": 20, "args": {"algor\n[1, 2]\n{"step": 30}\n')
    assert accuracies(write_job.folder) == [0.3]
    ((kind, _), found), *_ = problems(write_job.folder).items()
    assert kind == "broken lines"
    assert (
        "line 3 is not valid JSON" in found["detail"]
        and "line 5 is not a DomainBed record: no step or no args" in found["detail"]
    )


def test_missing_trials_are_named_and_shown(write_job):
    for target in range(3):
        for trial in range(2):
            if (target, trial) != (1, 1):
                write_job(f"{target}{trial}", target=target, trial=trial)
    frame = collect(write_job.folder)
    assert "target 1 lacks trial 1" in frame.attrs["problems"][0]["detail"]
    (row,) = accuracy_tables(frame)[0].rows
    assert row[2] == "20.0 (1 of 2 trials)"


def test_a_folder_of_sweeps_is_one_table_with_a_row_a_setting(write_job, tmp_path):
    for rounds in (0, 2):
        for target in range(3):
            write_job(f"{target}", "RDMLDG", target=target, sweep=f"sweep/N={rounds}", hparams={"sarr_rounds": rounds})
    frame = collect(write_job.folder)
    assert [row[0] for row in accuracy_tables(frame)[0].rows] == ["RDMLDG (N=0)", "RDMLDG (N=2)"]
    assert frame.attrs["problems"] == []


def test_answers_and_rounds_are_shown_beside_the_accuracies(write_job):
    job = write_job("one", "RDMLDG", "ShapesReasoning", target=2, accs=(0.5,), sarr1_accepted=0.6, sarr2_accepted=0.8)
    shares = {"n": 10, "label": 0.9, "chain": 0.4, "chain_or_label": 0.5, "unparsed": 0.1, "well_formed": 0.7}
    (job / "answers.json").write_text(json.dumps({"env2": {"in": shares}}))
    table = answers_table(frame := collect(write_job.folder))
    assert table.rows == (("RDMLDG", "ShapesReasoning", "sketch", "90.0", "40.0", "50.0", "10.0", "70.0"),)
    assert rounds_table(frame).rows == (("RDMLDG", "ShapesReasoning", "sketch", "60.0", "80.0"),)


def test_jobs_with_and_without_shares_of_well_formed_chains_are_in_one_table(write_job):
    """The first job is an earlier version's, as are its answers."""
    old = write_job("old", "RDMLDG", "ShapesReasoning", target=0, sarr1_accepted=0.6, stage=1.0)
    new = write_job(
        "new", "RDMLDG", "ShapesReasoning", target=1, sarr1_accepted=0.5, sarr1_well_formed=0.25, well_formed=0.1,
        updated=0.5, stage=1.0,
    )  # fmt: skip
    (old / "answers.json").write_text(json.dumps({"env0": {"in": {"label": 0.9, "chain": 0.4, "unparsed": 0.1}}}))
    shares = {"label": 0.9, "chain": 0.4, "chain_or_label": 0.5, "unparsed": 0.1, "well_formed": 0.7}
    (new / "answers.json").write_text(json.dumps({"env1": {"in": shares}}))
    frame = collect(write_job.folder)
    assert [row[2:] for row in rounds_table(frame).rows] == [("photo", "60.0"), ("cartoon", "50.0 (25.0)")]
    rows = {row[2]: row[3:] for row in answers_table(frame).rows}
    assert rows["photo"] == ("90.0", "40.0", "–", "10.0", "–")
    assert rows["cartoon"] == ("90.0", "40.0", "50.0", "10.0", "70.0")
    (row,) = frame[(frame["selection"] == TRAINING) & (frame["target"] == 1)].to_dict("records")
    assert (row["sarr1_well_formed"], row["well_formed"], row["chain_or_label_accuracy"]) == (0.25, 0.7, 0.5)
    assert (summarize(frame)["sarr1_well_formed"].dropna() == 0.25).all()


@pytest.mark.slow
def test_stocks_tables_are_the_same_whether_records_have_our_keys_or_not(domainbed_root, run_stock, write_job):
    shown = []
    for more in ({}, {"sarr1_well_formed": 0.5, "well_formed": 0.1, "updated": 0.5}):
        for target in range(3):
            write_job(f"{len(shown)}-{target}", target=target, trial=len(shown), accs=(0.1, 0.3), **more)
        shown.append(run_stock(domainbed_root, "collect_results", "--input_dir", write_job.folder, cwd=domainbed_root))
    first, both = ([line for line in done.stdout.splitlines() if line.startswith("ERM")] for done in shown)
    assert first and first == both  # the second trial has the first's numbers


def test_tables_show_hostile_names_as_they_are():
    table = Table("a|b <script>", ("x_1", "50%"), (("$&#\\~^{}", "1.0 ± 2.0"),))
    assert r"\| \<script\>" not in markdown(table) and r"a\|b \<script\>" in markdown(table)
    assert r"\$\&\#\textbackslash{}\textasciitilde{}\textasciicircum{}\{\} & 1.0 $\pm$ 2.0 \\" in latex(table)
    assert r"\begin{tabular}{lr}" in latex(table)


def test_jobs_of_one_source_have_a_table_of_their_own(write_job, capsys):
    """Source 1: validation is best at step 10, whose targets have .2, .4, .6; step 20 would have .9 each."""
    job = write_job("one", "ERM", "ShapesReasoning", args={"test_envs": [0, 2, 3]}, accs=(0, 0, 0))
    records = read_lines(job / "results.jsonl")
    for record, source, targets in zip(
        records, (0.3, 0.8, 0.5), ((0.1,) * 3, (0.2, 0.4, 0.6), (0.9,) * 3), strict=True
    ):
        record["env1_out_acc"] = source
        record |= {f"env{env}_in_acc": value for env, value in zip((0, 2, 3), targets, strict=True)}
    (job / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    frame = collect(write_job.folder)
    (row,) = frame.attrs["one_source"]
    assert frame.empty and row["step"] == 10 and row["accuracy"] == pytest.approx(0.4)
    (table,) = one_source_tables(frame)
    assert table.head == ("Algorithm", "photo", "cartoon", "sketch", "negative", "Avg")
    assert table.rows == (("ERM", "X", "40.0", "X", "X", "X"),)
    assert cli.main(["collect", str(write_job.folder)]) == 0
    assert "| ERM | X | 40.0 | X | X | X |" in capsys.readouterr().out
    assert cli.main(["collect", str(write_job.folder), "--format", "csv"]) == 0
    assert "use --format single-source" in capsys.readouterr().err
    assert cli.main(["collect", str(write_job.folder), "--format", "single-source"]) == 0
    rows = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert list(zip(rows["source"], rows["target"], rows["accuracy"], rows["step"], strict=True)) == [
        ("cartoon", "photo", 0.2, 10), ("cartoon", "sketch", 0.4, 10), ("cartoon", "negative", 0.6, 10)
    ]  # fmt: skip
    assert set(rows["folder"]) == {str(job)}
    again = render_markdown(read_report(write_job.folder)).partition("## Reproduction")[2]
    assert "domainbed.scripts.sweep" not in again and "--test_envs 0 2 3" in again


@pytest.mark.parametrize("form", ["markdown", "latex", "csv", "trials"])
def test_the_command_writes_every_format_and_names_problems(write_job, tmp_path, capsys, form):
    write_job("one", accs=(0.25,))
    write_job("died", trial=1, done=False)
    output = tmp_path / "out" / "table"
    assert cli.main(["collect", str(write_job.folder), "--format", form, "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "incomplete: ERM on Debug28" in printed.err and str(output) in printed.out
    if form in ("csv", "trials"):
        assert list(pd.read_csv(output)["accuracy"]) == [0.25, 0.25]
    else:
        assert "25.0" in output.read_text("utf-8") and "incomplete" in output.read_text("utf-8")


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_folder_without_jobs_error_suggests_a_fix(tmp_path, capsys, where):
    (tmp_path / "empty").mkdir()
    assert cli.main(["collect", str(tmp_path / where)]) == 1
    assert "Pass the --output_dir of DomainBed's sweep" in capsys.readouterr().err


def test_job_folder_is_distinguished_from_a_sweep(write_job, capsys):
    assert cli.main(["collect", str(write_job("one"))]) == 1
    assert "pass its parent" in capsys.readouterr().err


def test_rounds_without_steps_are_reported(write_job):
    """Of three rounds two have a share: --steps did not reach the third. Records without stages are not ours."""
    kept = {"stage": 2.0, "sarr1_accepted": 0.6, "sarr2_accepted": 0.7}
    write_job("short", "RDMLDG", hparams={"sarr_rounds": 3}, args={"steps": 3}, **kept)
    write_job("whole", "RDMLDG", target=1, hparams={"sarr_rounds": 2}, args={"steps": 3}, **kept)
    write_job("other", "MTCT", hparams={"sarr_rounds": 3}, stage=0.0)  # --hparams of the sweep
    found = [problem for (kind, _), problem in problems(write_job.folder).items() if kind == "stages without steps"]
    assert [problem["folders"] for problem in found] == [("short",)]
    assert "SARR round 3 of 3 took no step (--steps 3)" in found[0]["detail"]


def test_a_round_that_kept_nothing_is_named(write_job):
    write_job("idle", "RDMLDG", stage=2.0, sarr1_accepted=0.0, sarr2_accepted=0.2, hparams={"sarr_rounds": 2})
    (found,) = [printed for (kind, _), printed in problems(write_job.folder).items() if kind == "nothing kept"]
    assert "SARR round 1 kept none" in found["detail"] and found["folders"] == ("idle",)


def test_a_round_that_trained_on_broken_chains_is_named(write_job):
    shares = {"sarr1_accepted": 0.6, "sarr1_well_formed": 0.95, "sarr2_accepted": 0.6, "sarr2_well_formed": 0.25}
    write_job("broken", "RDMLDG", stage=2.0, hparams={"sarr_rounds": 2}, **shares)
    (found,) = [printed for (kind, _), printed in problems(write_job.folder).items() if kind == "broken chains"]
    assert "25% in round 2 are well formed" in found["detail"] and "round 1" not in found["detail"]


def test_job_with_unparsed_chains_is_reported_with_their_number(write_job):
    """150 of 200 chains: 50 of 100, and 100 of 100. Answers by the label are not judged by their chains."""
    splits = {"in": {"n": 100, "label": 0.9, "chain": 0.4, "unparsed": 0.5}}
    splits["out"] = {"n": 100, "label": 0.9, "chain": 0.0, "unparsed": 1.0}
    for name, answer, target in (("chain", "chain", 0), ("label", "label", 1)):
        job = write_job(name, "MTCT", target=target, hparams={"answer": answer})
        (job / "answers.json").write_text(json.dumps({f"env{target}": splits}))
    (found,) = [printed for (kind, _), printed in problems(write_job.folder).items() if kind == "no class named"]
    assert found["folders"] == ("chain",)
    assert "150 of the 200 chains of the last evaluation name no class" in found["detail"]


def test_job_trained_on_chains_without_a_class_is_reported(write_job):
    for name, wrong in (("good", 0), ("bad", 3)):
        job = write_job(name, "MTCT", target=int(wrong > 0))
        (job / "task.json").write_text(json.dumps({"chains": {"source": 10, "no_class": wrong, "other_class": 0}}))
    (found,) = [printed for (kind, _), printed in problems(write_job.folder).items() if kind == "misleading chains"]
    assert found["folders"] == ("bad",) and "of its 10 teacher chains 3 conclude with no class" in found["detail"]


def test_unverified_chains_with_wrong_conclusions_are_not_reported(write_job):
    for target, choice in enumerate(("verified", "unverified")):
        job = write_job(choice, "MTCT", target=target, hparams={"chain_verification": choice})
        (job / "task.json").write_text(json.dumps({"chains": {"source": 10, "no_class": 0, "other_class": 3}}))
    (found,) = [printed for (kind, _), printed in problems(write_job.folder).items() if kind == "misleading chains"]
    assert found["folders"] == ("verified",)


@pytest.mark.parametrize("odd", [None, True, "all", -1, 10**400, 1.5, [1], {"n": 1}, 1e999])
def test_invalid_values_of_a_job_do_not_break_tables(write_job, odd):
    job = write_job("odd", "RDMLDG", hparams={"sarr_rounds": odd, "answer": "chain"}, stage=1.0, sarr1_accepted=odd)
    write_job("good", "RDMLDG", target=1)
    (job / "answers.json").write_text(
        json.dumps({"env0": {"in": {"n": odd, "unparsed": odd}, "out": odd}, "env1": odd})
    )
    (job / "task.json").write_text(json.dumps({"chains": {"source": odd, "no_class": odd, "other_class": odd}}))

    counted, _ = validate_jobs(read_jobs(write_job.folder))
    assert "good" in [job.folder.name for job in counted]


def test_last_step_measurements_are_not_attributed_to_the_selected_step(write_job):
    """Step 10 is chosen; rounds, answers, time and memory are those of the whole run, which ends at step 20."""
    job = write_job("one", "RDMLDG", "ShapesReasoning", target=2, accs=(0.1, 0.7, 0.4), hparams={"lr": 0.1})
    records = read_lines(job / "results.jsonl")
    for record, kept, memory, best in zip(records, (0.1, 0.3, 0.9), (1.0, 3.0, 2.0), (0.1, 0.9, 0.2), strict=True):
        record |= {"sarr1_accepted": kept, "mem_gb": memory} | {f"env{env}_out_acc": best for env in range(4)}
    records[-1]["sarr2_accepted"] = 0.8
    (job / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (job / "answers.json").write_text(json.dumps({"env2": {"in": {"label": 0.45, "chain": 0.35, "unparsed": 0.05}}}))
    frame = collect(write_job.folder)
    row = frame[frame["selection"] == TRAINING].iloc[0]
    assert (row["step"], row["accuracy"], row["last_step"]) == (10, 0.7, 20)
    assert (row["sarr1_accepted"], row["sarr2_accepted"]) == (0.9, 0.8)
    assert (row["label_accuracy"], row["chain_accuracy"], row["unparsed"]) == (0.45, 0.35, 0.05)
    assert (row["train_seconds"], row["memory_gib"]) == (10.5, 3.0)
    (table,) = [table for table in [rounds_table(frame)] if table]
    assert table.rows == (("RDMLDG", "ShapesReasoning", "sketch", "90.0", "80.0"),)


def test_json_has_cells_trials_and_problems(write_job, verb, tmp_path):
    for trial, acc in enumerate((0.4, 0.6)):
        write_job(f"trial{trial}", trial=trial, accs=(0.0, acc))
    write_job("died", "CORAL", done=False)
    code, out, err = verb("collect", write_job.folder, "--json")
    assert code == 0 and err == "" and out.count("\n") == 1
    found = json.loads(out)
    cell = found["cells"][0]
    assert (cell["algorithm"], cell["trials"], cell["domain"]) == ("ERM", 2, found["domains"]["Debug28"][0])
    assert cell["accuracy"] == pytest.approx(0.5) and cell["label_accuracy"] is None
    assert sorted(trial["accuracy"] for trial in found["trials"] if trial["selection"] == cell["selection"]) == [
        0.4,
        0.6,
    ]
    assert [problem["job"] for problem in found["problems"]] and found["single_source"] == []
    assert verb("collect", write_job.folder, "--format", "json", "--output", tmp_path / "a.json")[0] == 0
    assert json.loads((tmp_path / "a.json").read_text()) == found


def test_base_to_new_jobs_have_a_table_with_their_harmonic_mean(write_job, capsys):
    """Base .8 and .6, new .4 and .4 in two trials: means .7 and .4, H 2 · .7 · .4 / 1.1 = .509."""
    for trial, base in enumerate((0.8, 0.6)):
        job = write_job(f"j{trial}", "RDMLDG", "PACSBaseToNew", target=1, trial=trial, accs=(0.4,))
        (record,) = read_lines(job / "results.jsonl")
        write_lines(job / "results.jsonl", [record | {"env0_out_acc": base}])
        answers = {"label": 0.5, "chain": 0.25, "chain_or_label": 0.4, "unparsed": 0.1, "well_formed": 1.0, "n": 10}
        (job / "answers.json").write_text(json.dumps({"env0": {"out": answers}, "env1": {"in": answers}}))
    write_job("erm", "ERM", "PACSBaseToNew", target=1, accs=(0.0,))
    write_job("reverse", "ERM", "PACSBaseToNew", target=0, accs=(0.5,))
    (table,) = base_to_new_tables(collect(write_job.folder))
    assert table.rows == (
        ("ERM", "0.0", "0.0", "0.0", *["–"] * 6),
        ("RDMLDG", "70.0 ± 7.1", "40.0 ± 0.0", "50.9", *["50.0 ± 0.0"] * 2, "50.0", *["25.0 ± 0.0"] * 2, "25.0"),
    )
    assert "H 19.01 → 34.63 and new classes 15.44 → 24.33" in table.note
    assert cli.main(["collect", str(write_job.folder)]) == 0
    assert "PACSBaseToNew: trained on base classes, tested on new ones" in capsys.readouterr().out
    assert cli.main(["collect", str(write_job.folder), "--format", "json"]) == 0
    jobs = json.loads(capsys.readouterr().out)["base_to_new"]
    (erm,) = [job for job in jobs if job["algorithm"] == "ERM"]
    assert len(jobs) == 3 and (erm["base"], erm["new"], erm["label_base"]) == (0.0, 0.0, None)
    assert "## Base to new classes" in render_markdown(read_report(write_job.folder))
