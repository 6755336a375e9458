"""A job with an invalid value never ends `collect` or `report`: it is excluded and reported."""

import gc
import json
import shutil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builders.files import link_to, make_folder, make_pipe, make_terabyte, read_lines, write
from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.results import collect
from domainbed_reasoning.results.all_tables import all_tables
from domainbed_reasoning.results.frame import is_of_round
from domainbed_reasoning.results.job_folders import read_job
from domainbed_reasoning.results.render import markdown
from domainbed_reasoning.results.report import content, read_report
from domainbed_reasoning.results.report.page import render_page

LONG = "9" * 200_000
# As they stand in a file of JSON.
BAD = {
    "null": "null", "true": "true", "text": '"x"', "empty": '""', "huge": '"1e999"', "list": "[]", "listed": "[0.5]",
    "object": "{}", "nested": '{"a": {"b": [1]}}', "NaN": "NaN", "inf": "Infinity", "-inf": "-Infinity",
    "400 digits": "1" * 400, "5000 digits": "1" * 5000, "negative": "-1", "fraction": "1.5", "billion": "1000000000",
    "long": f'"{LONG}"', "deep": "[" * 3000 + "]" * 3000, "escape": r'"\u001b[31m\u202e\ud800\u0000"', "1e308": "1e308",
}  # fmt: skip
RECORD = ("step", "step_time", "mem_gb", "epoch", "loss", "stage", "args", "hparams", "sarr1_accepted", "env7_in_acc")
RECORD += (
    "env0_in_acc",
    "env0_out_acc",
    "env1_in_acc",
    "env1_out_acc",
    "env999999999_in_acc",
    "sarr999999999_accepted",
    "well_formed",
    "sarr1_well_formed",
)
ARGS = (
    "algorithm",
    "dataset",
    "test_envs",
    "trial_seed",
    "hparams_seed",
    "steps",
    "seed",
    "task",
    "hparams",
    "data_dir",
)
HPARAMS = ("lr", "batch_size", "model", "sarr_rounds", "mtct_epochs", "rho", "target_per_class", "resnet18", "\x1b[31m")
PLACES = [("record", name) for name in RECORD]
PLACES += [("args", name) for name in ARGS] + [("hparams", name) for name in HPARAMS]
BESIDE = {
    "task.json": ("environments", "version", "class_names"),
    "answers.json": ("env0", "env0.in", "env0.in.label", "env0.in.chain", "env0.in.unparsed", "env7"),
    "versions.json": (
        "domainbed-reasoning",
        "domainbed-reasoning.version",
        "DomainBed",
        "libraries",
        "libraries.torch",
    ),
}


@pytest.fixture
def sweep(write_job, monkeypatch):
    """Three good jobs, their rows, and ``bad(name)``, which writes a job for a test to damage."""
    monkeypatch.setattr(content.plot_styles, "has_matplotlib", lambda: False)
    for target in range(3):
        write_job(str(target), target=target, accs=(0.1, 0.2 + target / 10))

    def bad(name="bad"):
        return write_job(name, "RDMLDG", accs=(0.1, 0.2), sarr1_accepted=0.5, epoch=1.0, loss=0.3)

    bad.before = good_rows(collect(write_job.folder))
    return bad


def good_rows(frame):
    good = frame[frame["algorithm"] == "ERM"]
    of_others = [name for name in good if is_of_round(name)]  # a column is there if any job has it
    return repr(good.drop(columns=[*of_others, "version"], errors="ignore").to_dict("records"))


def write_value(job, place, name, text, number=1):
    """Put a value, as it stands in JSON, into a line of the job's records."""
    records = read_lines(job / "results.jsonl")
    where = records[number] if place == "record" else records[number][place]
    where[name] = "@@"
    lines = [json.dumps(record).replace('"@@"', text) for record in records]
    (job / "results.jsonl").write_text("\n".join(lines) + "\n")


def check(bad, jobs):
    """The good rows are as they were, each bad job counts or is named; return the problems that name one."""
    folder = jobs[0].parent
    frame = collect(folder)
    assert good_rows(frame) == good_rows(collect(folder, as_stock=True)) == bad.before
    problems = frame.attrs["problems"]
    named = {path for problem in problems for path in problem["folders"]} | set(frame["folder"])
    assert {job.name for job in jobs} <= named
    assert all(len(markdown(table)) < 60_000 and "\x1b" not in markdown(table) for table in all_tables(frame))
    page = render_page(read_report(folder, examples=1))
    assert "root:" not in page and len(page) < 500_000
    return [problem for problem in problems if {job.name for job in jobs} & set(problem["folders"])]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]} {place[1]}")
def test_invalid_record_values_do_not_affect_other_jobs(sweep, place):
    jobs = []
    for number, text in enumerate(BAD.values()):
        jobs.append(sweep(f"bad{number}"))
        write_value(jobs[-1], *place, text, number % 2)
    check(sweep, jobs)


@pytest.mark.parametrize(("file", "name"), [(file, name) for file in BESIDE for name in ("", *BESIDE[file])])
def test_invalid_values_in_other_files_do_not_affect_other_jobs(sweep, file, name):
    jobs = []
    for number, text in enumerate((*BAD.values(), "", "{", "\0" * 100)):
        jobs.append(sweep(f"bad{number}"))
        for part in reversed(name.split(".") if name else []):
            text = json.dumps({part: "@@"}).replace('"@@"', text)
        (jobs[-1] / file).write_text(text)
    check(sweep, jobs)


@pytest.mark.parametrize(
    ("place", "text", "failure"),
    [
        (
            ("record", "step_time"),
            "null",
            "results.jsonl, line 2: step_time must be a number >= 0, got None",
        ),
        (
            ("record", "env0_in_acc"),
            "NaN",
            "results.jsonl, line 2: env0_in_acc must be a number in [0, 1], got nan",
        ),
        (("record", "step"), "1" * 400, "results.jsonl, line 2: step must be an integer >= 0, got 1111111111"),
        (("hparams", "lr"), "[[1]]", "results.jsonl, line 2: hparam lr must be a finite number, string"),
        (("hparams", "lr"), "1" * 5000, "results.jsonl, line 2: Exceeds the limit"),
        (
            ("args", "test_envs"),
            "[true]",
            "results.jsonl, line 2: --test_envs must be a list of domain indices",
        ),
    ],
)
def test_problems_give_file_and_line(sweep, capsys, place, text, failure):
    bad = sweep()
    write_value(bad, *place, text)
    (problem,) = check(sweep, [bad])
    assert failure in problem["detail"] and problem["kind"] == "damaged" and problem["effect"] == "Left out"
    assert problem["job"] == "RDMLDG on Debug28, target 0, trial 0, hparams seed 0"
    assert cli.main(["collect", str(bad.parent), "--format", "csv"]) == 0
    printed = capsys.readouterr()
    assert failure in printed.err and "RDMLDG" not in printed.out


def test_non_finite_loss_is_a_valid_result(sweep):
    """A run that diverges writes NaN; DomainBed's tables count its accuracies."""
    bad = sweep()
    write_value(bad, "record", "loss", "NaN")
    check(sweep, [bad])
    assert "bad" in set(collect(bad.parent)["folder"])


ODD = {
    "folder": make_folder, "pipe": make_pipe, "empty": write(b""), "NULs": write(b"\0" * 9),
    "no UTF-8": write(b"\xff{}\n"),
    "link out": link_to("/etc/passwd"), "endless": link_to("/dev/zero"), "dangling": link_to("nowhere"),
    "circle": link_to("results.jsonl"), "sparse": make_terabyte, "gone": lambda path: path.unlink(missing_ok=True),
    "one long line": write(b"{" * (3 << 20)), "text": write(b"no JSON\n"), "nested": write(b"[" * 100_000),
}  # fmt: skip
FILES = ("results.jsonl", "done", "out.txt", "err.txt", "launcher.log", "predictions.jsonl", *BESIDE)


@pytest.mark.parametrize("file", FILES)
def test_invalid_files_of_a_job_do_not_affect_other_jobs(sweep, file):
    jobs = []
    for number, make in enumerate(ODD.values()):
        jobs.append(sweep(f"{number:032x}"))
        make(jobs[-1] / file)
    check(sweep, jobs)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=15)
@example(values=[(("record", "sarr1_well_formed"), 0)])
@given(values=st.lists(st.tuples(st.sampled_from(PLACES), anything), min_size=1, max_size=12))
def test_arbitrary_values_do_not_affect_other_jobs(sweep, values):
    jobs = []
    try:
        for number, (place, value) in enumerate(values):
            jobs.append(sweep(f"bad{number}"))
            write_value(jobs[-1], *place, json.dumps(value))
        check(sweep, jobs)
    finally:
        for job in jobs:
            shutil.rmtree(job)


CHAIN = "".join(f"<{s}>dax</{s}>\n" for s in ("SUMMARY", "CAPTION", "REASONING", "REFLECTION", "CONCLUSION"))


@pytest.mark.parametrize("name", ["env", "index", "image", "label", "label_answer", "chain_answer", "chain"])
def test_invalid_predictions_are_excluded_from_examples_and_reported(write_job, name, monkeypatch):
    monkeypatch.setattr(content.plot_styles, "has_matplotlib", lambda: False)
    job = write_job("one", "RDMLDG", "ShapesReasoning", target=2, hparams={"target_per_class": 10**9, "model": "a/b"})
    row = {"env": 2, "index": 0, "image": "sketch/0", "label": "dax", "label_answer": "fep", "chain_answer": "dax"}
    row["chain"] = CHAIN
    lines = [json.dumps({**row, name: "@@"}).replace('"@@"', BAD[what]) for what in ("list", *BAD)]
    (job / "predictions.jsonl").write_text("\n".join([json.dumps(row), *lines]) + "\n")
    page = render_page(read_report(write_job.folder, examples=30))
    assert "sketch/0" in page and "data:image/webp" in page
    assert "Invalid lines of predictions, left out" in page and "one: predictions.jsonl, line 2: " in page


def test_job_values_never_build_datasets_or_request_models(write_job, monkeypatch):
    """A page shows pictures of a job with a billion images and a model that is nowhere."""
    monkeypatch.setattr("domainbed_reasoning.registry.load", lambda name: pytest.fail(f"{name} is loaded"))
    job = write_job("one", "RDMLDG", "ShapesReasoning", target=2, hparams={"target_per_class": 10**9, "model": "a/b"})
    row = {"env": 2, "index": 3, "image": "sketch/3", "label": "dax", "label_answer": None, "chain_answer": "dax"}
    (job / "predictions.jsonl").write_text(json.dumps({**row, "chain": CHAIN}))
    assert "data:image/webp" in render_page(read_report(write_job.folder))


def test_a_folder_that_cannot_be_listed_to_its_end_is_closed(write_job, recwarn):
    """A link to itself can be neither followed nor called missing."""
    job = write_job("one")
    link_to("itself")(job / "itself")
    assert "itself" in "".join(read_job(job).damage)
    gc.collect()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]
