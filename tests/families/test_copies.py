"""Copies for inference, 16 GB each of an 8B model: when one is made, and when it goes."""

import gc
import weakref

import pytest

from domainbed_reasoning.mllm import MLLM, LoraSettings, load_mllm
from domainbed_reasoning.stages import Schedule, Stage

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


def test_a_copy_is_gone_when_nobody_holds_it(folder_of, images, no_collector):
    frozen = load_mllm(folder_of("InternVL"), lora=LoraSettings(4, 8)).eval().copy_for_inference()
    frozen.generate(images, "?", 4)
    frozen.class_scores(images, "?", ["a", "b"])
    weight = weakref.ref(next(frozen.network.parameters()))
    del frozen
    assert weight() is None


def test_a_rounds_labeller_goes_before_the_next_is_made(folder_of, algorithm_on, minibatches, copies, no_collector):
    algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", ROUNDS, micro_batch=8, max_new_tokens=4)
    for _ in range(5):
        algorithm.update(minibatches)
    assert copies[1] == [0, 0]
