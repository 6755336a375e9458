"""Rates of a GPU: assumed until a result of `benchmarks.gpu` replaces them."""

import json

import pytest

from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.sweeps.rates import ASSUMED, name_of_gpu, rates_for

RATES = {
    "training_mfu": 0.7, "layer_overhead": 0.001, "prefill_mfu": 0.5, "bandwidth": 0.8, "step_overhead": 0.01,
    "launch_overhead": 0.02,
}  # fmt: skip
RECORD = {
    "gpu": "A100-80", "device": "NVIDIA A100-SXM4-80GB", "date": "2026-01-02", "versions": {"torch": "2.11.0"},
    "rates": RATES, "rows": [],
}  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    def write(**changes):
        path = tmp_path / "gpu.json"
        path.write_text(json.dumps({**RECORD, **changes}))
        return path

    return write


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA L4", 22.2, "L4"),
        ("NVIDIA GeForce RTX 4090", 23.5, "RTX4090"),
        ("NVIDIA RTX A6000", 47.4, "A6000"),
        ("AMD Instinct MI300X", 192.0, None),
    ],
)
def test_devices_are_found_by_the_name_that_pytorch_reports(device, gib, name):
    assert name_of_gpu(device, gib) == name


def test_measured_rates_replace_the_assumed_ones_of_that_gpu_alone(measured):
    path = measured()
    for rates in (rates_for("a100-80", path), rates_for("A100-80", committed=path.parent)):
        assert {name: rates[name].value for name in RATES} == RATES
        assert rates["training_mfu"].measured and "NVIDIA A100" in rates["training_mfu"].source
        assert rates["nf4_slowdown"] == ASSUMED["nf4_slowdown"]
    assert rates_for("H200", committed=path.parent) == ASSUMED


def hours(printed):
    (line,) = [line for line in printed.splitlines() if line.startswith("  training")]
    return float(line.split()[1])


def test_plan_counts_until_the_gpu_was_measured(measured, capsys):
    plan = ["plan", "--dataset", "PACS", "--gpu", "A100-80", "--hparams", '{"micro_batch": 8}']
    assert cli.main(plan) == 0
    counted = capsys.readouterr().out
    assert "counted, not measured" in counted and "hours: counted" in counted
    assert cli.main([*plan, "--rates", str(measured())]) == 0
    printed = capsys.readouterr().out
    assert "from rates measured on this GPU" in printed and "counted" not in printed
    assert "training_mfu 0.7: measured on NVIDIA A100-SXM4-80GB, 2026-01-02, torch 2.11.0" in printed
    assert hours(printed) == pytest.approx(hours(counted) * ASSUMED["training_mfu"].value / 0.7, abs=0.1)
    assert cli.main([*plan, "--rates", str(measured()), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["basis"] == "measured" and numbers["hours"]["training"] == pytest.approx(hours(printed), abs=0.05)
    assert numbers["rates"]["training_mfu"]["value"] == 0.7 and not numbers["rates"]["nf4_slowdown"]["measured"]


def test_plan_uses_what_was_measured_on_an_h100(capsys):
    """Of `sweeps/measured_rates`; larger micro-batches that fit are offered where launching kernels takes longer."""
    assert cli.main(["plan", "--dataset", "PACS", "--gpu", "H100"]) == 0
    printed = capsys.readouterr().out
    assert "from rates measured on this GPU" in printed and "measured on NVIDIA H100 80GB HBM3" in printed
    assert """--hparams '{"micro_batch": 8}'   the same updates in fewer passes""" in printed
    assert cli.main(["plan", "--dataset", "PACS", "--gpu", "H100", "--hparams", '{"micro_batch": 8}']) == 0
    assert hours(capsys.readouterr().out) < hours(printed)


def test_a_plan_with_one_assumed_rate_is_counted(measured, capsys):
    """Quantized training rests on a slowdown that this file lacks."""
    plan = ["plan", "--dataset", "PACS", "--gpu", "A100-80", "--rates", str(measured())]
    assert cli.main([*plan, "--hparams", '{"quantize": "nf4"}']) == 0
    assert "counted, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "H200"}, "was measured on H200, not on H100. Pass --gpu H200, or omit --rates."),
        ({"gpu": None}, "was not measured on a listed GPU"),
        ({"gpu": "H1000"}, "unknown GPU 'H1000'. Known: H200"),
        ({"rates": {"mfu": 0.5}}, "rate 'mfu' must be one of training_mfu"),
        ({"rates": {"training_mfu": -1}}, "above 0; got -1"),
        ({"rates": {"training_mfu": True}}, "above 0; got True"),
        ({"rates": [1]}, "is not a result of `python -m benchmarks.gpu --output FILE`"),
    ],
)
def test_a_file_of_other_contents_is_refused(measured, capsys, changes, message):
    assert cli.main(["plan", "--dataset", "PACS", "--gpu", "H100", "--rates", str(measured(**changes))]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert cli.main(["plan", "--dataset", "PACS", "--gpu", "H100", "--rates", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
