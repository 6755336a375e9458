"""Host synchronizations, the decision for a merged copy, and peak memory, as CUDA reports them."""

import contextlib

import pytest
import torch

from benchmarks.gpu_checks import counted_syncs
from benchmarks.mtct_step import LENGTHS, BenchmarkSamples
from benchmarks.stalls import SYNCS_BAR
from domainbed_reasoning.method import objective
from domainbed_reasoning.mllm import load_mllm
from domainbed_reasoning.mllm.devices import free_memory
from domainbed_reasoning.sweeps import costs

GIB = 2**30


@contextlib.contextmanager
def sync_debug_mode(mode):
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_an_update_synchronizes_only_to_read_its_losses(training, monkeypatch):
    samples = training()
    samples.minibatch = tuple(part.to("cuda") for part in samples.minibatch)  # as the train script does
    for _ in range(2):
        samples.update()  # fills what is cached
    read, reads = objective.read, []

    def reading(sums):
        with sync_debug_mode("default"):
            reads.append(read(sums))
        return reads[-1]

    monkeypatch.setattr(objective, "read", reading)
    with sync_debug_mode("error"):
        samples.update()
    assert len(reads) == 1


def test_an_update_synchronizes_as_often_as_counted_without_a_gpu(training):
    samples = training()
    samples.minibatch = tuple(part.to("cuda") for part in samples.minibatch)
    for _ in range(2):
        samples.update()
    assert counted_syncs(samples.update) <= SYNCS_BAR


def test_a_merged_copy_is_made_where_it_fits(training, device):
    """A tensor that takes all memory but half a GiB leaves no room for a GiB of keys and values."""
    samples = training()
    samples.update()
    samples.algorithm.eval()
    mllm, snapshots = samples.mllm, samples.algorithm.snapshots
    snapshots.cache_bytes = GIB
    assert snapshots.training_peak > 0
    taken = torch.empty(free_memory(device) - GIB // 2, dtype=torch.uint8, device=device)
    assert not mllm.fits_a_copy(snapshots.cache_bytes)
    assert snapshots.current() is mllm
    snapshots.weights_change()
    del taken
    torch.cuda.empty_cache()
    copy = snapshots.current()
    assert copy is not mllm and copy.frozen_state is not None
    images, question = samples.images, samples.algorithm.q_reason
    assert len(copy.generate(images, question, 8)) == len(images)


def test_a_model_larger_than_free_memory_is_refused_before_it_loads(device, model_2b):
    taken = torch.empty(free_memory(device) - 2 * GIB, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"needs \d+\.\d GiB for its weights and the GPU has [12]\.\d GiB free"):
        load_mllm(model_2b)
    del taken
    torch.cuda.empty_cache()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_peak_memory_of_training_is_the_planned_one(model_2b, gradient_checkpointing):
    """Within the 30% that `plan` promises, at 2B's size."""
    changes = {"gradient_checkpointing": gradient_checkpointing, "micro_batch": 4}
    samples = BenchmarkSamples(model_2b, "MTCT", (*LENGTHS, LENGTHS[0]), **changes)
    samples.update()
    torch.cuda.reset_peak_memory_stats()
    samples.update()
    shape, asked = costs.shape_of(model_2b), (samples.algorithm.q_cls, samples.algorithm.q_reason)
    question, reason = (samples.mllm.prompt(text)["input_ids"].shape[1] for text in asked)
    lengths = costs.Lengths(question - shape.image_tokens, reason - question, 3, 250)
    planned = costs.memory_of(shape, lengths, samples.algorithm.hparams)
    expected = 1.1 * (planned.weights + planned.adapters + planned.activations)
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.3)
