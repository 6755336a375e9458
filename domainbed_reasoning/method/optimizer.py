"""The optimizer of a stage and its learning rate: AdamW, as InternVL's own fine-tuning; the paper names none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


def optimizer_of_stage(
    weights: Iterable[torch.Tensor], hparams: Mapping[str, Any], steps: int | Callable[[], int]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return a fresh AdamW over ``weights`` and its learning-rate schedule.

    Args:
        weights: that are trained.
        hparams: ``lr``, ``weight_decay``, ``lr_schedule`` and ``warmup``.
        steps: of the schedule; a function where their number is known better from step to step.
    """
    optimizer = torch.optim.AdamW(list(weights), lr=hparams["lr"], weight_decay=hparams["weight_decay"])
    schedule = (hparams["lr_schedule"], hparams["warmup"])
    if isinstance(steps, int):
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _lr_factor(*schedule, steps))
    factor = lambda step: _lr_factor(*schedule, max(1, steps()))(step)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _lr_factor(schedule: str, warmup: float, steps: int) -> Any:
    """Return transformers' own learning-rate schedule of that name as a function of the step, from 0.

    The share ``warmup`` of the steps, rounded up, is warm-up: of w steps, step i has (i + 1) / w of the rate. w is 2 at
    least, for 1 would begin at the whole rate. transformers' schedules begin and end at 0, which is placed before the
    first step and after the last, so that every update moves the weights.
    """
    from transformers import optimization

    # Rounded before it is rounded up: 0.07 * 100 is a little more than 7.
    rising = min(max(2, math.ceil(round(warmup * steps, 9))), steps) if warmup else 1
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    made = optimization.get_scheduler(name, dummy, num_warmup_steps=rising, num_training_steps=steps + 1)
    return lambda step: made.lr_lambdas[0](min(step, steps - 1) + 1)
