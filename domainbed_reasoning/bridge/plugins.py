"""Algorithms and datasets from other packages and from the user's modules.

Two sources, in this order: entry points of the groups `domainbed_reasoning.algorithms` and
`domainbed_reasoning.datasets`, sorted by distribution; and the modules in ``$DOMAINBED_REASONING_PLUGINS``, separated
by commas, whose public classes count. Every class is checked when it is found. One that cannot be used, or whose name
is taken, is left out with a reason; it never keeps DomainBed, this package or another plug-in from working.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.registry import EMBEDDED_DATASETS, Hparam

VARIABLE = "DOMAINBED_REASONING_PLUGINS"
GROUPS = {"domainbed_reasoning.algorithms": "algorithm", "domainbed_reasoning.datasets": "dataset"}
_TABLES = {"algorithm": registry.ALGORITHMS, "dataset": registry.DATASETS}
_STOCK = {
    "algorithm": ("domainbed.algorithms", "Algorithm"),
    "dataset": ("domainbed.datasets", "MultipleDomainDataset"),
}
# The required base class, and the name under which users import it.
_BASES = {
    "algorithm": (("domainbed_reasoning.algorithms.in_session:SessionAlgorithm",), "MLLMAlgorithm"),
    "dataset": (
        (
            "domainbed_reasoning.datasets.reasoning_dataset:ReasoningDataset",
            "domainbed_reasoning.datasets.image_folders:ReasoningImageFolder",
        ),
        "ReasoningDataset",
    ),
}
_NOT_THEIRS = {"domainbed", "domainbed_reasoning", "torch", *sys.stdlib_module_names}


@dataclass(frozen=True)
class Plugin:
    """A class from outside of this package.

    Attributes:
        kind: ``algorithm`` or ``dataset``.
        name: of the class; empty for a module that cannot be imported.
        target: ``"module:name"``, or the module.
        source: the distribution with its version, or the variable that names the module.
    """

    kind: str
    name: str
    target: str
    source: str

    def __str__(self) -> str:
        """Name the plug-in and where it comes from."""
        return f"{self.kind} {self.name} ({self.target} of {self.source})" if self.name else f"{self.target}"


class _NotYet(Exception):
    """The module of a plug-in is still being imported: its classes do not exist yet."""


_found: dict[tuple[str, str], Plugin] = {}  # by kind and name
_rejected: dict[Plugin, str] = {}
_tried: set[tuple[str, ...]] = set()
_searching: list[bool] = []


def discover() -> dict[Plugin, str]:
    """Find the plug-ins and add the usable ones to the registry; repeated calls keep earlier findings.

    Returns:
        why each of the others is left out, as a sentence without its period.
    """
    if _searching:  # a plug-in imports a module of DomainBed, which triggers registration
        return _rejected
    _searching.append(True)
    before = len(_found)
    try:
        for point, source in _entry_points():
            _try(("entry point", point.group, point.name, point.value), _add_entry_point, point, source)
        for module in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
            _try(("module", module), _add_module, module)
    finally:
        _searching.clear()
    hook = sys.modules.get("_domainbed_reasoning_hook")
    if len(_found) > before and hook is not None:
        hook.publish()
    return _rejected


def found() -> list[Plugin]:
    """Return the plug-ins whose names are in the registry."""
    return list(_found.values())


def code_of(*names: str) -> dict[str, str]:
    """Return the SHA-256 of the source files that plug-ins of these names run, by top-level module; {} without any.

    Those are all of a package's, or of a single module its own and those beside it that it has imported.

    Args:
        names: of algorithms and datasets.

    Raises:
        OSError: a file cannot be read.
    """
    classes = [registry.load(plugin.target) for plugin in found() if plugin.name in names]
    return code_of_modules(base.__module__ for cls in classes for base in cls.__mro__)


def code_of_modules(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the source files of other packages' modules, by top-level module.

    Args:
        names: of imported modules; those of this package, DomainBed and the standard library are left out.

    Raises:
        OSError: a file cannot be read.
    """
    modules = {name.partition(".")[0] for name in names} - _NOT_THEIRS
    return {name: _digest(_sources(sys.modules[name])) for name in sorted(modules) if name in sys.modules}


def _sources(module: ModuleType) -> Iterator[Path]:
    """Yield the Python files of a top-level module."""
    if hasattr(module, "__path__"):
        for folder in module.__path__:
            yield from (path for path in Path(folder).rglob("*.py") if path.is_file())
        return
    file = Path(str(module.__file__))
    if file.parent.name in ("site-packages", "dist-packages"):
        yield file
        return
    for other in list(sys.modules.values()):
        origin = getattr(other, "__file__", None)
        if isinstance(origin, str) and Path(origin).parent == file.parent and Path(origin).suffix == ".py":
            yield Path(origin)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def _entry_points() -> list[tuple[metadata.EntryPoint, str]]:
    """Return the entry points of our groups with their distributions, sorted by distribution, group and name."""
    points = []
    for group in GROUPS:
        for point in metadata.entry_points(group=group):
            source = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"
            points.append((point, source))
    return sorted(points, key=lambda pair: (pair[1], pair[0].group, pair[0].name, pair[0].value))


def _try(key: tuple[str, ...], add: Any, *arguments: Any) -> None:
    """Add what a plug-in declares, once; one whose module is still being imported waits for the next search."""
    if key not in _tried:
        try:
            add(*arguments)
        except _NotYet:
            return
        _tried.add(key)


def _add_entry_point(point: metadata.EntryPoint, source: str) -> None:
    plugin = Plugin(GROUPS[point.group], point.name, point.value.partition("[")[0].replace(" ", ""), source)
    try:
        _check_whole(plugin.target.partition(":")[0])
        cls = registry.load(plugin.target)
        if getattr(cls, "__name__", None) != plugin.name:
            raise TypeError(f"the entry point must have the name of its class, {getattr(cls, '__name__', cls)!r}")
    except (Exception, SystemExit) as error:
        if isinstance(error, _NotYet):
            raise
        _rejected[plugin] = _cause(error)
        return
    _add(plugin, cls)


def _add_module(name: str) -> None:
    _check_whole(name)
    source = f"${VARIABLE}"
    try:
        module = _import(name)
        stock = {kind: registry.load(":".join(where)) for kind, where in _STOCK.items()}
        stock["dataset"] = (stock["dataset"], *map(registry.load, _BASES["dataset"][0]))
        classes = [
            (kind, cls)
            for cls in vars(module).values()
            if isinstance(cls, type) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
            for kind, bases in stock.items()
            if issubclass(cls, bases)
        ]
        if not classes:
            raise TypeError(
                "it defines neither an algorithm nor a dataset: no public subclass of "
                "domainbed_reasoning.MLLMAlgorithm or domainbed_reasoning.ReasoningDataset"
            )
    except (Exception, SystemExit) as error:
        _rejected[Plugin("module", "", name, source)] = _cause(error)
        return
    for kind, cls in classes:
        _add(Plugin(kind, cls.__name__, f"{name}:{cls.__name__}", source), cls)


def _import(name: str) -> ModuleType:
    """Import a module by name, also from the working directory, which console scripts do not search."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] or sys.flags.safe_path or os.getcwd() in sys.path or "" in sys.path:
            raise
    sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _check_whole(module: str) -> None:
    """Raise `_NotYet` while a module or one of its parent packages is being imported."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = getattr(sys.modules.get(".".join(parts[:end])), "__spec__", None)
        if getattr(spec, "_initializing", False):
            raise _NotYet


def _add(plugin: Plugin, cls: Any) -> None:
    """Add a class to the registry, or record why not; duplicates of both sources count once."""
    if _TABLES[plugin.kind].get(plugin.name) == plugin.target:
        return
    try:
        _check(plugin, cls)
    except (Exception, SystemExit) as error:  # third-party classes may raise anything, even on attribute access
        _rejected[plugin] = _cause(error)
        return
    _found[plugin.kind, plugin.name] = plugin
    _TABLES[plugin.kind][plugin.name] = plugin.target
    if getattr(cls, "CHAIN_PATH", False):
        registry.READ_CHAINS.add(plugin.name)
        if not cls.LABEL_PATH:
            registry.CHAINS_ALONE.add(plugin.name)
    if plugin.kind == "algorithm" and "clip_model" in cls.HPARAMS:
        registry.ON_CLIP.add(plugin.name)


def _check(plugin: Plugin, cls: Any) -> None:
    """Reject a class of the wrong kind, or with a name that is taken.

    Raises:
        TypeError: of another kind, or with hyper-parameters that are no rows.
        ValueError: the name is taken, or a row does not allow its own default.
    """
    bases, public = _BASES[plugin.kind]
    if not (isinstance(cls, type) and issubclass(cls, tuple(map(registry.load, bases)))):
        raise TypeError(f"it must be a subclass of domainbed_reasoning.{public}")
    if (other := _TABLES[plugin.kind].get(plugin.name)) is not None:
        owner = _found.get((plugin.kind, plugin.name))
        raise ValueError(f"the name is taken by {owner or f'{other} of domainbed-reasoning'}; rename it")
    module = _STOCK[plugin.kind][0]
    there = vars(importlib.import_module(module)).get(plugin.name)
    if there is not None and there is not cls:
        raise ValueError(f"the name is taken by {module}.{plugin.name}; rename it")
    rows = getattr(cls, "HPARAMS", None)
    if not isinstance(rows, Mapping):
        raise TypeError(f"HPARAMS must be a dictionary of domainbed_reasoning.Hparam; got {rows!r:.80}")
    for name, row in rows.items():
        _check_row(name, row)
    if plugin.kind == "algorithm" and (missing := sorted(_needed(cls) - rows.keys())):
        raise ValueError(
            f"HPARAMS lacks {', '.join(missing[:5])}{', …' * (len(missing) > 5)}: extend those of its base class, "
            "{**RDMLDG.HPARAMS, …}"
        )
    if plugin.kind == "dataset" and len(getattr(cls, "ENVIRONMENTS", None) or ()) < 2:
        raise ValueError("ENVIRONMENTS must name at least two domains")


def _check_row(name: Any, row: Any) -> None:
    if not isinstance(name, str) or not isinstance(row, Hparam):
        raise TypeError(f"HPARAMS[{name!r:.80}] must be a domainbed_reasoning.Hparam; got {row!r:.80}")
    if name == "algorithm":
        raise ValueError("HPARAMS must not have 'algorithm', by which a dataset knows its algorithm")
    values = {"default": row.default}
    if callable(row.embedded):
        values |= {f"default on {dataset}": row.default_on(dataset) for dataset in EMBEDDED_DATASETS}
    elif row.embedded is not None:
        values["embedded default"] = row.embedded
    if row.sample is not None:
        import numpy

        drawn = row.sample(numpy.random.RandomState(0))
        values["sample"] = drawn.item() if isinstance(drawn, numpy.generic) else drawn
    for what, value in values.items():
        json.dumps(value)
        if not row.allowed.holds(value):
            raise ValueError(f"the {what} of HPARAMS[{name!r}] must be {row.allowed.words}; got {value!r:.80}")


def _needed(cls: Any) -> set[str]:
    """Return the hyper-parameters that the base class of an algorithm requires."""
    tables = importlib.import_module("domainbed_reasoning.algorithms.hparams")
    needed = set(tables.RESUME_HPARAMS)
    if issubclass(cls, registry.load("domainbed_reasoning.algorithms.trained_mllm:TrainedMLLM")):
        needed |= tables.MODEL_HPARAMS.keys()
        paths = {"LABEL_HPARAMS": cls.LABEL_PATH, "CHAIN_HPARAMS": cls.CHAIN_PATH}
        paths |= {"TRAINING_HPARAMS": cls.LABEL_PATH or cls.CHAIN_PATH}
        paths |= {"BALANCE_HPARAMS": cls.LABEL_PATH and cls.CHAIN_PATH}
        for table, has in paths.items():
            needed |= vars(tables)[table].keys() if has else set()
    return needed


def _cause(error: BaseException) -> str:
    """Return an error as a clause; the messages of our own errors need no type name."""
    text = " ".join(str(error).split())[:400]
    return text if type(error) in (TypeError, ValueError) and text else f"{type(error).__name__}: {text}"
