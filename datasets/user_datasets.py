"""Dataset classes for the user's image folders and tables (see `images.user_datasets`), three each.

Input, labels, domains, counts and license are the user's; chains as in `image_folders`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from domainbed import datasets as stock

from domainbed_reasoning.bridge.preflight import check_splits, check_test_envs
from domainbed_reasoning.datasets.base_to_new import BaseToNew
from domainbed_reasoning.datasets.image_folders import (
    ReasoningImageFolder,
    check_classes,
    dataset_folder,
    empty_classes_named,
    sizes_of,
)
from domainbed_reasoning.datasets.image_tables import ImageTableDataset, ReasoningImageTable
from domainbed_reasoning.images.catalog import ImageFolder, check_domain_order
from domainbed_reasoning.images.user_datasets import DatasetFileError, usable_datasets
from domainbed_reasoning.registry import BASE_TO_NEW, check_for_dataset


def make_classes(dataset: ImageFolder) -> tuple[type, type]:
    """Return the classes ``<Name>``, as DomainBed's own for baselines, and ``<Name>Reasoning``."""
    if dataset.table is not None:
        return _table_classes(dataset)

    def __init__(self: Any, root: str, test_envs: Collection[int], hparams: dict[str, Any]) -> None:
        name, twin = type(self).__name__, isinstance(self, ReasoningImageFolder)
        if not twin:
            check_for_dataset(hparams, {})
            check_test_envs(name, dataset.environments, test_envs)
        folder = dataset_folder(root, dataset.folder, name, len(dataset.environments))
        if problem := check_domain_order(dataset, sorted(entry.name for entry in folder.iterdir() if entry.is_dir())):
            raise ValueError(problem)
        self.dir = os.path.join(root, dataset.folder + "/")
        with empty_classes_named(root, dataset.folder, name):
            augment = hparams["data_augmentation"]
            stock.MultipleEnvironmentImageFolder.__init__(self, self.dir, test_envs, augment, hparams)
        if not twin:  # the twin has its own checks
            check_classes(self.datasets, folder)
            check_splits(name, sizes_of(self.datasets), test_envs, hparams, self.N_WORKERS)

    plain = type(
        dataset.name,
        (stock.MultipleEnvironmentImageFolder,),
        {
            "__init__": __init__,
            "__doc__": f"Image folders of {dataset.folder}/, described by the user.",
            "__module__": __name__,
            "CHECKPOINT_FREQ": dataset.checkpoint_freq,
            "ENVIRONMENTS": list(dataset.environments),
        },
    )
    reasoning = type(
        f"{dataset.name}Reasoning",
        (ReasoningImageFolder, plain),
        {
            "__doc__": f"{dataset.name} with a five-stage chain for every image.",
            "__module__": __name__,
            "FOLDER": dataset.folder,
            "SUBJECT": dataset.subject,
            "READABLE": dataset.readable,
            "BUNDLE": dataset.bundle,
        },
    )
    return plain, reasoning


def _table_classes(dataset: ImageFolder) -> tuple[type, type]:
    attributes = {
        "__module__": __name__,
        "CHECKPOINT_FREQ": dataset.checkpoint_freq,
        "ENVIRONMENTS": list(dataset.environments),
        "FOLDER": dataset.folder,
        "TABLE": dataset.table,
        "COLUMNS": dataset.columns,
        "SPLITS": dataset.splits,
    }
    doc = f"Images listed in {dataset.folder}/{dataset.table}, described by the user."
    plain = type(dataset.name, (ImageTableDataset,), {"__doc__": doc, **attributes})
    of_chains = {"SUBJECT": dataset.subject, "READABLE": dataset.readable, "BUNDLE": dataset.bundle}
    doc = f"{dataset.name} with a five-stage chain for every image."
    return plain, type(
        f"{dataset.name}Reasoning", (ReasoningImageTable, plain), {"__doc__": doc, **attributes, **of_chains}
    )


def base_to_new_class(dataset: ImageFolder) -> type:
    """Return the class ``<Name>BaseToNew``, whose environments are the base and the new classes."""
    attributes = {
        "__doc__": f"{dataset.name}, trained on half of its classes and tested on the other half.",
        "__module__": __name__,
        "CHECKPOINT_FREQ": dataset.checkpoint_freq,
        "FOLDER": dataset.folder,
        "SUBJECT": dataset.subject,
        "READABLE": dataset.readable,
        "BUNDLE": dataset.bundle,
        "TABLE": dataset.table,
        "COLUMNS": dataset.columns,
        "SPLITS": dataset.splits,
        "DOMAINS": dataset.environments,
    }
    return type(f"{dataset.name}{BASE_TO_NEW}", (BaseToNew,), attributes)


PROBLEMS: dict[str, DatasetFileError] = {}  # of datasets for which no class could be created

for _dataset in usable_datasets()[0].values():
    for _class in (*make_classes(_dataset), base_to_new_class(_dataset)):
        if _class.__name__ in globals():
            assert _dataset.file is not None
            _problem = f"the name {_class.__name__!r} is used by this package; choose another"
            PROBLEMS[_dataset.name] = DatasetFileError(_dataset.file, _problem)
        else:
            globals()[_class.__name__] = _class
