"""A SARR round's labeler on the embedded model: its mode, the means it uses, and what a restart restores."""

import io

import pytest
import torch
from domainbed import algorithms, datasets, hparams_registry

from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.schedule import Schedule, Stage
from domainbed_reasoning.mllm import MLLM

ROUNDS = Schedule((Stage(1, 0, 1), Stage(2, 2, 3)), 4, 1)
MATES = list(range(6))


def build(**changes):
    """RD-MLDG on ShapesReasoning, adapters away from zero, with the filter for consistency."""
    torch.manual_seed(0)
    hparams = hparams_registry.default_hparams("RDMLDG", "ShapesReasoning")
    hparams |= {"max_new_tokens": 24, "sarr_filter": "consistent"} | changes
    dataset = datasets.ShapesReasoning(None, [3], hparams)
    algorithm = algorithms.get_algorithm_class("RDMLDG")(dataset.input_shape, dataset.num_classes, 3, hparams)
    algorithm.schedule = ROUNDS
    with torch.no_grad():
        for name, weight in algorithm.mllm.adapters().items():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    return dataset, algorithm


def pictures(dataset, env=0):
    return torch.stack([dataset[env][i][0].as_subclass(torch.Tensor) for i in MATES])


def judged(algorithm, dataset, env=0):
    """What the round's second filter says of the teacher's chains of a few images, a right and a wrong word in each."""
    chains = [shapes.chain(env, i) for i in MATES]
    return algorithm.run.own_chains.second(pictures(dataset, env), chains, [shapes.label(env, i) for i in MATES])


def means(algorithm):
    return [
        values.clone() for values in (algorithm.run.own_chains.support.sums, algorithm.run.own_chains.support.counts)
    ]


@pytest.mark.parametrize("copy", [True, False])
def test_a_labeler_drops_nothing_out_with_a_copy_or_without(monkeypatch, copy):
    """Training drops half of every adapter's input; the labeller writes and judges as the model does in evaluation."""
    monkeypatch.setattr(MLLM, "fits_a_copy", lambda self, *bytes: copy)
    dataset, algorithm = build(lora_dropout=0.5, sarr_filter="consistent")
    images = pictures(dataset)
    algorithm.eval()
    expected = algorithm.mllm.generate(images, algorithm.q_reason, 24)
    algorithm.train()
    assert algorithm.mllm.generate(images, algorithm.q_reason, 24) != expected
    algorithm.run = algorithm.begin(ROUNDS.stages[0])
    assert algorithm.run.own_chains.write(images) == expected
    judged(algorithm, dataset)
    first = means(algorithm)
    algorithm.run = algorithm.begin(ROUNDS.stages[0])
    judged(algorithm, dataset)
    for once, again in zip(first, means(algorithm), strict=True):
        assert torch.equal(once, again)
    assert all(module.training for module in (algorithm.mllm, algorithm.mllm.network))


def test_an_answer_that_fails_leaves_the_weights_and_the_mode_of_training():
    _, algorithm = build()
    own = {name: weight.clone() for name, weight in algorithm.mllm.adapters().items()}
    with pytest.raises(KeyError), algorithm.mllm.with_adapters({name: 0 * weight for name, weight in own.items()}):
        raise KeyError
    assert algorithm.mllm.training
    assert all(torch.equal(weight, own[name]) for name, weight in algorithm.mllm.adapters().items())


def test_every_round_begins_its_means_anew():
    """The same chains are judged in round 2 as they were in round 1: nothing seen before is held against them."""
    dataset, algorithm = build()
    algorithm.run = algorithm.begin(ROUNDS.stages[0])
    first, after = judged(algorithm, dataset), means(algorithm)
    judged(algorithm, dataset, env=1)
    assert not torch.equal(means(algorithm)[0], after[0])
    algorithm.run = algorithm.begin(ROUNDS.stages[1])
    assert [float(values.abs().sum()) for values in means(algorithm)] == [0, 0]
    assert judged(algorithm, dataset) == first
    assert torch.equal(means(algorithm)[0], after[0]) and torch.equal(means(algorithm)[1], after[1])


def test_a_restart_within_a_round_holds_chains_against_the_means_so_far():
    """One process judges env 0's chains, then env 1's; another is restored between, and judges env 1's alike."""
    dataset, algorithm = build()
    algorithm.session.steps_taken = 1
    algorithm.run = algorithm.begin(ROUNDS.stages[0])
    judged(algorithm, dataset)
    algorithm.snapshots.training_peak = 123
    before, file = means(algorithm), io.BytesIO()
    torch.save(algorithm.training_state(), file)
    file.seek(0)
    _, again = build()
    again.session.steps_taken = 1
    again.restore(torch.load(file, weights_only=True))
    assert again.snapshots.training_peak == 123
    for restored, values in zip(means(again), before, strict=True):
        assert torch.equal(restored, values) and values.abs().sum() > 0
    verdicts = [judged(each, dataset, env=1) for each in (algorithm, again)]
    assert verdicts[0] == verdicts[1]
    for one, other in zip(means(algorithm), means(again), strict=True):
        assert torch.equal(one, other)
