"""`make demo`'s summary after the tables, on handwritten records."""

import json
import subprocess

import pytest

from domainbed_reasoning.sweeps import demo

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
    runs = demo.finished_runs(sweep.folder)
    assert [(run.algorithm, run.target) for run in runs] == [("ERM", 0), ("ERM", 2), ("RDMLDG", 1)]


def test_answers_are_weighted_by_the_images_of_each_target(sweep, capsys):
    """10 images at .9 and 30 at .5 make .6; a label-only model has no chain answer."""
    sweep("MTCT", 0, answers={"n": 10, "label": 0.9, "chain": 0.4, "unparsed": 0.1})
    sweep("MTCT", 1, answers={"n": 30, "label": 0.5, "chain": 0.4, "unparsed": 0.1})
    sweep("LabelSFT", 0, answers={"n": 10, "label": 0.7, "chain": None, "unparsed": None})
    demo.print_answers(list(demo.finished_runs(sweep.folder)))
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert lines == {"MTCT": ["60%", "40%", "10%"], "LabelSFT": ["70%", "-", "-"]}


def test_share_kept_by_every_round_is_printed(sweep, capsys):
    sweep("RDMLDG", 2, sarr1_accepted=0.605, sarr2_accepted=0.852, loss=1.0)
    demo.print_accepted(list(demo.finished_runs(sweep.folder)), DOMAINS)
    assert "RDMLDG, target sketch" in (printed := capsys.readouterr().out)
    assert "round 1 60%, round 2 85%" in printed


def test_the_chain_shown_is_a_right_one_of_the_target_domain(sweep, capsys):
    lines = [
        prediction(0, "dax"),
        prediction(2, "fep"),
        prediction(2, "dax", image="sketch/7"),
        prediction(2, None, parsed=False),
    ]
    sweep("RDMLDG", 2, predictions=lines)
    demo.print_chain(list(demo.finished_runs(sweep.folder)), DOMAINS)
    printed = capsys.readouterr().out
    assert "chain for sketch/7, in the target domain sketch" in printed
    assert "  <CONCLUSION>dax</CONCLUSION>" in printed
    assert "1 of 2 chains in this domain are correct" in printed


def test_without_correct_chains_a_wrong_one_is_shown_as_wrong(sweep, capsys):
    sweep("RDMLDG", 2, predictions=[prediction(2, "fep")])
    demo.print_chain(list(demo.finished_runs(sweep.folder)), DOMAINS)
    assert "true class: dax; 0 of 1 chains" in capsys.readouterr().out


def test_every_row_is_explained_even_before_anything_has_run(capsys):
    demo.print_summary([], DOMAINS)
    printed = capsys.readouterr().out
    assert [name for name in demo.ROWS if f"  {name} " not in printed] == []


def test_real_images_need_their_folder(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--dataset", "PACSReasoning"])
    assert "PACSReasoning requires --data" in capsys.readouterr().err


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
