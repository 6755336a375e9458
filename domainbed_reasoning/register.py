"""The only code that touches DomainBed's modules: our names in its registries.

The import hook calls `publish` when one of them has been imported; importing this module by hand installs the hook and
publishes to those that are imported already. No file of DomainBed is changed, and publishing twice is publishing once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import _domainbed_reasoning_hook
from domainbed_reasoning import custom, preflight, registry, versions
from domainbed_reasoning.allowed import check_values

# name -> (default, random), as DomainBed's `_hparams` returns it.
Ranges = dict[str, tuple[Any, Any]]


def publish(module: ModuleType) -> None:
    """Add our names to one of DomainBed's four registry modules.

    Raises:
        RuntimeError: the module has a name of ours already, from somebody else.
        ImportError: one of our class modules cannot be imported.
    """
    _PUBLISHERS[module.__name__](module)


def publish_algorithms(module: ModuleType) -> None:
    """Make our algorithms attributes of `domainbed.algorithms` and append them to its list in place."""
    _publish_classes(module, module.ALGORITHMS, registry.ALGORITHMS, "algorithm")


def publish_datasets(module: ModuleType) -> None:
    """Make our datasets attributes of `domainbed.datasets` and append them to its list in place."""
    _publish_classes(module, module.DATASETS, registry.DATASETS, "dataset")
    # The user's own, each with its twin, by name.
    own = custom.custom_datasets()
    for dataset in own.values():
        for name, target in custom.targets({dataset.name: dataset}).items():
            there = vars(module).get(name)
            if there is not None and getattr(there, "__module__", "") != target.partition(":")[0]:
                assert dataset.file is not None
                fault = f"{module.__name__} has {name!r} already; choose another name"
                raise custom.DatasetFileError(dataset.file, fault)
    _publish_classes(module, module.DATASETS, custom.targets(own), "dataset")


def publish_launchers(module: ModuleType) -> None:
    """Add our launchers to the registry of `domainbed.command_launchers`."""
    for name, target in registry.LAUNCHERS.items():
        launcher = _load(target, name)
        there = module.REGISTRY.get(name, launcher)
        if _origin(there) != _origin(launcher):
            raise _clash("launcher", name, module.__name__, there)
        module.REGISTRY[name] = launcher


def publish_hparams(module: ModuleType) -> None:
    """Wrap `domainbed.hparams_registry._hparams`, which both its public functions call, once."""
    if not hasattr(module._hparams, "stock_hparams"):
        module._hparams = _with_ours(module._hparams)  # type: ignore[attr-defined]


_PUBLISHERS: dict[str, Callable[[ModuleType], None]] = {
    "domainbed.algorithms": publish_algorithms,
    "domainbed.datasets": publish_datasets,
    "domainbed.hparams_registry": publish_hparams,
    "domainbed.command_launchers": publish_launchers,
}


def _publish_classes(module: ModuleType, names: list[str], targets: Mapping[str, str], kind: str) -> None:
    for name, target in targets.items():
        cls = _load(target, name)
        there = vars(module).get(name, cls)
        # A reloaded class module has a new class of the same origin: the newest one counts.
        if _origin(there) != _origin(cls):
            raise _clash(kind, name, module.__name__, there)
        setattr(module, name, cls)
        if name not in names:
            names.append(name)


def _load(target: str, name: str) -> Any:
    try:
        return registry.load(target)
    except custom.DatasetFileError:
        raise
    except Exception as error:
        module = target.partition(":")[0]
        raise ImportError(
            f"domainbed-reasoning cannot add {name!r} to DomainBed, because importing {module} failed: "
            f"{type(error).__name__}: {error}. Mend or reinstall domainbed-reasoning, or uninstall it to use DomainBed "
            "without it."
        ) from error


def _clash(kind: str, name: str, where: str, there: Any) -> RuntimeError:
    return RuntimeError(
        f"{where} has another {kind} {name!r} already, {_origin(there)}: "
        "rename that one, or uninstall domainbed-reasoning."
    )


def _origin(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


def _with_ours(stock_hparams: Callable[[str, str, int], Ranges]) -> Callable[[str, str, int], Ranges]:
    """Return DomainBed's ``_hparams`` made to know our algorithms and datasets, in plain Python values.

    Stock algorithms get on our datasets what they get on the stock twin. Stock MLDG and ADRMX draw numpy scalars, which
    end a run at its first checkpoint, where the hyper-parameters are written as JSON.
    """

    @functools.wraps(stock_hparams)
    def hparams(algorithm: str, dataset: str, random_seed: int) -> Ranges:
        versions.record_for_job()  # every job of the train script asks for its hyper-parameters before all else
        if algorithm in registry.ALGORITHMS:
            ranges = _own_hparams(algorithm, dataset, random_seed)
        else:
            ranges = stock_hparams(algorithm, _twin(dataset), random_seed)
            for name, hparam in registry.BASELINE_HPARAMS.get(dataset, {}).items():
                ranges[name] = _range(name, hparam, dataset, random_seed)
        preflight.check_job(algorithm, dataset, ranges)
        return {name: (plain(default), plain(drawn)) for name, (default, drawn) in ranges.items()}

    hparams.stock_hparams = stock_hparams  # type: ignore[attr-defined]
    return hparams


def _twin(dataset: str) -> str:
    """Return the dataset without chains whose hyper-parameters baselines get on ``dataset``."""
    if dataset in registry.TWINS:
        return registry.TWINS[dataset]
    name = dataset.removesuffix("Reasoning")
    return name if name != dataset and name in custom.custom_datasets() else dataset


def _own_hparams(algorithm: str, dataset: str, random_seed: int) -> Ranges:
    """Return the ranges of one of our algorithms: its table, the dataset's if that is ours too, and its name."""
    tables = [registry.STOCK_CODE_HPARAMS, registry.load(registry.ALGORITHMS[algorithm]).HPARAMS]
    if dataset in registry.DATASETS:
        tables.append(registry.load(registry.DATASETS[dataset]).HPARAMS)
    elif _twin(dataset) != dataset:
        tables.append(registry.load(custom.targets(custom.custom_datasets())[dataset]).HPARAMS)
    ranges: Ranges = {}
    for table in tables:
        ranges |= {name: _range(name, hparam, dataset, random_seed) for name, hparam in table.items()}
    # Datasets see only the hyper-parameters: from this one they know which algorithm runs on them.
    return ranges | {"algorithm": (algorithm, algorithm)}


def _range(name: str, hparam: registry.Hparam, dataset: str, random_seed: int) -> tuple[Any, Any]:
    default = hparam.default_on(dataset)
    if hparam.sample is None:
        return default, default
    import numpy
    from domainbed.lib import misc

    return default, hparam.sample(numpy.random.RandomState(misc.seed_hash(random_seed, name)))


def plain(value: Any) -> Any:
    """Return ``value`` with numpy scalars and arrays, however deep, as plain Python."""
    if type(value).__module__ == "numpy":
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value


def check_hparams(hparams: Mapping[str, Any], algorithm: str) -> None:
    """Refuse hyper-parameters that nothing would read, which stock DomainBed ignores, and values that cannot be used.

    Args:
        hparams: what DomainBed passes to the constructor of an algorithm of ours.
        algorithm: its name.

    Raises:
        ValueError: naming the unknown name and the nearest known one, or what a value may be.
    """
    check_names(hparams, algorithm)
    check_values(hparams, registry.rows_of(algorithm))


def check_names(hparams: Iterable[str], algorithm: str) -> None:
    """Refuse names of hyper-parameters that nothing would read: stock DomainBed ignores a misspelt one.

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
    from domainbed import algorithms, hparams_registry

    names = {"algorithm", *registry.rows_of()}
    for name in algorithms.ALGORITHMS:
        if name not in registry.ALGORITHMS:
            # One small and one large dataset: some names depend on the size.
            for dataset in ("Debug28", "PACS"):
                names |= hparams_registry._hparams(name, dataset, 0).keys()
    return frozenset(names)


_domainbed_reasoning_hook.publish()
