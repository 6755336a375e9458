"""Steps, rounds and stages without training samples are reported in the log."""

from dataclasses import replace

import torch
from domainbed import algorithms, datasets, hparams_registry

from domainbed_reasoning.bridge.samples import attach_task
from domainbed_reasoning.method.schedule import Schedule, Stage, plan_stages
from domainbed_reasoning.results import collect


def build(name, **changes):
    """Build dataset and algorithm as the train script does, the last domain the target; and a batch of six images."""
    hparams = hparams_registry.default_hparams(name, "ShapesReasoning") | changes
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    algorithm = algorithms.get_algorithm_class(name)(dataset.input_shape, dataset.num_classes, 3, hparams)
    batch = [tuple(torch.utils.data.default_collate([dataset[env][i] for i in range(2)])) for env in range(3)]
    return dataset, algorithm, batch


def test_round_without_kept_chains_is_reported_at_its_first_step_and_end(capsys):
    """Chains of two tokens conclude nothing, so both rounds of two steps keep none."""
    _, algorithm, batch = build("RDMLDG", max_new_tokens=2, mtct_epochs=0)
    algorithm.schedule = Schedule((Stage(1, 0, 1), Stage(2, 2, 3)), 4, 2)
    capsys.readouterr()
    values = [algorithm.update(batch) for _ in range(4)]
    assert [value["loss"] for value in values] == [0.0] * 4 and values[-1]["sarr2_accepted"] == 0.0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert [line.split("labeled chains")[0] for line in printed] == [
        "WARNING: SARR round 1 (steps 0-1), step 0: none of 6 self-",
        "WARNING: SARR round 1 (steps 0-1): kept 0.0% of 6 self-",
        "WARNING: SARR round 2 (steps 2-3), step 2: none of 6 self-",
        "WARNING: SARR round 2 (steps 2-3): kept 0.0% of 6 self-",
    ]


def test_supervised_step_without_chains_is_reported_once(capsys):
    _, algorithm, batch = build("ReasoningSFT")
    algorithm.task.chains.clear()
    capsys.readouterr()
    assert [algorithm.update(batch)["loss"] for _ in range(3)] == [0.0] * 3
    printed = capsys.readouterr().out
    assert printed.count("WARNING") == 1 and "step 0: no image in the batch has a chain" in printed


def test_stages_that_steps_leave_out_are_named_before_training(capsys):
    dataset, algorithm, _ = build("MTCT")
    schedule = plan_stages([6, 2, 2, 2], 19, n_steps=2)
    dataset.task = replace(algorithm.task, schedule=schedule)
    cls, hparams = type(algorithm), algorithm.hparams
    del algorithm
    for environment in dataset.datasets:
        environment.task = dataset.task
    attach_task(hparams, dataset.task)
    cls(dataset.input_shape, dataset.num_classes, 3, hparams)
    printed = capsys.readouterr().out
    assert "WARNING: MTCT: --steps 2 leaves SARR round 2, SARR round 3 without a step: training has 4 stages" in printed


def test_ineffective_job_is_reported_in_log_and_tables(domainbed_root, run_stock, tmp_path):
    """Two steps for four stages, and chains of three tokens: no round keeps one, no answer names a class."""
    job = tmp_path / "sweep" / ("a" * 32)
    hparams = '{"batch_size": 2, "max_new_tokens": 3, "first_evaluation": 99, "both_answers": false, "resume": false}'
    done = run_stock(
        domainbed_root, "train", "--data_dir", tmp_path, "--dataset", "ShapesReasoning", "--algorithm", "RDMLDG",
        "--test_envs", "3", "--steps", "2", "--hparams", hparams, "--output_dir", job, cwd=tmp_path,
    )  # fmt: skip
    printed = [line for line in done.stdout.splitlines() if line.startswith("WARNING")]
    assert "leaves SARR round 2, SARR round 3 without a step" in printed[0]
    assert "SARR round 1 (steps 1-1): kept 0.0%" in printed[2] and "(100.0%)" in printed[3]
    problems = {problem["kind"]: problem["detail"] for problem in collect(job.parent).attrs["problems"]}
    assert problems.keys() >= {"stages without steps", "nothing kept", "no class named"}
    assert "SARR round 2, 3 of 3" in problems["stages without steps"]
