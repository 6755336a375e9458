"""Copies for inference, 16 GB each for an 8B model: when they are created and freed."""

import gc
import types
import weakref

import psutil
import pytest
import torch

from domainbed_reasoning.bridge.samples import Batch
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.mllm import MLLM, LoraSettings, decoding, load_mllm, snapshots

ROUNDS = Schedule((Stage(0, 0, 0), Stage(1, 1, 2), Stage(2, 3, 4)), 5, 1)


@pytest.fixture
def no_collector():
    """Python's collector of cycles may come late: a GPU that is full does not call it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def copies(monkeypatch):
    """Weak references to the copies so far, and of each how many others were there when it was made."""
    made, others, copy = [], [], MLLM.copy_for_inference

    def copied(self):
        others.append(sum(one() is not None for one in made))
        frozen = copy(self)
        made.append(weakref.ref(frozen))
        return frozen

    monkeypatch.setattr(MLLM, "copy_for_inference", copied)
    return made, others


def test_copy_is_freed_without_references(folder_of, images, no_collector):
    frozen = load_mllm(folder_of("InternVL"), lora=LoraSettings(4, 8)).eval().copy_for_inference()
    frozen.generate(images, "?", 4)
    frozen.class_scores(images, "?", ["a", "b"])
    weight = weakref.ref(next(frozen.network.parameters()))
    del frozen
    assert weight() is None


def test_labeler_is_freed_before_the_next_one_is_created(folder_of, algorithm_on, minibatches, copies, no_collector):
    algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", ROUNDS, micro_batch=8, max_new_tokens=4)
    for _ in range(5):
        algorithm.update(minibatches)
    assert copies[1] == [0, 0]


def test_round_keeps_the_copy_of_the_evaluation_before_it(folder_of, algorithm_on, minibatches, copies, no_collector):
    """The first round decides whether a copy fits, after the evaluation's is freed; the second takes over."""
    algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", ROUNDS, micro_batch=8, max_new_tokens=4)
    for step in range(5):
        algorithm.update(minibatches)
        if step in (0, 2):
            algorithm.eval()
            algorithm.predict(minibatches[0][0])
            algorithm.train()
    made, others = copies
    assert others == [0, 0, 0]
    assert [copy() is not None for copy in made] == [False, False, True]


def test_evaluation_keeps_its_initial_copy(folder_of, algorithm_on, minibatches, copies, monkeypatch):
    """While the copy is there, there is no room for another: that is no reason to answer without it."""
    algorithm = algorithm_on(folder_of("InternVL"), "MTCT", micro_batch=8, max_new_tokens=4)
    algorithm.update(minibatches)
    algorithm.eval()
    room = iter([True, False, False])
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda self, *bytes: next(room))
    for x, _ in minibatches:
        algorithm.predict(x)
        assert algorithm.snapshots.current() is copies[0][0]()
    assert len(copies[0]) == 1


def test_evaluation_without_a_copy_stays_without(folder_of, algorithm_on, minibatches, copies, monkeypatch):
    algorithm = algorithm_on(folder_of("InternVL"), "MTCT", micro_batch=8, max_new_tokens=4)
    algorithm.update(minibatches)
    algorithm.eval()
    room = iter([False, True])
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda self, *bytes: next(room))
    for x, _ in minibatches:
        algorithm.predict(x)
    assert not copies[0]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """``on_a_gpu(mllm, free, reserved, allocated)``: what CUDA would say, in sizes of the model, which is returned."""

    def say(mllm, free, reserved, allocated):
        size = sum(weight.numel() * weight.element_size() for weight in mllm.network.parameters())
        monkeypatch.setattr(MLLM, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * size), int(10 * size)))
        for name, count in (("reserved", reserved), ("allocated", allocated)):
            monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda device, count=count: int(count * size))
        return size

    return say


def test_copy_fits_into_unused_reserved_memory(folder_of, on_a_gpu):
    """5 sizes: 1 is the model, 3.5 were training's and are held ready, 0.5 are free: 4 could be had, 1.5 are asked."""
    mllm = load_mllm(folder_of("InternVL"))
    on_a_gpu(mllm, free=0.5, reserved=4.5, allocated=1)
    assert mllm.fits_a_copy()


def test_persistent_copy_leaves_enough_memory_for_training(folder_of, on_a_gpu):
    """The same, and training comes back: of 5 sizes it has taken 4.5. Or 3, which leaves 2."""
    mllm = load_mllm(folder_of("InternVL"))
    size = on_a_gpu(mllm, free=0.5, reserved=4.5, allocated=1)
    assert not mllm.fits_a_copy(beside=int(4.5 * size))
    assert mllm.fits_a_copy(beside=3 * size)


def test_copy_without_room_for_generation_is_not_made(folder_of, on_a_gpu):
    """Of 5 sizes 4 could be had; the copy takes one, keys and values of a model without grouped heads 3."""
    mllm = load_mllm(folder_of("InternVL"))
    size = on_a_gpu(mllm, free=0.5, reserved=4.5, allocated=1)
    assert mllm.fits_a_copy(writes=2 * size)
    assert not mllm.fits_a_copy(writes=3 * size)


def test_a_copy_that_the_machine_has_no_memory_for_is_none(folder_of, monkeypatch):
    """On the CPU: a process that exceeds the memory is killed, and its job with it."""
    mllm = load_mllm(folder_of("InternVL"), device="cpu")
    assert mllm.fits_a_copy()
    size = sum(weight.numel() * weight.element_size() for weight in mllm.network.parameters())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1.4 * size))
    assert not mllm.fits_a_copy()


def test_the_bytes_of_written_chains_are_those_of_the_cache(folder_of, images, monkeypatch):
    mllm = load_mllm(folder_of("InternVL"), dtype="float32").eval()
    caches, make = [], decoding.slot_cache
    monkeypatch.setattr(decoding, "slot_cache", lambda *given: caches.append(make(*given)) or caches[-1])
    mllm.generate(images, "Which?", 6)
    held = sum(part.numel() * part.element_size() for layer in caches[0].layers for part in (layer.keys, layer.values))
    assert mllm.cache_bytes(len(images), "Which?", 6) == held


def test_training_memory_is_measured_before_an_evaluation_adds_its_copy(
    folder_of, algorithm_on, minibatches, monkeypatch
):
    """DomainBed evaluates after the first step, the first round begins later."""
    algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", ROUNDS, micro_batch=8, max_new_tokens=4)
    peaks = iter([1000, 5000])
    monkeypatch.setattr(snapshots, "peak_memory", lambda device: next(peaks))
    algorithm.snapshots.training_peak = None  # as on CUDA
    asked = []
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda self, writes, beside=0: asked.append(beside) or True)
    for _ in range(3):
        algorithm.update(minibatches)
        algorithm.predict(minibatches[0][0])
    assert [beside for beside in asked if beside] == [1100]


@pytest.mark.parametrize(
    ("peak", "free", "samples", "fitting"),
    [
        (2.0, 20.0, 129, "about 32 images"),  # half a GB a sample, of 80% of 20 GB
        (2.0, 20.0, 24, "about 24 images"),  # no more than an update has
        (9.0, 5.0, 129, None),  # twice as many do not fit
        (2.0, 20.0, 2, None),  # one pass already
        (2.0, None, 129, None),  # unknown
    ],
)
def test_a_job_whose_passes_leave_memory_unused_says_so_once(
    folder_of, algorithm_on, monkeypatch, caplog, peak, free, samples, fitting
):
    algorithm = algorithm_on(folder_of("InternVL"), "MTCT", micro_batch=2)
    monkeypatch.setattr(snapshots, "peak_memory", lambda device: int(peak * 1e9))
    monkeypatch.setattr(snapshots, "allocated_memory", lambda device: 10**9)
    weights = algorithm.mllm.weight_bytes()
    monkeypatch.setattr(
        snapshots, "free_memory", lambda device: None if free is None else free * 1e9 + 1.1 * weights + 1
    )
    algorithm.snapshots.training_peak = None  # as on CUDA
    with caplog.at_level("INFO"):
        algorithm.snapshots.update_done(2, samples)
        algorithm.snapshots.update_done(2, samples)
    said = [record.getMessage() for record in caplog.records if "micro_batch 2" in record.getMessage()]
    assert len(said) == (fitting is not None) and (fitting is None or fitting in said[0])


def test_an_evaluation_within_a_round_has_no_copy_but_its_own(folder_of, algorithm_on, minibatches, copies):
    """The labeller's makes room, and is made anew: of the weights that began the round."""
    algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", Schedule((Stage(1, 0, 3),), 3, 3), max_new_tokens=4)
    algorithm.update(minibatches)
    with torch.no_grad():
        for weight in algorithm.mllm.adapters().values():
            weight.add_(0.05)
    state = copies[0][0]().frozen_state
    algorithm.predict(minibatches[0][0])
    assert [copy() is not None for copy in copies[0]] == [False, True]
    algorithm.run.own_chains.written.clear()
    algorithm.update(minibatches)
    assert [copy() is not None for copy in copies[0]] == [False, False, True]
    assert copies[0][2]().frozen_state == state


def test_all_rounds_label_as_the_first(folder_of, algorithm_on, minibatches, copies, monkeypatch):
    """Its own copy is part of the peak that a later round would look at."""
    algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", ROUNDS, micro_batch=8, max_new_tokens=4)
    room = iter([True, False])
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda self, *bytes: next(room))
    for _ in range(5):
        algorithm.update(minibatches)
    assert len(copies[0]) == 2


def test_a_first_round_decides_for_a_copy_after_its_first_update(folder_of, algorithm_on, minibatches, copies):
    """Without a stage before it nobody knows what training takes: the first batch is labelled with the adapters."""
    algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", Schedule((Stage(1, 0, 2),), 3, 3), max_new_tokens=4)
    algorithm.snapshots.training_peak = None  # as on CUDA
    start = {name: weight.clone() for name, weight in algorithm.mllm.adapters().items()}
    algorithm.update(minibatches)
    assert not copies[0] and algorithm.run.own_chains.labeled == 8
    algorithm.snapshots.training_peak = 1000  # no chain was kept, so that it was no update
    with torch.no_grad():
        for weight in algorithm.mllm.adapters().values():
            weight.add_(0.1)
    algorithm.run.own_chains.written.clear()
    algorithm.update(minibatches)
    assert len(copies[0]) == 1 and algorithm.run.own_chains.labeled == 16
    expected = algorithm_on(folder_of("InternVL"), "RDMLDG").mllm
    expected.load_adapters(start)
    images = Batch.gather(minibatches, algorithm.pixels).images
    frozen = expected.copy_for_inference()
    assert [chain for chain, _ in algorithm.run.own_chains.written.values()] == frozen.generate(
        images, algorithm.q_reason, 4
    )
