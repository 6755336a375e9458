"""The benchmarks' arithmetic; no test measures speed."""

import json
import socket
import sys

import pytest
import safetensors
import torch
import transformers

from benchmarks import counts, measure, parts, published_checkpoints, real_size, roofline
from benchmarks import ranks as ranks_module
from benchmarks import stalls as stalls_module
from domainbed_reasoning.sweeps.costs import Shape, Tower

# 10 weights and one layer of width 1 each; 3 patches; a head of 20 weights.
TOWER = Tower(weights=10, inputs=2, outputs=3, layers=1, width=1)
SHAPE = Shape(
    TOWER, TOWER, 0, 0, head=20, vocabulary=0, patches=3, image_tokens=0, tiles=1, kv_bytes=0, prefill_bytes=0
)


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


def test_ranks_share_an_update_by_hand():
    """129 images in micro-batches of at most 4: 33 for one process; 9 for each of four ranks, 36 in all.

    A ring of four sends 3/4 of 10 float32 numbers twice: 60 bytes.
    """
    assert list(map(len, ranks_module.rows_of_ranks(129, 4, 1))) == [33]
    shares = ranks_module.rows_of_ranks(129, 4, 4)
    assert list(map(len, shares)) == [9] * 4 and sum(map(sum, shares)) == 129
    assert max(map(sum, shares)) == 33 and max(map(max, shares)) == 4
    assert ranks_module.bytes_reduced(10, 4) == 60 and ranks_module.bytes_reduced(10, 1) == 0


@pytest.mark.parametrize("algorithm", ["MTCT", "LabelSFT"])
def test_an_update_reads_the_gpu_once_and_copies_nothing_that_is_not_pinned(algorithm):
    """Three micro-batches of the embedded model: kernels grow with micro-batches, reads and copies do not."""
    stalls = stalls_module.count(algorithm, samples=4, micro_batch=4)
    assert sum(stalls.syncs.values()) <= stalls_module.SYNCS_BAR, stalls.syncs
    assert not sum(stalls.copies.values()), stalls.copies
    assert stalls.kernels <= 5_000


def test_decoding_synchronizes_for_no_token():
    """As a CUDA graph would be captured: each step's tokens are copied to pinned memory, and nothing waits for them."""
    steps, slots = 6, 4
    stalls = stalls_module.count_steps(steps, slots)
    assert sum(stalls.syncs.values()) == stalls_module.TOKEN_BAR == 0, stalls.syncs
    assert not sum(stalls.copies.values()), stalls.copies
    assert sum(stalls.later.values()) == steps
    assert stalls.kernels <= steps * stalls_module.STEP_KERNELS_BAR


def test_a_micro_batch_launches_a_bounded_number_of_kernels():
    """Forward and backward pass of both paths, counted as on CUDA."""
    assert 0 < stalls_module.kernels_of_micro_batch(micro_batch=2) <= stalls_module.MICRO_BATCH_KERNELS_BAR


def test_host_synchronizations_are_detected():
    """A value, a mask as index, and a copy to the host; from the host, lists, also as index, and unpinned memory."""
    on_gpu, mask = torch.empty(3, device="meta"), torch.empty(3, dtype=torch.bool, device="meta")
    with stalls_module.Stalls().counted() as stalls:
        float(on_gpu.sum())
        on_gpu[mask]
        on_gpu.cpu()
        torch.zeros(3).to("meta")
        torch.tensor([1, 2], device="meta")
        on_gpu[[0, 2]]
        on_gpu[None, [1]]
        on_gpu[0], on_gpu[1:], on_gpu[torch.empty(2, dtype=torch.long, device="meta")]
        torch.zeros(3).pin_memory().to("meta", non_blocking=True)
        torch.zeros(3).pin_memory().copy_(on_gpu, non_blocking=True)
    assert sum(stalls.later.values()) == 1
    assert sum(stalls.syncs.values()) == 3 and sum(stalls.copies.values()) == 4


def test_a_part_within_another_pauses_it(monkeypatch):
    """Since the start 5 s; then rest 1, training 2, answers within it 3, training 4, rest 5."""
    clock = iter([0, 1, 3, 6, 10, 15])
    monkeypatch.setattr(parts.time, "time", lambda: 105.0)
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(clock))
    timers = parts.Parts(started=100.0)

    class Job:
        def answer(self):
            return "dog"

        def update(self):
            return self.answer()

    timers.watch(Job, "answer", "answers")
    timers.watch(Job, "update", "training")
    assert Job().update() == "dog"
    found = timers.finished()
    assert found == {"imports": 5, "rest": 6, "training": 6, "answers": 3}
    assert parts.shares(found, wall=30) == "rest 53%, training 20%, imports 17%, answers 10%"


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


@pytest.mark.slow
def test_a_checkpoint_as_published_but_for_its_width_goes_through_all_stages(tmp_path):
    """InternVL3's special tokens have their published ids, one of them beyond the output head; shards have an index."""
    checkpoint = published_checkpoints.shrunken(published_checkpoints.CHECKPOINTS["InternVL3-1B"])
    found = {}
    for stage in real_size.STAGES:
        real_size.run_stage(stage, checkpoint, tmp_path)
        found[stage] = json.loads((tmp_path / f"{stage}.json").read_text())
    base = tmp_path / "base"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == found["build"]["shards"] > 1
    head_name = "language_model.lm_head.weight"
    with safetensors.safe_open(base / index["weight_map"][head_name], "pt") as file:
        head = file.get_tensor(head_name)
    assert head.dtype == torch.bfloat16 and len(head) == 151_674
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokens = ["<|endoftext|>", "<|im_end|>", "<IMG_CONTEXT>", "<video>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [151_643, 151_645, 151_667, 151_674]
    assert found["load"]["end_token"] == "<|im_end|>"
    assert found["train"]["moved"] == found["train"]["adapters"] > 0
    assert found["train"]["tokens"]["q_cls"] > 256
    assert found["predict"]["deviation"] < 0.1 and found["predict, merged"]["deviation"] < 0.1  # nats, in bfloat16


def test_smolvlm_has_its_published_tokens():
    checkpoint = published_checkpoints.CHECKPOINTS["SmolVLM2-500M"]
    tokenizer = checkpoint.processor().tokenizer
    assert len(tokenizer) == checkpoint.config["text_config"]["vocab_size"] == 49_280
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<image>", "<end_of_utterance>"]) == [2, 49_190, 49_279]
    assert tokenizer.eos_token_id == checkpoint.generation["eos_token_id"]


def test_what_a_process_allocates_is_measured():
    """A hundred million bytes that are written, for as long as it takes to see them."""
    program = "import time; kept = bytes(1) * 10**8; time.sleep(1)"
    allocated, resident = real_size.measured([sys.executable, "-c", program])
    assert 0.1 <= allocated <= resident


def test_real_sizes_become_a_row_a_stage():
    stage = {"seconds": {"load": 9.0}, "processor_seconds": {"load": 2.0}, "allocated_gb": 3.0, "resident_gb": 4.0}
    result = {"checkpoint": "A/B", "machine": "m", "threads": 1, "stages": {"export": {**stage, "bytes": 5e9}}}
    assert "| A/B | export | load 2 (9) | 3.0 | 4.0 | 5.00 GB on disk |" in real_size.table([result])
