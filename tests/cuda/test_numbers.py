"""A GPU computes what the CPU does, to the precision of its type."""

import pytest
import torch

from benchmarks import gpu_checks
from domainbed_reasoning.images import shapes
from domainbed_reasoning.mllm import load_mllm


def test_loss_chains_gradients_scores_and_kernels_are_those_expected(device):
    """The `works` part of `benchmarks.gpu`."""
    rows = list(gpu_checks.checks(device))
    assert len(rows) == 9 and not [row for row in rows if not row["passed"]]


def test_greedy_answers_in_float32_are_the_cpus(device):
    """Of two domains, in a batch and one at a time."""
    images = torch.cat([gpu_checks.pictures(), gpu_checks.pictures().flip(-1)])
    answers = []
    for where in (torch.device("cpu"), device):
        mllm = gpu_checks.embedded(where)
        answers.append(mllm.generate(images, gpu_checks.QUESTIONS[1], 112))
        answers.append([mllm.generate(image[None], gpu_checks.QUESTIONS[1], 112)[0] for image in images])
    assert answers[0] == answers[1] == answers[2] == answers[3] and all(answers[0])


def test_a_bfloat16_update_follows_a_float32_one(training):
    """Losses within 2%; the update of every adapter points the same way."""
    losses, moves = [], []
    for dtype in ("float32", "bfloat16"):
        samples = training(dtype=dtype)
        before = {name: weight.detach().clone() for name, weight in samples.mllm.adapters().items()}
        losses.append(samples.update()["loss"])
        after = samples.mllm.adapters()
        moves.append(torch.cat([(after[name].detach() - old).float().flatten().cpu() for name, old in before.items()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    # AdamW's first step is the sign of the gradient: rounding turns that of the smallest ones.
    assert float(torch.cosine_similarity(*moves, dim=0)) > 0.9


def test_nf4_trains_and_answers(training):
    samples = training(quantize="nf4", lr=1e-3)
    losses = [samples.update()["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    samples.algorithm.eval()
    assert not samples.mllm.fits_a_copy()
    answers = samples.mllm.generate(samples.images, samples.algorithm.q_reason, 8)
    assert len(answers) == len(samples.images)
    scores = samples.mllm.class_scores(samples.images, samples.algorithm.q_cls, samples.algorithm.task.class_names)
    assert scores.isfinite().all() and scores.shape == (8, 7)


def test_auto_is_bfloat16_on_the_gpu(device):
    mllm = load_mllm("tiny")
    assert mllm.device.type == device.type
    assert {weight.dtype for weight in mllm.parameters()} == {torch.bfloat16}
    assert set(mllm.generate(gpu_checks.pictures(), gpu_checks.QUESTIONS[0], 8)) <= set(shapes.CLASS_NAMES)
