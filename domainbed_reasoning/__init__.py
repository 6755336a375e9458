"""RD-MLDG as a plug-in of stock DomainBed.

The names in ``__all__`` are the public interface: they stay, and so does what their docstrings say. Each is imported
when it is first used, so that ``import domainbed_reasoning`` stays free of torch.
"""

import importlib as _importlib
import pathlib as _pathlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout `algorithms/`, `datasets/` and `sweeps/` stand beside this package; installed, they are inside of it.
_root = _pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "algorithms").is_dir():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from domainbed_reasoning.algorithms.base import MLLMAlgorithm
    from domainbed_reasoning.algorithms.rd_mldg import RDMLDG
    from domainbed_reasoning.chains.rules import Rules
    from domainbed_reasoning.datasets.reasoning_dataset import ReasoningDataset
    from domainbed_reasoning.images.chains_of import chains_of
    from domainbed_reasoning.jobs.predict import load_job
    from domainbed_reasoning.mllm import load_mllm
    from domainbed_reasoning.mllm.families import Family
    from domainbed_reasoning.registry import Hparam
    from domainbed_reasoning.results import collect, summarize

__all__ = [
    "RDMLDG",
    "Family",
    "Hparam",
    "MLLMAlgorithm",
    "ReasoningDataset",
    "Rules",
    "chains_of",
    "collect",
    "load_job",
    "load_mllm",
    "summarize",
]

_MODULES = {
    "MLLMAlgorithm": "algorithms.base",
    "RDMLDG": "algorithms.rd_mldg",
    "Rules": "chains.rules",
    "ReasoningDataset": "datasets.reasoning_dataset",
    "chains_of": "images.chains_of",
    "load_job": "jobs.predict",
    "load_mllm": "mllm",
    "Family": "mllm.families",
    "Hparam": "registry",
    "collect": "results",
    "summarize": "results",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
