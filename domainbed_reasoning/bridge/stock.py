"""DomainBed's modules, imported on demand; nothing outside of this folder imports them by name.

Exempt are the base classes of algorithms and datasets, which those files import themselves.
"""

from __future__ import annotations

import importlib
from typing import Any


def algorithms() -> Any:
    """Return `domainbed.algorithms`."""
    return importlib.import_module("domainbed.algorithms")


def datasets() -> Any:
    """Return `domainbed.datasets`."""
    return importlib.import_module("domainbed.datasets")


def hparams_registry() -> Any:
    """Return `domainbed.hparams_registry`."""
    return importlib.import_module("domainbed.hparams_registry")


def misc() -> Any:
    """Return `domainbed.lib.misc`."""
    return importlib.import_module("domainbed.lib.misc")


def model_selection() -> Any:
    """Return `domainbed.model_selection`."""
    return importlib.import_module("domainbed.model_selection")


def reporting() -> Any:
    """Return `domainbed.lib.reporting`."""
    return importlib.import_module("domainbed.lib.reporting")
