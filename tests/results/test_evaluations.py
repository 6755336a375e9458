"""Which evaluations tables and reports compare: common steps, measured accuracies, folders of jobs."""

import json

import pytest

from domainbed_reasoning.method.schedule import Epoch, plan_stages
from domainbed_reasoning.results import collect
from domainbed_reasoning.results.job_folders import read_jobs
from domainbed_reasoning.results.report import plots
from domainbed_reasoning.results.report.content import read_report
from domainbed_reasoning.sweeps.studies.random_search import STUDY
from domainbed_reasoning.sweeps.studies.study import Settings, sweep_command

PACS = (2048, 2344, 1670, 3929)  # images by domain
NAME = "{:032x}".format


@pytest.fixture
def pacs_job(write_job):
    """``pacs_job(number, targets, n_steps)``: RDMLDG with the paper's epochs, 10% at step 0 and 90% afterwards."""

    def write(number, targets, n_steps=None, **more):
        sources = {str(env): size - int(size * 0.2) for env, size in enumerate(PACS) if env not in targets}
        plan = plan_stages([3, 3, 3, 3], Epoch(sources, 43).steps, n_steps)
        folder = write_job(
            NAME(number), "RDMLDG", "PACSReasoning", args={"test_envs": list(targets), "steps": n_steps}, **more
        )
        (record, *_) = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
        lines = []
        for step in sorted({*range(0, plan.n_steps, plan.checkpoint_freq), plan.n_steps - 1}):
            accuracies = {name: 0.9 if step else 0.1 for name in record if name.endswith("_acc")}
            lines.append(json.dumps(record | accuracies | {"step": step}) + "\n")
        (folder / "results.jsonl").write_text("".join(lines))

    return write


def problems_of(frame, kind):
    return [problem for problem in frame.attrs["problems"] if problem["kind"] == kind]


@pytest.mark.parametrize("n_steps", [None, 565])
def test_selection_on_a_left_out_source_compares_more_than_the_first_update(pacs_job, write_job, n_steps):
    """By epochs every target has steps of its own, so that stock's selection has step 0 alone: it is reported."""
    targets = [(a,) for a in range(4)] + [(a, b) for a in range(4) for b in range(a + 1, 4)]
    for number, own in enumerate(targets):
        pacs_job(number, own, n_steps)
    frame = collect(write_job.folder)
    left_out = frame[frame["selection"].str.startswith("leave-one")]
    assert len(left_out) == 4 and set(left_out["accuracy"]) == ({0.1} if n_steps is None else {0.9})
    found = problems_of(frame, "no common steps")
    assert len(found) == (n_steps is None)
    if found:
        assert "than those with target 0, 1, 2, 3" in found[0]["detail"] and "Pass --steps" in found[0]["fix"]


def test_the_study_of_selection_methods_gives_every_target_the_same_steps():
    """Of PACS's epochs, 50, 48, 52 and 38 steps by target, the mean."""
    epochs = [
        Epoch({str(env): size - int(size * 0.2) for env, size in enumerate(PACS) if env != target}, 43).steps
        for target in range(4)
    ]
    of_grids = {grid.algorithms: grid.steps for grid in STUDY.grids if grid.mllm}
    mean = sum(epochs) / 4
    assert of_grids == {("LabelSFT",): 3 * mean + 1, ("RDMLDG",): 12 * mean + 1}
    for steps, expected in ((None, "565"), (7, "7")):
        command = sweep_command(STUDY.grids[-1], ["PACSReasoning"], Settings("/data", "/out", steps=steps))
        assert command[command.index("--steps") + 1] == expected


def test_a_row_without_pairs_of_targets_lacks_none(write_job):
    """ERM with pairs for leave-one-domain-out selection beside a method with single targets."""
    for target in range(3):
        write_job(f"ours{target}", "RDMLDG", target=target)
        write_job(f"erm{target}", "ERM", target=target)
        write_job(f"pair{target}", "ERM", args={"test_envs": [target, (target + 1) % 3]})
    assert not problems_of(collect(write_job.folder), "missing trials")
    for line in (write_job.folder / "ours2").iterdir():
        line.unlink()
    (write_job.folder / "ours2").rmdir()
    assert [problem["job"] for problem in problems_of(collect(write_job.folder), "missing trials")] == [
        "RDMLDG on Debug28"
    ]


def test_training_is_plotted_by_evaluation_where_targets_have_steps_of_their_own(pacs_job, write_job, monkeypatch):
    for target in range(4):
        pacs_job(target, (target,))
    drawn = []
    canvas = plots._canvas

    def watched(*arguments):
        figure, axes = canvas(*arguments)
        monkeypatch.setattr(axes, "plot", lambda steps, means, *_, **__: drawn.append((list(steps), list(means))))
        monkeypatch.setattr(plots, "_legend", lambda axes: None)
        return figure, axes

    monkeypatch.setattr(plots, "_canvas", watched)
    assert plots.training(read_jobs(write_job.folder), "PACSReasoning") is not None
    # 3 epochs of 50, 48, 52 and 38 steps: 141 on average
    assert drawn == [([0, 141, 282, 423, 564], [pytest.approx(10)] + [pytest.approx(90)] * 4)]


def test_accuracies_before_the_first_evaluation_are_not_shown(write_job):
    """Such answers are all class 0; the last evaluation is measured even if it comes earlier."""
    for number, (first, done) in enumerate([(0, True), (2, True), (99, True), (99, False)]):
        write_job(str(number), accs=(0.1, 0.2, 0.3), hparams={"first_evaluation": first}, done=done)
    steps = {job.folder.name: [record["step"] for record in job.evaluations] for job in read_jobs(write_job.folder)}
    assert steps == {"0": [0, 10, 20], "1": [10, 20], "2": [20], "3": []}


def test_a_log_beside_a_sweeps_jobs_does_not_make_it_a_job(write_job, tmp_path):
    for sweep in "ab":
        for target in range(3):
            write_job(NAME(target), target=target, sweep=f"sweep/{sweep}")
    (write_job.folder / "a" / "out.txt").write_text("from nohup")
    jobs = read_jobs(write_job.folder)
    assert len(jobs) == 6 and {job.sweep for job in jobs} == {"a", "b"}
    (tmp_path / "own" / "my job").mkdir(parents=True)
    (tmp_path / "own" / "my job" / "err.txt").write_text("OutOfMemoryError")
    assert [job.path for job in read_jobs(tmp_path / "own")] == ["my job"]


def test_a_report_of_several_sweeps_has_the_analyses_of_each(write_job):
    for sweep in "ab":
        write_job(NAME(0), sweep=f"sweep/{sweep}")
    for folder, text in ((write_job.folder, "of all"), (write_job.folder / "b", "of b")):
        (folder / "analysis").mkdir()
        (folder / "analysis" / "cues.txt").write_text(text)
    sections = {section.anchor: section.blocks for section in read_report(write_job.folder).sections}
    own, of_b = sections["analyses"]
    assert own.text == "of all" and of_b.title == "Analyses of b" and [block.text for block in of_b.blocks] == ["of b"]
