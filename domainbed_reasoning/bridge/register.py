"""Add our names to DomainBed's registries; the only code that modifies its modules.

The import hook calls `publish` when one of them has been imported. No file of DomainBed is changed, and publishing
twice is publishing once.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from domainbed_reasoning import interrupt, registry
from domainbed_reasoning.bridge import plugins, preflight, tracked, versions
from domainbed_reasoning.bridge.train_args import job_arguments, recognized_arguments
from domainbed_reasoning.images import user_datasets as custom

# name -> (default, random), as DomainBed's `_hparams` returns it.
Ranges = dict[str, tuple[Any, Any]]


class _Missing(type):
    """Metaclass of placeholders for classes that cannot be imported: using one raises the reason."""

    why: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(cls.why)

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else ImportError(cls.why)


def publish(module: ModuleType) -> list[str]:
    """Add our names to one of DomainBed's four registry modules, and return why some of them are missing.

    A class that cannot be had is replaced by one whose use raises an ImportError with the cause; it is in no list.
    """
    try:
        return list(_PUBLISHERS[module.__name__](module))
    except Exception as error:  # e.g. a fork with other registries
        return [f"the package's names cannot be added to {module.__name__}: {type(error).__name__}: {error}"]


def publish_algorithms(module: ModuleType) -> Iterator[str]:
    """Make our algorithms attributes of `domainbed.algorithms` and append them to its list in place."""
    rejected = plugins.discover()
    yield from _publish_classes(module, module.ALGORITHMS, registry.ALGORITHMS, "algorithm")
    yield from _publish_rejected(module, rejected, "algorithm")


def publish_datasets(module: ModuleType) -> Iterator[str]:
    """Make our datasets attributes of `domainbed.datasets` and append them to its list in place."""
    rejected = plugins.discover()
    yield from _publish_classes(module, module.DATASETS, registry.DATASETS, "dataset")
    yield from _publish_rejected(module, rejected, "dataset")
    # Datasets described by the user, each with its stock counterpart, by name.
    own, problems = custom.usable_datasets()
    yield from map(str, problems)
    if not own:
        return
    targets = custom.targets(own)
    try:
        refused = registry.load(f"{custom.MODULE}:PROBLEMS")
    except Exception as error:
        yield _add_missing(module, list(targets), custom.MODULE, error)
        return
    for dataset in own.values():
        names = custom.targets({dataset.name: dataset})
        taken = [name for name in names if not _is_free(vars(module).get(name))]
        if taken:
            assert dataset.file is not None
            problem = f"{module.__name__} already has {taken[0]!r}; choose another name"
            yield str(custom.DatasetFileError(dataset.file, problem))
        elif dataset.name in refused:
            yield str(refused[dataset.name])
            for name in names:
                setattr(module, name, _Missing(name, (), {"why": str(refused[dataset.name])}))
        else:
            yield from _publish_classes(module, module.DATASETS, names, "dataset")


def _is_free(there: Any) -> bool:
    return there is None or isinstance(there, _Missing) or getattr(there, "__module__", "") == custom.MODULE


def publish_launchers(module: ModuleType) -> Iterator[str]:
    """Add our launchers to the registry of `domainbed.command_launchers`."""
    for name, target in registry.LAUNCHERS.items():
        there = module.REGISTRY.get(name)
        try:
            launcher = registry.load(target)
        except Exception as error:
            launcher = _Missing(name, (), {"why": _why([name], target, error)})
            yield launcher.why
        if not _may_replace(there, launcher):
            yield _clash("launcher", name, module.__name__, there)
        else:
            module.REGISTRY[name] = launcher


def publish_hparams(module: ModuleType) -> Iterator[str]:
    """Wrap `domainbed.hparams_registry._hparams`, which both its public functions call, once."""
    if not hasattr(module._hparams, "stock_hparams"):
        module._hparams = _with_ours(module._hparams)  # type: ignore[attr-defined]
    yield from ()


_PUBLISHERS: dict[str, Callable[[ModuleType], Iterator[str]]] = {
    "domainbed.algorithms": publish_algorithms,
    "domainbed.datasets": publish_datasets,
    "domainbed.hparams_registry": publish_hparams,
    "domainbed.command_launchers": publish_launchers,
}


def _publish_classes(module: ModuleType, names: list[str], targets: Mapping[str, str], kind: str) -> Iterator[str]:
    failed: dict[str, tuple[list[str], str, Exception]] = {}  # by cause, which several modules may share
    for name, target in targets.items():
        there = vars(module).get(name)
        try:
            cls = registry.load(target)
        except Exception as error:
            failed.setdefault(f"{type(error)} {error}", ([], target, error))[0].append(name)
            continue
        if not _may_replace(there, cls):
            yield _clash(kind, name, module.__name__, there)
            continue
        setattr(module, name, cls)
        if name not in names:
            names.append(name)
    for missing, target, cause in failed.values():
        yield _add_missing(module, missing, target, cause)


def _publish_rejected(module: ModuleType, rejected: Mapping[plugins.Plugin, str], kind: str) -> Iterator[str]:
    """Yield why plug-ins are left out, and install placeholders under their names where those are free."""
    for plugin, cause in rejected.items():
        why = f"the plug-in {plugin} is left out: {cause}"
        if plugin.kind == kind and plugin.name.isidentifier() and _may_replace(vars(module).get(plugin.name), _Missing):
            setattr(module, plugin.name, _Missing(plugin.name, (), {"why": why}))
        yield why


def _add_missing(module: ModuleType, names: Sequence[str], target: str, error: Exception) -> str:
    """Install placeholders for classes that cannot be imported, and return the reason."""
    for name in names:
        if _may_replace(vars(module).get(name), _Missing):
            setattr(module, name, _Missing(name, (), {"why": _why([name], target, error)}))
    return _why(names, target, error)


def _why(names: Sequence[str], target: str, error: Exception) -> str:
    cause = f"importing {target.partition(':')[0]} failed: {type(error).__name__}: {error}"
    return f"{', '.join(names)} cannot be added to DomainBed, because {cause}"


def _may_replace(there: Any, ours: Any) -> bool:
    """Return whether ``there`` is empty, ours, or a placeholder; after a reload the newest class counts."""
    return there is None or isinstance(there, _Missing) or _origin(there) == _origin(ours)


def _load(target: str, name: str) -> Any:
    try:
        return registry.load(target)
    except Exception as error:
        raise ImportError(_why([name], target, error)) from error


def _clash(kind: str, name: str, where: str, there: Any) -> str:
    return f"{where} already has another {kind} {name!r}, {_origin(there)}: rename it to use this package's"


def _origin(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


def _with_ours(stock_hparams: Callable[[str, str, int], Ranges]) -> Callable[[str, str, int], Ranges]:
    """Return DomainBed's ``_hparams`` extended by our algorithms and datasets, with plain Python values.

    Stock algorithms get on our datasets what they get on the stock twin. Stock MLDG and ADRMX draw numpy scalars, which
    end a run at its first checkpoint, where the hyper-parameters are written as JSON.
    """

    @functools.wraps(stock_hparams)
    def hparams(algorithm: str, dataset: str, random_seed: int) -> Ranges:
        plugins.discover()  # again: a plug-in that imports DomainBed was incomplete when names were registered
        rank, world = _check_ranks(algorithm)
        versions.record_for_job(world)  # the train script requests hyper-parameters first
        if algorithm in registry.ALGORITHMS:
            if job_arguments() is not None:
                interrupt.end_with("Interrupted. Rerun the same command to resume from the saved progress.")
            ranges = _own_hparams(algorithm, dataset, random_seed)
        else:
            ranges = stock_hparams(algorithm, _twin(dataset), random_seed)
            for name, hparam in registry.BASELINE_HPARAMS.get(dataset, {}).items():
                ranges[name] = _range(name, hparam, dataset, random_seed)
        preflight.check_job(algorithm, dataset, ranges)
        if rank == 0:
            tracked.start_for_job(algorithm, dataset)
        return {name: (plain(default), plain(drawn)) for name, (default, drawn) in ranges.items()}

    hparams.stock_hparams = stock_hparams  # type: ignore[attr-defined]
    return hparams


def _check_ranks(algorithm: str) -> tuple[int, int]:
    """Check that torchrun's ranks, if any, can run this process's job; return its rank and their number."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    from domainbed_reasoning.bridge import torchrun

    torchrun.check_job(algorithm, recognized_arguments())
    return torchrun.ranks().rank, torchrun.ranks().world


def _twin(dataset: str) -> str:
    """Return the stock dataset whose hyper-parameters baselines use on ``dataset``."""
    if dataset in registry.TWINS:
        return registry.TWINS[dataset]
    if dataset in registry.DATASETS:  # of a plug-in
        return getattr(_load(registry.DATASETS[dataset], dataset), "TWIN", None) or dataset
    name = registry.plain_name(dataset)
    own, problems = custom.usable_datasets()
    stock = sys.modules.get("domainbed.datasets")
    if problems and name not in own and stock is not None and dataset not in vars(stock):
        raise problems[0]  # one of the files may describe the dataset
    return name if name != dataset and name in own else dataset


def _own_hparams(algorithm: str, dataset: str, random_seed: int) -> Ranges:
    """Return the ranges of one of our algorithms: our dataset's, its own, which may replace them, and its name."""
    tables = [registry.STOCK_CODE_HPARAMS]
    if dataset in registry.DATASETS:
        tables.append(_load(registry.DATASETS[dataset], dataset).HPARAMS)
    elif _twin(dataset) != dataset:
        tables.append(_load(custom.targets(custom.usable_datasets()[0])[dataset], dataset).HPARAMS)
    tables.append(_load(registry.ALGORITHMS[algorithm], algorithm).HPARAMS)
    ranges: Ranges = {}
    for table in tables:
        ranges |= {name: _range(name, hparam, dataset, random_seed) for name, hparam in table.items()}
    # Datasets see only hyper-parameters: this one tells them the algorithm.
    return ranges | {"algorithm": (algorithm, algorithm)}


def _range(name: str, hparam: registry.Hparam, dataset: str, random_seed: int) -> tuple[Any, Any]:
    default = hparam.default_on(dataset)
    if hparam.sample is None:
        return default, default
    import numpy
    from domainbed.lib import misc

    drawn = hparam.sample(numpy.random.RandomState(misc.seed_hash(random_seed, name)))
    return default, hparam.drawn_on(dataset, plain(drawn))


def plain(value: Any) -> Any:
    """Return ``value`` with numpy scalars and arrays, at any depth, as plain Python."""
    if type(value).__module__ == "numpy":
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value
