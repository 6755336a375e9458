"""The cache of greedy answers: frozen weights never generate an answer twice, and nothing else is cached."""

import pytest
import torch

from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.mllm import MLLM, LoraSettings, load_mllm
from domainbed_reasoning.mllm.generation import TextGenerator
from domainbed_reasoning.mllm.generation_cache import keys_of, write_ahead


@pytest.fixture
def mllm(folder_of):
    return load_mllm(folder_of("InternVL"), lora=LoraSettings(4, 8)).eval()


@pytest.fixture
def written(monkeypatch):
    """How many answers each call of the writing loop wrote."""
    counts, write = [], TextGenerator.generate
    monkeypatch.setattr(
        TextGenerator,
        "generate",
        lambda self, images, *a, **k: counts.append(len(images)) or write(self, images, *a, **k),
    )
    return counts


def test_copies_with_equal_weights_share_the_cache(mllm, images, written):
    first = mllm.copy_for_inference().generate(images[:3], "?", 6)
    assert mllm.copy_for_inference().generate(images, "?", 6)[:3] == first
    assert written == [3, 2]  # the three are known


def test_another_question_length_or_image_is_another_answer(mllm, images, written):
    frozen = mllm.copy_for_inference()
    frozen.generate(images[:1], "?", 6)
    frozen.generate(images[:1], "!", 6)
    frozen.generate(images[:1], "?", 5)
    frozen.generate(images[1:2], "?", 6)
    frozen.generate(images[[0, 1, 0]], "?", 6)
    assert written == [1, 1, 1, 1]


def test_training_weights_and_sampled_chains_are_not_cached(mllm, images, written):
    mllm.generate(images[:2], "?", 6)
    mllm.generate(images[:2], "?", 6)
    frozen = mllm.copy_for_inference()
    for _ in range(2):
        frozen.generate(images[:2], "?", 6, temperature=1.0)
    assert written == [2, 2, 2, 2]


def test_changed_adapter_invalidates_the_cache(mllm, images, written):
    before = mllm.copy_for_inference().generate(images, "?", 12)
    with torch.no_grad():
        for weight in mllm.adapters().values():
            weight.normal_(std=0.5)
    after = mllm.copy_for_inference().generate(images, "?", 12)
    assert written == [5, 5] and before != after


@pytest.mark.parametrize("copies", [True, False])
def test_sarr_round_reuses_chains_of_the_evaluation(folder_of, algorithm_on, minibatches, written, monkeypatch, copies):
    """Evaluated or not, with a merged copy or without: the same chains, the same numbers."""
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda *given: copies)
    schedule = Schedule((Stage(0, 0, 0), Stage(1, 1, 2)), 3, 1)
    values = []
    for evaluated in (True, False):
        algorithm = algorithm_on(folder_of("InternVL"), "RDMLDG", schedule, micro_batch=8, max_new_tokens=16)
        algorithm.update(minibatches)
        if evaluated:
            algorithm.eval()
            for x, _ in minibatches:
                algorithm.predict(x)
            algorithm.train()
        written.clear()
        values.append(algorithm.update(minibatches))
        assert written == ([] if evaluated else [8])
    assert values[0] == values[1]


@pytest.mark.parametrize("slots", [True, False])
def test_chains_generated_ahead_are_not_generated_again(mllm, images, written, monkeypatch, slots):
    """Two images are known, one of them from an earlier process, and one comes twice."""
    monkeypatch.setattr(TextGenerator, "has_slots", slots)
    expected = mllm.generate(images, "?", 6)
    frozen = mllm.copy_for_inference()
    frozen.generate(images[:1], "?", 6)
    written.clear()
    keys = [digest for _, _, digest in keys_of(frozen, images, "?", 6)[1]]
    ahead = write_ahead(frozen, images[[0, 1, 2, 3, 2, 4]], "?", 6, 2, {keys[1]: "told"})
    assert dict(ahead) == {keys[row]: expected[row] for row in (2, 3, 4)}
    assert frozen.generate(images, "?", 6) == [expected[0], "told", *expected[2:]]
    assert written == []


def test_cached_answers_do_not_outlive_their_weights(folder_of, algorithm_on, minibatches, monkeypatch):
    """Without a copy the trained model itself remembers, until the next update."""
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda *given: False)
    algorithm = algorithm_on(folder_of("InternVL"), "MTCT", micro_batch=8, max_new_tokens=16, lr=0.1)
    states = []
    for _ in range(2):
        algorithm.update(minibatches)
        assert algorithm.mllm.frozen_state is None
        assert algorithm.snapshots.current() is algorithm.mllm
        states.append(algorithm.mllm.frozen_state)
    assert None not in states and states[0] != states[1]


def test_model_without_kv_cache_is_rejected(folder_of, images):
    """From transformers 5.24 on it keeps one in training mode too, where no gradient is asked for."""
    mllm = load_mllm(folder_of("InternVL"), lora=LoraSettings(4, 8), gradient_checkpointing=True)
    expected = mllm.eval().generate(images, "?", 4)
    try:
        assert mllm.train().generate(images, "?", 4) == expected
    except RuntimeError as error:
        assert "call eval" in str(error)
