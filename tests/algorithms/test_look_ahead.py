"""The chains of an evaluation are generated at its start, for all splits at once."""

import pytest
import torch

from builders.training import build
from domainbed_reasoning.jobs import progress
from domainbed_reasoning.jobs.answers import AnswerRecords
from domainbed_reasoning.mllm.generation import TextGenerator


@pytest.fixture
def generated(monkeypatch):
    """``(ahead, on demand)``: how many chains were generated each way."""
    counts, stream, generate = [0, 0], TextGenerator.stream, TextGenerator.generate

    def streamed(self, *given):
        for answer in stream(self, *given):
            counts[0] += 1
            yield answer

    def on_demand(self, images, *given, **named):
        counts[1] += len(images)
        chains = generate(self, images, *given, **named)
        counts[0] -= len(images) * (not named["do_sample"])  # `generate` streams greedy answers
        return chains

    monkeypatch.setattr(TextGenerator, "stream", streamed)
    monkeypatch.setattr(TextGenerator, "generate", on_demand)
    return counts


def in_a_job(folder, **changes):
    """Return dataset and algorithm of a job on the first 4 images of each domain."""
    dataset, algorithm = build("MLLMZeroShot", max_new_tokens=4, eval_batch=3, both_answers=False, **changes)
    for env in dataset.datasets:
        env.labels = env.labels[:4]
    ids = [(env, index) for env in range(len(dataset)) for index in range(4)]
    algorithm.session.records = AnswerRecords(algorithm.task, folder, dict.fromkeys(ids, "in"), algorithm.hparams)
    return dataset, algorithm.eval()


def batch_of(dataset, env):
    return torch.utils.data.default_collate([dataset[env][index] for index in range(4)])[0]


def test_first_predict_generates_the_chains_of_all_splits(tmp_path, generated, monkeypatch, capsys):
    """Progress is reported meanwhile; the scores are those of an algorithm outside of a job."""
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    dataset, algorithm = in_a_job(tmp_path)
    _, plain = build("MLLMZeroShot", max_new_tokens=4, eval_batch=3)
    expected = [plain.eval().predict(batch_of(dataset, env)) for env in range(len(dataset))]
    generated[:] = [0, 0]
    for env in range(len(dataset)):
        torch.testing.assert_close(algorithm.predict(batch_of(dataset, env)), expected[env])
        assert generated == [16, 0]
    printed = capsys.readouterr().out
    assert f"Chains of the evaluation after 0 of {algorithm.schedule.n_steps} updates:  94% 15/16" in printed
    assert f"Evaluation after 0 of {algorithm.schedule.n_steps} updates:  75% 12/16" in printed


def test_outside_of_a_job_chains_are_generated_on_demand(generated):
    dataset, algorithm = build("MLLMZeroShot", max_new_tokens=4)
    algorithm.eval().predict(batch_of(dataset, 0))
    assert generated == [0, 4]


@pytest.mark.parametrize(
    ("changes", "on_demand"),
    [
        ({"data_augmentation": True}, 4),  # random images
        ({"votes": 3}, 12),  # sampled
        ({"answer": "label"}, 0),
        ({"first_evaluation": 99}, 0),
    ],
    ids=str,
)
def test_nothing_is_generated_ahead_that_is_not_requested(tmp_path, generated, changes, on_demand):
    dataset, algorithm = in_a_job(tmp_path, **changes)
    algorithm.predict(batch_of(dataset, 0))
    assert generated == [0, on_demand]
