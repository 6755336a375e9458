"""Check the names of hyper-parameters: those that no algorithm or dataset reads are rejected."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.hparam_checks import check_values


def check_hparams(hparams: Mapping[str, Any], algorithm: str) -> None:
    """Reject hyper-parameters that nothing reads, which stock DomainBed ignores, and invalid values.

    Args:
        hparams: what DomainBed passes to the constructor of an algorithm of ours.
        algorithm: its name.

    Raises:
        ValueError: naming the unknown name and the nearest known one, or what a value may be.
    """
    check_names(hparams, algorithm)
    check_values(hparams, registry.rows_of(algorithm))


def check_names(hparams: Iterable[str], algorithm: str) -> None:
    """Reject names of hyper-parameters that nothing reads: stock DomainBed ignores misspelled ones.

    Known are those of every algorithm and dataset, ours and stock, because a sweep passes one ``--hparams`` to all.

    Args:
        hparams: the names.
        algorithm: its name, for the message.

    Raises:
        ValueError: naming the unknown name and the nearest known one.
    """
    known = known_hparams()
    for name in hparams:
        if name not in known:
            near = str(registry.unknown(f"hparam of {algorithm}", name, known)).partition(" Available:")[0]
            if algorithm in registry.ALGORITHMS:
                own = registry.load(registry.ALGORITHMS[algorithm]).HPARAMS
                near += f" {algorithm} has: {', '.join(sorted(own))}."
            raise ValueError(near)


@functools.cache
def known_hparams() -> frozenset[str]:
    """Return the names of every hyper-parameter that an algorithm or dataset, ours or stock, reads."""
    from domainbed import algorithms, datasets, hparams_registry

    names = {"algorithm", *registry.rows_of()}
    for name in algorithms.ALGORITHMS:
        if name not in registry.ALGORITHMS:
            # One small and one large dataset: some names depend on the size. A fork may know only its own datasets.
            asked = [_names_of(hparams_registry, name, dataset) for dataset in ("Debug28", "PACS")]
            names.update(*asked)
            if not any(asked):
                names.update(*(_names_of(hparams_registry, name, dataset) for dataset in datasets.DATASETS))
    return frozenset(names)


def _names_of(hparams_registry: ModuleType, algorithm: str, dataset: str) -> frozenset[str]:
    """Return the hyper-parameter names of a stock or third-party algorithm; empty if it rejects the dataset."""
    try:
        return frozenset(hparams_registry._hparams(algorithm, dataset, 0))
    except Exception:  # third-party code of an algorithm that does not run here
        return frozenset()
