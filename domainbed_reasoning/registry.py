"""Names to classes, and the tables of hyper-parameters. Standard library only: the import hook reads it.

`bridge.plugins` adds the names of the user's own algorithms and datasets to the tables.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from domainbed_reasoning.hparam_checks import FLAG, Allowed, check_values, integer

ALGORITHMS = {
    "MLLMZeroShot": "domainbed_reasoning.algorithms.zero_shot:MLLMZeroShot",
    "LabelSFT": "domainbed_reasoning.algorithms.label_sft:LabelSFT",
    "ReasoningSFT": "domainbed_reasoning.algorithms.reasoning_sft:ReasoningSFT",
    "MTCT": "domainbed_reasoning.algorithms.mtct:MTCT",
    "SARR": "domainbed_reasoning.algorithms.sarr:SARR",
    "RDMLDG": "domainbed_reasoning.algorithms.rd_mldg:RDMLDG",
    "CLIPZeroShot": "domainbed_reasoning.algorithms.clip_zero_shot:CLIPZeroShot",
    "CLIPLoRA": "domainbed_reasoning.algorithms.clip_lora:CLIPLoRA",
}

# What a dataset prepares before its algorithm exists: teacher chains, and images at the resolution of the model.
READ_CHAINS = {"ReasoningSFT", "MTCT", "SARR", "RDMLDG"}
CHAINS_ALONE = {"ReasoningSFT", "SARR"}  # whose supervised stage has no label term
ON_CLIP = {"CLIPZeroShot", "CLIPLoRA"}

DATASETS = {
    "VLCSReasoning": "domainbed_reasoning.datasets.image_folders:VLCSReasoning",
    "PACSReasoning": "domainbed_reasoning.datasets.image_folders:PACSReasoning",
    "OfficeHomeReasoning": "domainbed_reasoning.datasets.image_folders:OfficeHomeReasoning",
    "TerraIncognitaReasoning": "domainbed_reasoning.datasets.image_folders:TerraIncognitaReasoning",
    "DomainNetReasoning": "domainbed_reasoning.datasets.image_folders:DomainNetReasoning",
    "SVIROReasoning": "domainbed_reasoning.datasets.image_folders:SVIROReasoning",
    "ShapesReasoning": "domainbed_reasoning.datasets.shapes:ShapesReasoning",
    "ClearCreaturesReasoning": "domainbed_reasoning.datasets.creatures:ClearCreaturesReasoning",
    "CamouflagedCreaturesReasoning": "domainbed_reasoning.datasets.creatures:CamouflagedCreaturesReasoning",
    "VLCSBaseToNew": "domainbed_reasoning.datasets.base_to_new:VLCSBaseToNew",
    "PACSBaseToNew": "domainbed_reasoning.datasets.base_to_new:PACSBaseToNew",
    "OfficeHomeBaseToNew": "domainbed_reasoning.datasets.base_to_new:OfficeHomeBaseToNew",
    "TerraIncognitaBaseToNew": "domainbed_reasoning.datasets.base_to_new:TerraIncognitaBaseToNew",
    "DomainNetBaseToNew": "domainbed_reasoning.datasets.base_to_new:DomainNetBaseToNew",
    "SVIROBaseToNew": "domainbed_reasoning.datasets.base_to_new:SVIROBaseToNew",
    "ClearCreaturesBaseToNew": "domainbed_reasoning.datasets.base_to_new:ClearCreaturesBaseToNew",
}
BASE_TO_NEW = "BaseToNew"  # how the names of datasets end whose environments are base and new classes


def plain_name(dataset: str) -> str:
    """Return the name of a dataset without ``Reasoning`` or ``BaseToNew``."""
    return dataset.removesuffix("Reasoning").removesuffix(BASE_TO_NEW)


# The stock dataset whose hyper-parameters a baseline gets on ours: what ERM gets on PACS it gets on PACSReasoning.
TWINS = {
    "VLCSReasoning": "VLCS",
    "PACSReasoning": "PACS",
    "OfficeHomeReasoning": "OfficeHome",
    "TerraIncognitaReasoning": "TerraIncognita",
    "DomainNetReasoning": "DomainNet",
    "SVIROReasoning": "SVIRO",
    "ShapesReasoning": "Debug28",
    "ClearCreaturesReasoning": "Debug28",
    "CamouflagedCreaturesReasoning": "Debug28",
    "VLCSBaseToNew": "VLCS",
    "PACSBaseToNew": "PACS",
    "OfficeHomeBaseToNew": "OfficeHome",
    "TerraIncognitaBaseToNew": "TerraIncognita",
    "DomainNetBaseToNew": "DomainNet",
    "SVIROBaseToNew": "SVIRO",
    "ClearCreaturesBaseToNew": "Debug28",
}

# Datasets on which an embedded model is the default, and which.
EMBEDDED_MODELS = {
    "Debug28": "tiny",
    "Debug224": "tiny",
    "ShapesReasoning": "tiny",
    "ClearCreaturesReasoning": "tiny-creatures",
    "CamouflagedCreaturesReasoning": "tiny-creatures",
    "ClearCreaturesBaseToNew": "tiny-creatures",
}
EMBEDDED_DATASETS = frozenset(EMBEDDED_MODELS)

LAUNCHERS = {
    "parallel": "domainbed_reasoning.sweeps.launchers.parallel:parallel_launcher",
    "ray": "domainbed_reasoning.sweeps.launchers.ray:ray_launcher",
    "slurm": "domainbed_reasoning.sweeps.launchers.slurm:slurm_launcher",
    "forked": "domainbed_reasoning.sweeps.launchers.forked:forked_launcher",
}


@dataclass(frozen=True)
class Hparam:
    """One hyper-parameter of an algorithm.

    Attributes:
        default: value for DomainBed's ``hparams_seed`` 0, plain Python, JSON-serializable.
        sample: draws a value from a ``numpy.random.RandomState`` for random search; None keeps the default.
        source: where the default comes from.
        embedded: default on the embedded datasets, or a function from a dataset's name to it; None means ``default``.
        allowed: what it may be.
    """

    default: Any
    sample: Callable[[Any], Any] | None
    source: str
    embedded: Any = None
    allowed: Allowed = field(kw_only=True)

    def default_on(self, dataset: str) -> Any:
        """Return the default value on the dataset of that name."""
        if self.embedded is None or dataset not in EMBEDDED_DATASETS:
            return self.default
        return self.embedded(dataset) if callable(self.embedded) else self.embedded

    def drawn_on(self, dataset: str, drawn: Any) -> Any:
        """Return a draw of ``sample`` for a dataset: as many times its default as the draw is of ``default``."""
        default = self.default_on(dataset)
        if type(default) not in (int, float) or default == self.default:
            return drawn
        scaled = drawn * default / self.default
        return max(1, round(scaled)) if isinstance(default, int) else scaled


# What every baseline gets on a dataset instead of its twin's: rendered datasets are small (a batch is per domain, and
# one that is larger than a domain's training split would never fill).
_OF_RENDERED = {
    "batch_size": Hparam(
        16, lambda random: int(2 ** random.uniform(3, 5)), "the size of its domains", allowed=integer(1)
    ),
}
RENDERED = ("ShapesReasoning", "ClearCreaturesReasoning", "CamouflagedCreaturesReasoning", "ClearCreaturesBaseToNew")
BASELINE_HPARAMS = dict.fromkeys(RENDERED, _OF_RENDERED)

# What DomainBed's own code reads, whatever the algorithm: train.py, and the stock datasets.
STOCK_CODE_HPARAMS = {
    "data_augmentation": Hparam(True, None, "DomainBed", allowed=FLAG),
    "class_balanced": Hparam(False, None, "DomainBed", allowed=FLAG),
}
OF_ANY_DATASET = STOCK_CODE_HPARAMS | {"batch_size": Hparam(32, None, "DomainBed", allowed=integer(1))}


def rows_of(algorithm: str | None = None) -> dict[str, Hparam]:
    """Return the row of every hyper-parameter that an algorithm or dataset of ours, or DomainBed's own code, reads.

    Args:
        algorithm: whose own row counts where several have one of that name.
    """
    rows = dict(OF_ANY_DATASET)
    for target in [*DATASETS.values(), *ALGORITHMS.values()]:
        with suppress(Exception):  # import errors are reported at registration
            rows |= load(target).HPARAMS
    return rows | (load(ALGORITHMS[algorithm]).HPARAMS if algorithm in ALGORITHMS else {})


def check_for_dataset(hparams: Mapping[str, Any], dataset_rows: Mapping[str, Hparam]) -> None:
    """Refuse values that a dataset of ours, or the algorithm of ours that will run on it, could not use.

    Of a baseline only what the dataset and DomainBed's own code read is checked; the rest is the baseline's.

    Args:
        hparams: what the dataset was built with.
        dataset_rows: of its hyper-parameters.

    Raises:
        ValueError: naming the hyper-parameter, what it may be, and the value.
    """
    algorithm = hparams.get("algorithm")
    ours = isinstance(algorithm, str) and algorithm in ALGORITHMS
    check_values(hparams, rows_of(algorithm) if ours else OF_ANY_DATASET | dict(dataset_rows))


def load(target: str) -> Any:
    """Return what ``"module:name"`` stands for."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a ``name`` that is none of the ``known``, with the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"Unknown {kind} {name!r}.{hint} Available: {', '.join(names)}.")
