"""The optimiser of a stage and its learning rate: AdamW, as InternVL's own fine-tuning; the paper names none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def optimiser_of_stage(
    weights: Iterable[torch.Tensor], hparams: dict[str, Any], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return a fresh AdamW over ``weights`` and its learning-rate schedule over ``steps`` steps."""
    optimizer = torch.optim.AdamW(list(weights), lr=hparams["lr"], weight_decay=hparams["weight_decay"])
    factor = _lr_factor(hparams["lr_schedule"], hparams["warmup"], steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _lr_factor(schedule: str, warmup: float, steps: int) -> Any:
    """Return transformers' own learning-rate schedule of that name as a function of the step."""
    from transformers import optimization

    first = round(warmup * steps)
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    made = optimization.get_scheduler(name, dummy, num_warmup_steps=first, num_training_steps=steps)
    # transformers starts at 0; the first of few steps should not be lost.
    return (lambda step: made.lr_lambdas[0](step + 1)) if first else made.lr_lambdas[0]
