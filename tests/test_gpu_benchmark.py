"""`benchmarks.gpu` measures this package's own code; here with the tiny model, on whatever device there is."""

import json

import pytest
import torch

from benchmarks import gpu


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    code = gpu.main(["--tiny", "--repeats", "1", "--parts", "works", "training", "answers", "--output", str(output)])
    return code, json.loads(output.read_text())


@pytest.mark.slow
def test_every_part_records_its_measurements(record):
    code, found = record
    assert found["parts"] == ["works", "training", "answers"]
    names = [row["what"] for row in found["rows"]]
    for what in ("update, micro-batch 3", "profiled micro-batch", "chains, merged, batch 4", "scored by 65 names"):
        assert what in names
    assert code == 0 and not [row for row in found["rows"] if row["passed"] is False]


def test_updates_and_answers_have_speeds(record):
    _, found = record
    speeds = [row for row in found["rows"] if row["unit"] in ("images/s", "tokens/s")]
    assert len(speeds) == 2 + 1 + 2 + 5 + 2 and all(row["value"] > 0 for row in speeds)


def test_a_round_after_an_evaluation_of_the_same_weights_encodes_no_image_again(record):
    _, found = record
    (row,) = [row for row in found["rows"] if row["what"] == "rows rewritten at a round's start"]
    assert row["value"] == 0 and row["passed"]


def test_the_tiny_model_gives_no_rates(record):
    """Its speeds say nothing about a GPU's share of its peak."""
    assert record[1]["rates"] == {}


def test_what_does_not_fit_is_a_row(capsys):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench = gpu.Bench.__new__(gpu.Bench)
    bench.rows = []
    bench.tried("update, micro-batch 8", fails)
    assert bench.rows == [{"what": "update, micro-batch 8", "value": "out of memory", "unit": "", "passed": None}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there to measure")
def test_without_a_gpu_real_sizes_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--model", "2B"])
    assert "--tiny runs all parts on the CPU" in capsys.readouterr().err
