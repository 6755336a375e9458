"""Optimization: exact accumulation, warm-up and schedule, clipping, precision, and checkpoint size."""

import io
import math

import pytest
import torch

from domainbed_reasoning.method.optimizer import _lr_factor


def update_of(algorithm, minibatches):
    before = {name: weight.detach().clone() for name, weight in algorithm.mllm.adapters().items()}
    algorithm.update(minibatches)
    after = algorithm.mllm.adapters()
    return {name: after[name].detach() - before[name] for name in after}


@pytest.mark.parametrize("name", ["InternVL", "Qwen3-VL", "Gemma3"])
@pytest.mark.parametrize("algorithm", ["MTCT", "LabelSFT", "ReasoningSFT"])
def test_micro_batches_give_the_update_of_the_whole_batch(folder_of, algorithm_on, minibatches, name, algorithm):
    """1 x 8, 2 x 4 and 8 x 1 samples: gradients and updates within 1e-5 (float32).

    Chains of unequal length, so that a mean over the batch's tokens in place of each chain's own would show.
    """
    updates, gradients = [], []
    for micro_batch in (8, 4, 1):
        built = algorithm_on(folder_of(name), algorithm, micro_batch=micro_batch, lr=1e-3, warmup=0.0)
        for key in list(built.task.chains)[::2]:
            built.task.chains[key] = built.task.chains[key].replace("four legs", "four long and straight legs of wood")
        updates.append(update_of(built, minibatches))
        gradients.append({key: weight.grad for key, weight in built.mllm.adapters().items()})
    for other in (1, 2):
        for key in updates[0]:
            torch.testing.assert_close(updates[other][key], updates[0][key], rtol=0, atol=1e-5)
            torch.testing.assert_close(gradients[other][key], gradients[0][key], rtol=1e-4, atol=1e-5)
    assert max(float(update.abs().max()) for update in updates[0].values()) > 1e-4


def test_micro_batches_of_unequal_size_weigh_samples_alike(folder_of, algorithm_on, minibatches):
    """3 + 3 + 2 samples: a mean of means would weigh the last two more."""
    gradients = []
    for micro_batch in (8, 3):
        built = algorithm_on(folder_of("InternVL"), "MTCT", micro_batch=micro_batch)
        built.update(minibatches)
        gradients.append({key: weight.grad for key, weight in built.mllm.adapters().items()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-4, atol=1e-5)


def test_warm_up_and_schedules_by_hand():
    """100 steps, 10 of warm-up. Step k (from 0) has factor (k+1)/10 while warm, then falls to 0 after the last."""
    cosine, linear, constant = (_lr_factor(name, 0.1, 100) for name in ("cosine", "linear", "constant"))
    for factor in (cosine, linear, constant):
        assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert linear(54) == pytest.approx((101 - 55) / 91)
    assert cosine(54) == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert constant(99) == 1.0
    assert linear(99) == pytest.approx(1 / 91)
    assert cosine(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 90 / 91)))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [2, 3, 20, 33, 34, 100])
def test_a_small_share_is_a_warm_up_and_no_update_has_rate_0(name, steps):
    """3% of 20 steps are 0.6: rounded up and 2 at least, as 1 step of warm-up would begin at the whole rate."""
    factor = _lr_factor(name, 0.03, steps)
    rates = [factor(step) for step in range(steps)]
    rising = max(2, math.ceil(0.03 * steps))
    assert rates[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    assert max(rates) == 1.0 and min(rates) > 0


def test_warm_up_may_take_one_step_or_all():
    """7% of 100 steps are 7, whatever 0.07 * 100 is in floating point; beyond a stage's end the rate stays."""
    assert _lr_factor("cosine", 0.03, 1)(0) == 1.0
    assert [_lr_factor("linear", 1.0, 4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert _lr_factor("cosine", 0.07, 100)(6) == 1.0 and _lr_factor("cosine", 0.07, 100)(5) < 1.0


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert [_lr_factor(name, 0.0, 50)(0) for name in ("cosine", "linear", "constant")] == [1.0, 1.0, 1.0]


def test_the_rates_that_updates_use_are_the_schedules(folder_of, algorithm_on, minibatches):
    """A stage of 5 steps, 2 of warm-up: 1/2, 1, then linearly to 0 at step 6. A new stage begins anew."""
    from domainbed_reasoning.method.schedule import Schedule, Stage

    schedule = Schedule((Stage(0, 0, 4), Stage(0, 5, 9)), 10, 5)
    built = algorithm_on(
        folder_of("SmolVLM"), "LabelSFT", schedule, micro_batch=8, lr=1e-3, lr_schedule="linear", warmup=0.4
    )
    used = []
    for _ in range(7):
        built.update(minibatches)
        used.append(built.run.lr_scheduler.lr_lambdas[0](built.run.lr_scheduler.last_epoch - 1))
    assert used == pytest.approx([1 / 2, 1, 3 / 4, 1 / 2, 1 / 4, 1 / 2, 1])


def test_clipping_bounds_the_gradient_and_is_off_by_default(folder_of, algorithm_on, minibatches):
    norms = []
    for clip in (0.0, 0.01):
        built = algorithm_on(folder_of("SmolVLM"), "MTCT", micro_batch=8, grad_clip=clip)
        built.update(minibatches)
        gradients = [weight.grad for weight in built.mllm.adapters().values()]
        norms.append(float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_a_step_in_bfloat16_is_close_to_float32(folder_of, algorithm_on, minibatches):
    """Losses within 3%, adapters' gradients within 10 degrees."""
    values, gradients = [], []
    for dtype in ("float32", "bfloat16"):
        built = algorithm_on(folder_of("InternVL"), "MTCT", micro_batch=8, dtype=dtype)
        values.append(built.update(minibatches))
        gradients.append(torch.cat([weight.grad.float().flatten() for weight in built.mllm.adapters().values()]))
    assert values[1]["loss"] == pytest.approx(values[0]["loss"], rel=0.03)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > math.cos(math.radians(10))


def test_a_checkpoint_of_a_31m_model_is_under_3_percent_of_it(algorithm_on, model_31m):
    """InternVL's shape at 31 million parameters, rank 8 in both towers."""
    built = algorithm_on(model_31m, "MTCT")
    count = sum(weight.numel() for name, weight in built.mllm.named_parameters() if "lora" not in name)
    assert 29e6 < count < 33e6
    file = io.BytesIO()
    torch.save({"model_dict": built.state_dict(), "model_hparams": built.hparams}, file)
    trained = sum(weight.numel() for weight in built.mllm.adapters().values())
    assert trained == sum(tensor.numel() for tensor in built.state_dict().values())
    assert file.tell() < 0.03 * 4 * count
