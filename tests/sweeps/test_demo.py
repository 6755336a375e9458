"""`make demo`'s summary after the tables, on handwritten records."""

import functools
import json
import re
import subprocess
from types import SimpleNamespace

import pytest

from builders.processes import environment, run_python
from domainbed_reasoning.sweeps import demo
from domainbed_reasoning.sweeps import demo_summary as summary
from domainbed_reasoning.sweeps.miniature import regimes

DOMAINS = ("photo", "cartoon", "sketch", "negative")


@pytest.fixture
def sweep(tmp_path):
    """``sweep(algorithm, target, …)`` writes the folder of a job as the stock train script and our records do."""

    def write(algorithm, target, done=True, answers=None, predictions=(), **values):
        folder = tmp_path / f"{algorithm}{target}"
        folder.mkdir()
        args = {"algorithm": algorithm, "test_envs": [target]}
        records = [{"step": 0, "args": args}, {"step": 9, "args": args, **values}]
        (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if answers:
            (folder / "answers.json").write_text(json.dumps({f"env{target}": {"in": answers, "out": answers}}))
        if predictions:
            (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in predictions))
        if done:
            (folder / "done").touch()
        return folder

    write.folder = tmp_path
    return write


def prediction(env, answer, label="dax", parsed=True, image="sketch/1"):
    chain = f"<CAPTION>round</CAPTION>\n<CONCLUSION>{answer}</CONCLUSION>"
    return {"env": env, "image": image, "label": label, "chain_answer": answer, "chain": chain, "parsed": parsed}


def test_incomplete_jobs_are_excluded_and_the_rest_is_in_table_order(sweep):
    sweep("RDMLDG", 1)
    sweep("ERM", 2)
    sweep("ERM", 0)
    sweep("MTCT", 0, done=False)
    runs = summary.finished_runs(sweep.folder)
    assert [(run.row, run.target) for run in runs] == [("ERM", 0), ("ERM", 2), ("RDMLDG", 1)]


def test_answers_are_weighted_by_the_images_of_each_target(sweep, capsys):
    """10 images at .9 and 30 at .5 make .6; a label-only model has no chain answer."""
    sweep("MTCT", 0, answers={"n": 10, "label": 0.9, "chain": 0.4, "unparsed": 0.1})
    sweep("MTCT", 1, answers={"n": 30, "label": 0.5, "chain": 0.4, "unparsed": 0.1})
    sweep("RDMLDG", 1, answers={"n": 10, "label": 0.5, "chain": 0.4, "unparsed": 0.0, "well_formed": 0.3})
    sweep("LabelSFT", 0, answers={"n": 10, "label": 0.7, "chain": None, "unparsed": None})
    summary.print_answers(list(summary.finished_runs(sweep.folder)))
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert lines == {
        "MTCT": ["60%", "40%", "10%", "-"],
        "LabelSFT": ["70%", "-", "-", "-"],
        "RDMLDG": ["50%", "40%", "0%", "30%"],
    }


def test_share_kept_by_every_round_is_printed_and_how_much_of_it_is_well_formed(sweep, capsys):
    """A round that keeps nothing has no such share; below 90% the other filter is named."""
    whole = {"sarr1_accepted": 0.0, "sarr2_accepted": 0.852, "sarr2_well_formed": 1.0}
    sweep("RDMLDG", 2, **whole, loss=1.0)
    summary.print_accepted(list(summary.finished_runs(sweep.folder)), DOMAINS)
    assert re.search(r"^  RDMLDG +sketch +0% +85% \(100%\)$", printed := capsys.readouterr().out, re.MULTILINE)
    assert "sarr_filter" not in printed
    sweep("RDMLDG", 1, sarr1_accepted=0.605, sarr1_well_formed=0.01)
    summary.print_accepted(list(summary.finished_runs(sweep.folder)), DOMAINS)
    assert re.search(r"^  RDMLDG +cartoon +60% \(1%\)$", printed := capsys.readouterr().out, re.MULTILINE)
    assert "sarr_filter 'well_formed'" in printed


def test_the_chain_shown_is_a_right_one_of_the_target_domain(sweep, capsys):
    lines = [
        prediction(0, "dax"),
        prediction(2, "fep"),
        prediction(2, "dax", image="sketch/7"),
        prediction(2, None, parsed=False),
    ]
    sweep("RDMLDG", 2, predictions=lines)
    summary.print_chain(list(summary.finished_runs(sweep.folder)), DOMAINS)
    printed = capsys.readouterr().out
    assert "chain for sketch/7, in the target domain sketch" in printed
    assert "  <CONCLUSION>dax</CONCLUSION>" in printed
    assert "1 of 2 chains in this domain are correct" in printed


def test_without_correct_chains_a_wrong_one_is_shown_as_wrong(sweep, capsys):
    sweep("RDMLDG", 2, predictions=[prediction(2, "fep")])
    summary.print_chain(list(summary.finished_runs(sweep.folder)), DOMAINS)
    assert "true class: dax; 0 of 1 chains" in capsys.readouterr().out


def test_every_row_is_explained_even_before_anything_has_run(capsys):
    summary.print_summary([], DOMAINS, list(summary.ROWS))
    printed = capsys.readouterr().out
    assert [name for name in summary.ROWS if f"  {name} " not in printed] == []


def test_claims_are_printed_with_intervals_whatever_they_show(sweep, capsys):
    """Differences -10, -10, -10, -10 and 0, 10, 0, -10: below, and nothing shown; OfficeHome: 88.76 - 89.39."""
    for target, mtct in enumerate((0.8, 0.9, 0.8, 0.7)):
        sweep("LabelSFT", target, answers={"n": 10, "label": 0.9, "chain": None, "unparsed": None})
        sweep("ReasoningSFT", target, answers={"n": 10, "label": None, "chain": 0.8, "unparsed": 0.0})
        sweep("MTCT", target, answers={"n": 10, "label": 0.9, "chain": mtct, "unparsed": 0.0})
    summary.print_claims(list(summary.finished_runs(sweep.folder)), "OfficeHome")
    printed = capsys.readouterr().out
    assert re.search(r"reasoning only against label only +-10\.0 ±  0\.0  below +paper -0\.6", printed)
    assert re.search(
        r"MTCT's chain against reasoning only +[+-]0\.0 ± 13\.0  no difference shown +paper \+1\.8", printed
    )
    assert "RD-MLDG" not in printed


def test_one_target_domain_has_no_interval(sweep, capsys):
    sweep("RDMLDG", 2, answers={"n": 10, "label": 0.9, "chain": 0.8, "unparsed": 0.0})
    sweep("MTCT", 2, answers={"n": 10, "label": 0.9, "chain": 0.7, "unparsed": 0.0})
    summary.print_claims(list(summary.finished_runs(sweep.folder)), "OfficeHome")
    assert re.search(r"RD-MLDG's chain against MTCT's +\+10\.0 ± +\?  one domain: no interval", capsys.readouterr().out)


def test_rows_of_the_regimes_have_the_studys_settings_and_rates(tmp_path, monkeypatch):
    """The learning rates are those that the study selected; before that, the middle of its grid."""
    monkeypatch.setattr(regimes, "PUBLISHED_RATES", tmp_path / regimes.RATES_FILE)
    jobs = demo.regime_jobs("ClearCreaturesReasoning", tmp_path, [0, 2], None)
    assert list(jobs) == list(summary.ROWS) and {len(own) for own in jobs.values()} == {2}
    hparams = {name: json.loads(own[0].arguments["hparams"]) for name, own in jobs.items()}
    assert {its["lr"] for name, its in hparams.items() if name != "MLLMZeroShot"} == {regimes.COMMON_RATE}
    assert "none selected yet" in demo.describe_rates("clear")
    balanced = hparams[summary.BALANCED]
    assert balanced.pop("gradient_balance") == "norm" and balanced == hparams["RDMLDG"]
    assert jobs["RDMLDG"][0].sweep != jobs[summary.BALANCED][0].sweep  # one table cannot distinguish them

    (tmp_path / regimes.RATES_FILE).write_text('{"clear": {"MTCT": 6e-3}}')
    jobs = demo.regime_jobs("ClearCreaturesReasoning", tmp_path, [0], 5)
    of_mtct = jobs["MTCT"][0].arguments
    assert json.loads(of_mtct["hparams"])["lr"] == 6e-3 and of_mtct["steps"] == of_mtct["checkpoint_freq"] == 5
    assert "MTCT 0.006" in demo.describe_rates("clear")


def test_jobs_of_other_settings_are_not_mixed_in_one_table(tmp_path, domainbed_root, monkeypatch):
    """Stock selection would take the better of both in each cell."""
    monkeypatch.setattr(demo.study, "run", lambda jobs, output, launcher: [])
    monkeypatch.setattr(demo, "run_stock", lambda *_, **__: None)
    monkeypatch.setattr(demo, "print_summary", lambda *_: None)
    monkeypatch.setattr(demo, "print_claims", lambda *_: None)
    run = functools.partial(demo.run_regime, "ClearCreaturesReasoning", tmp_path / "regime", domainbed=domainbed_root)
    for targets in ("2", ""):
        run(targets=targets, steps=3)
    with pytest.raises(ValueError, match=r"different settings \(steps: 3 -> not set\)"):
        run(targets="", steps=None)
    settings = {"dataset": "ShapesReasoning", "targets": "", "data_dir": "", "chains": "", "steps": 3}
    for model in ("", "tiny"):
        args = SimpleNamespace(**settings, model=model)
        if not model:
            demo.run_sweep(args, tmp_path / "sweep", domainbed_root)
            continue
        with pytest.raises(ValueError, match=r"different settings \(hparams: not set -> {\"model\": \"tiny\"}\)"):
            demo.run_sweep(args, tmp_path / "sweep", domainbed_root)


def test_the_folders_of_running_jobs_are_kept(tmp_path, domainbed_root, monkeypatch):
    """A demo whose terminal was lost still runs, and is run again."""
    monkeypatch.setattr(demo, "run_stock", lambda *_, **__: pytest.fail("delete_incomplete removes their folders"))
    args = SimpleNamespace(dataset="ShapesReasoning", targets="", data_dir="", chains="", steps=3, model="")
    with demo.sole_launch(tmp_path), pytest.raises(ValueError, match="is being launched by"):
        demo.run_sweep(args, tmp_path, domainbed_root)


def test_target_domains_are_checked():
    assert demo.target_domains("") == [0, 1, 2, 3] and demo.target_domains("2, 0") == [2, 0]
    with pytest.raises(ValueError, match=r"no target domain '4'; available: 0 \(photo\)"):
        demo.target_domains("4")


@pytest.mark.slow
def test_demo_of_a_regime_runs_resumes_and_prints_tables(tmp_path, domainbed_root):
    """Three updates of every row, one target; the second run has nothing to train."""
    if "standin" not in str(domainbed_root):
        pytest.skip("once is enough: the jobs are those of the study")
    arguments = ("-m", "domainbed_reasoning.sweeps.demo", "--targets", "2", "--steps", "3", "--output_dir", tmp_path)
    variables = {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):
        done = run_python(*map(str, arguments), cwd=tmp_path, env=environment(domainbed_root, **variables))
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(f"  {name} " in done.stdout for name in summary.ROWS)
        assert "What these numbers say" in done.stdout and "What they do not say" in done.stdout
        assert done.stdout.count("\nRDMLDG  ") >= 2  # in the tables of both folders
    assert len(list(tmp_path.rglob("done"))) == len(summary.ROWS)
    (command,) = re.findall(r"^  \S+ -m (domainbed_reasoning collect \S+)$", done.stdout, re.MULTILINE)
    tables = run_python("-m", *command.split(), cwd=tmp_path, env=environment(domainbed_root, **variables))
    assert tables.returncode == 0 and "RDMLDG (RDMLDG" in tables.stdout, tables.stdout + tables.stderr


def test_real_images_need_their_folder(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--dataset", "PACSReasoning"])
    assert "PACSReasoning requires --data" in capsys.readouterr().err


def test_chains_of_a_rendered_dataset_are_its_own(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--dataset", "ShapesReasoning", "--chains", "chains.jsonl"])
    assert "ShapesReasoning renders its chains with its images: omit --chains" in capsys.readouterr().err


def test_a_stock_command_that_fails_ends_the_demo(tmp_path, domainbed_root):
    with pytest.raises(SystemExit, match="exit code"):
        demo.run_stock("sweep", "no-such-command", cwd=domainbed_root, environment={})


def test_the_command_printed_is_the_command_run(tmp_path, domainbed_root, capfd):
    """Quoted for a shell, so that it can be typed again."""
    arguments = [
        "launch",
        "--algorithms",
        "ERM",
        "--datasets",
        "PACS",
        "--command_launcher",
        "dummy",
        "--n_hparams",
        "1",
    ]
    arguments += ["--n_trials", "1", "--single_test_envs", "--skip_confirmation", "--data_dir", str(tmp_path)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--hparams", '{"model": "tiny"}']
    demo.run_stock("sweep", *arguments, cwd=domainbed_root, environment={"PATH": "/usr/bin:/bin"})
    printed = capfd.readouterr().out
    typed = next(line for line in printed.splitlines() if line.startswith("$ "))
    assert printed.count("Dummy launcher: ") == 4
    again = subprocess.run(["sh", "-c", f"printf '%s\n' {typed[2:]}"], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-1] == '{"model": "tiny"}'
