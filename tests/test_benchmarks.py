"""The benchmarks' arithmetic; no test measures speed."""

import json
import socket

import pytest
import torch

from benchmarks import counts, measure, roofline
from benchmarks import stalls as stalls_module
from domainbed_reasoning.sweeps.costs import Shape, Tower

# 10 weights and one layer of width 1 each; 3 patches; a head of 20 weights.
TOWER = Tower(weights=10, inputs=2, outputs=3, layers=1, width=1)
SHAPE = Shape(TOWER, TOWER, 0, 0, head=20, vocabulary=0, patches=3, image_tokens=0, tiles=1, kv_bytes=0)


def test_tokens_see_what_they_follow_and_themselves():
    """A prefix of 3: 1 + 2 + 3 pairs. A branch of 2 after it: 4 + 5. Another of 1: 4."""
    assert counts.pairs_of([(0, 3), (3, 2), (3, 1)]) == 6 + 9 + 4


def test_a_forward_pass_by_hand():
    """Vision 3 patches: 2 * 10 * 3 + 4 * 9; language 3 tokens: 2 * 10 * 3 + 4 * 6; head at 1 position: 2 * 20."""
    step = counts.forward(SHAPE, n=2, images=1, rows=[(0, 3)], heads=1)
    assert step == counts.Step(vision=2 * 96, language=2 * 60, attention=2 * 24, head=2 * 40)
    assert step.total == 2 * (96 + 60 + 24 + 40)


def test_a_training_step_by_hand():
    """Frozen weights twice, attention thrice; rank 1 adapters of 5 weights: 6 * 5 operations a token and a patch."""
    step = counts.training_step(SHAPE, n=1, images=1, rows=[(0, 3)], supervised=1, rank=1)
    assert step.vision == 2 * 60 + 3 * 36
    assert step.language == 2 * 60 + 6 * 5 * (3 + 3)
    assert step.attention == 3 * 24
    assert step.head == 2 * 40


def test_the_roofline_counts_a_product_by_hand():
    """(2, 3) @ (3, 4): 2 * 2 * 3 * 4 operations; 6 + 12 read and 8 written, 2 bytes each; a view launches nothing."""
    left, right = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 3), (3, 4)))
    with roofline.Counting() as counting:
        counting.stage = "forward"
        (left @ right).view(4, 2)
    key = ("forward", "mm bfloat16")
    assert counting.kernels == {key: 1} and counting.operations == {key: 48} and counting.bytes == {key: 52}
    assert roofline.size_of(left[:, :1].expand(2, 100)) == 2 * 2


@pytest.mark.parametrize("algorithm", ["MTCT", "LabelSFT"])
def test_an_update_reads_the_gpu_once_and_copies_nothing_that_is_not_pinned(algorithm):
    """Three micro-batches of the embedded model: kernels grow with micro-batches, reads and copies do not."""
    stalls = stalls_module.count(algorithm, samples=4, micro_batch=4)
    assert sum(stalls.syncs.values()) <= stalls_module.SYNCS_BAR, stalls.syncs
    assert not sum(stalls.copies.values()), stalls.copies
    assert stalls.kernels <= 5_000


def test_host_synchronizations_are_detected():
    """A value, a mask as index, and a copy to the host; from the host, a list, and memory that is not pinned."""
    on_gpu, mask = torch.empty(3, device="meta"), torch.empty(3, dtype=torch.bool, device="meta")
    with stalls_module.Stalls().counted() as stalls:
        float(on_gpu.sum())
        on_gpu[mask]
        on_gpu.cpu()
        torch.zeros(3).to("meta")
        torch.tensor([1, 2], device="meta")
        torch.zeros(3).pin_memory().to("meta", non_blocking=True)
    assert sum(stalls.syncs.values()) == 3 and sum(stalls.copies.values()) == 2


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    calls = []
    seconds = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_a_slow_round_does_not_change_the_ratio():
    assert measure.ratio_of({"ours": [1, 10, 1], "peer": [2, 20, 2]}, "peer", "ours") == 2


def test_results_name_the_kind_of_machine_alone(tmp_path):
    row = measure.BenchmarkRow("a", "b", 1.0, 3.0, "s", float("nan"), "2", True, "equal")
    path = measure.write_results([row], "make bench", 3.0, tmp_path, measure.machine())
    record = json.loads(path.read_text())
    assert record["rows"][0]["ratio"] == 3.0 and record["rows"][0]["limit"] is None
    assert socket.gethostname() not in path.read_text() and str(tmp_path) not in path.read_text()
    assert measure.table([row]).splitlines()[-1] == "| a | b | 1 s | 3 s | 3.00 | – | 2 | pass | equal |"


def test_every_part_of_the_table_can_be_run():
    from benchmarks import bench

    for part in bench.PARTS:
        assert "def run(work" in (measure.CHECKOUT / "benchmarks" / f"{part}.py").read_text("utf-8")
