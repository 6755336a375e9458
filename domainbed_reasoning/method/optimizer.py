"""Optimizer and learning-rate schedule of a stage: AdamW as in InternVL's fine-tuning; the paper names none."""

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
        weights: the trained tensors.
        hparams: ``lr``, ``weight_decay``, ``lr_schedule`` and ``warmup``.
        steps: number of steps; a function if the estimate changes during training.
    """
    optimizer = torch.optim.AdamW(list(weights), lr=hparams["lr"], weight_decay=hparams["weight_decay"])
    schedule = (hparams["lr_schedule"], hparams["warmup"])
    if isinstance(steps, int):
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, _lr_factor(*schedule, steps))
    factor = lambda step: _lr_factor(*schedule, max(1, steps()))(step)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _lr_factor(schedule: str, warmup: float, steps: int) -> Any:
    """Return transformers' learning-rate schedule of that name as a function of the step, from 0.

    Warm-up takes the share ``warmup`` of the steps, rounded up: of w steps, step i has (i + 1) / w of the rate. w is at
    least 2, as 1 would start at the full rate. transformers' schedules begin and end at 0; here these points are before
    the first and after the last step, so that every update changes the weights.
    """
    from transformers import optimization

    # Rounded before the ceiling: 0.07 * 100 is slightly more than 7.
    rising = min(max(2, math.ceil(round(warmup * steps, 9))), steps) if warmup else 1
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    made = optimization.get_scheduler(name, dummy, num_warmup_steps=rising, num_training_steps=steps + 1)
    return lambda step: made.lr_lambdas[0](min(step, steps - 1) + 1)
