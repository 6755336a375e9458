"""Hyper-parameters: a default and a random value for each name, given algorithm, dataset and seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from domainbed.lib import misc

SMALL_IMAGES = ("Debug28", "RotatedMNIST", "ColoredMNIST")
Sampler = Callable[[np.random.RandomState], Any]


def _fixed(value: Any) -> tuple[Any, Sampler]:
    return value, lambda draw: value


def _power(default: Any, base: int, low: float, high: float, cast: Callable = float) -> tuple[Any, Sampler]:
    return default, lambda draw: cast(base ** draw.uniform(low, high))


def _dropout() -> tuple[Any, Sampler]:
    return 0.0, lambda draw: draw.choice([0.0, 0.1, 0.5])


OWN = {
    "IRM": {"irm_lambda": _power(1e2, 10, -1, 5), "irm_penalty_anneal_iters": _power(500, 10, 0, 4, int)},
    "GroupDRO": {"groupdro_eta": _power(1e-2, 10, -3, -1)},
    "Mixup": {"mixup_alpha": _power(0.2, 10, -1, 1)},
    "CORAL": {"mmd_gamma": _power(1.0, 10, -1, 1)},
}


def _table(algorithm: str, dataset: str) -> dict[str, tuple[Any, Sampler]]:
    small = dataset in SMALL_IMAGES
    off = dict.fromkeys(("resnet18", "dinov2", "vit", "vit_attn_tune", "freeze_bn", "lars"), _fixed(False))
    table = {"data_augmentation": _fixed(True), "resnet50_augmix": _fixed(True), **off, "linear_steps": _fixed(500)}
    table |= {"resnet_dropout": _dropout(), "vit_dropout": _dropout()}
    table |= {"class_balanced": _fixed(False), "nonlinear_classifier": _fixed(False)}
    table |= OWN.get(algorithm, {})
    if small:
        table["lr"], table["weight_decay"] = _power(1e-3, 10, -4.5, -2.5), _fixed(0.0)
        table["batch_size"] = _power(64, 2, 3, 9, int)
    else:
        table["lr"], table["weight_decay"] = _power(5e-5, 10, -5, -3.5), _power(0.0, 10, -6, -2)
        table["batch_size"] = _power(32, 2, 3, 5 if dataset == "DomainNet" else 5.5, int)
    return table


def _hparams(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
    """Return {name: (default, random)}; each name draws from a generator of its own."""
    return {
        name: (default, sample(np.random.RandomState(misc.seed_hash(random_seed, name))))
        for name, (default, sample) in _table(algorithm, dataset).items()
    }


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    """Return the defaults."""
    return {name: pair[0] for name, pair in _hparams(algorithm, dataset, 0).items()}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    """Return the values that ``seed`` draws."""
    return {name: pair[1] for name, pair in _hparams(algorithm, dataset, seed).items()}
