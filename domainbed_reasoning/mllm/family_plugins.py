"""Entries of the table of families that other packages register, as entry points of one group.

An entry point is named after the model class (``architectures`` in config.json), and its value is a `Family`. Entries
of this package come first, then entry points sorted by distribution; of two entries for one architecture the later is
left out with a warning that names both. What an entry states is probed as for any architecture, see `trials`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from domainbed_reasoning.mllm.families import FAMILIES, TREES, Family
from domainbed_reasoning.terminal import get_logger

GROUP = "domainbed_reasoning.model_families"
_log = get_logger(__name__)


@dataclass(frozen=True)
class FamilyPlugin:
    """An entry from another package.

    Attributes:
        architecture: name of the model class.
        target: ``"module:name"``.
        source: the distribution with its version.
        family: the entry; None if it cannot be used.
        problem: why it is left out, as a sentence without its period; empty if it can be used.
    """

    architecture: str
    target: str
    source: str
    family: Family | None = None
    problem: str = ""

    def __str__(self) -> str:
        """Name the architecture and where its entry comes from."""
        return f"model family {self.architecture} ({self.target} of {self.source})"


_used: set[str] = set()  # modules of the entries that this process has used


@functools.cache
def discover() -> tuple[FamilyPlugin, ...]:
    """Load the entry points, once; one that fails keeps nothing else from working."""
    points = [(f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution", point)
              for point in metadata.entry_points(group=GROUP)]  # fmt: skip
    plugins: list[FamilyPlugin] = []
    for source, point in sorted(points, key=lambda pair: (pair[0], pair[1].name, pair[1].value)):
        found = FamilyPlugin(point.name, point.value.replace(" ", ""), source)
        try:
            family = point.load()
            _check(found, family, plugins)
        except (Exception, SystemExit) as error:  # a plug-in may raise anything at import
            text = " ".join(str(error).split())[:400]
            problem = text if type(error) in (TypeError, ValueError) else f"{type(error).__name__}: {text}"
            plugins.append(FamilyPlugin(found.architecture, found.target, source, problem=problem))
        else:
            plugins.append(FamilyPlugin(found.architecture, found.target, source, family))
    return tuple(plugins)


def entry_of(architecture: str) -> FamilyPlugin | None:
    """Return the entry that another package has registered for an architecture; warns of those left out."""
    _warn()
    for plugin in discover():
        if plugin.architecture == architecture and plugin.family is not None:
            _used.add(plugin.target.partition(":")[0])
            return plugin
    return None


def used_modules() -> set[str]:
    """Return the modules whose entries models in this process were loaded with."""
    return set(_used)


@functools.cache
def _warn() -> None:
    for plugin in discover():
        if plugin.problem:
            _log.warning("WARNING: the plug-in %s is left out: %s.", plugin, plugin.problem)


def _check(plugin: FamilyPlugin, family: Any, earlier: list[FamilyPlugin]) -> None:
    """Reject a value that is not a complete entry, or whose architecture is taken.

    Raises:
        TypeError: if it is not a `Family`, or a field has another type.
        ValueError: if the architecture or the name is taken, or a field has an unknown value.
    """
    if plugin.architecture in FAMILIES:
        owner = f"{FAMILIES[plugin.architecture].name} of domainbed-reasoning"
        raise ValueError(f"the architecture is taken by {owner}")
    for other in earlier:
        if other.architecture == plugin.architecture and other.family is not None:
            raise ValueError(f"the architecture is taken by {other}")
    if not isinstance(family, Family):
        raise TypeError(f"it must be a domainbed_reasoning.Family; got {family!r:.80}")
    for name in ("name", "example"):
        value = getattr(family, name)
        if not isinstance(value, str) or not value.strip():
            raise TypeError(f"{name} must be a non-empty string; got {value!r:.80}")
    if family.name in {own.name for own in FAMILIES.values()}:
        raise ValueError(f"the name {family.name!r} is taken by domainbed-reasoning's own entry; rename it")
    for name in ("tile_edge", "image_settings", "image_tokens"):
        if not callable(getattr(family, name)):
            raise TypeError(f"{name} must be a function; got {getattr(family, name)!r:.80}")
    if family.tree not in TREES:
        raise ValueError(f"tree must be {', '.join(map(repr, TREES))}; got {family.tree!r:.80}")
    if family.findings is not None:
        raise ValueError("findings must be None: they come from probing the model")
