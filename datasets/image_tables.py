"""DomainBed-Reasoning on images that a table lists: CSV, TSV, JSON Lines or Parquet, a row an image.

For images that are not in ``<domain>/<class>/`` folders, or of which a part counts. Nothing is copied or linked. A user
describes such a dataset in a TOML file (see `images.user_datasets`), or derives a class from `ReasoningImageTable` in a
module of ``$DOMAINBED_REASONING_PLUGINS``. Columns: see `images.table`. Chains: as in `image_folders`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from domainbed.datasets import MultipleDomainDataset

from domainbed_reasoning.bridge.preflight import check_splits, check_test_envs
from domainbed_reasoning.datasets.base import IMAGE_SHAPE, ImageList
from domainbed_reasoning.datasets.image_folders import ReasoningImageFolder, dataset_folder, sizes_of
from domainbed_reasoning.datasets.reasoning_dataset import to_floats
from domainbed_reasoning.images.table import read_table
from domainbed_reasoning.registry import check_for_dataset


class ImageTableDataset(MultipleDomainDataset):  # type: ignore[misc]
    """Images listed in a table as DomainBed has image folders: resized, augmented and normalized in the same way.

    Class attributes:
        FOLDER: the dataset's folder below ``data_dir``.
        TABLE: the table, a path below the folder.
        COLUMNS: names of columns that are called otherwise than path, label, domain and split.
        SPLITS: values of the split column whose rows count; None takes all rows.
        ENVIRONMENTS: values of the domain column, in DomainBed's order.

    Raises:
        FileNotFoundError: when the folder is not below ``data_dir``.
        ValueError: when the table, target domains, hyper-parameters or splits cannot be used.
    """

    FOLDER: ClassVar[str]
    TABLE: ClassVar[str]
    COLUMNS: ClassVar[Mapping[str, str]] = {}
    SPLITS: ClassVar[tuple[str, ...] | None] = None
    ENVIRONMENTS: ClassVar[list[str]]
    CHECKPOINT_FREQ = 300

    def __init__(self, root: str, test_envs: Collection[int], hparams: dict[str, Any]):
        super().__init__()
        name, twin = type(self).__name__, isinstance(self, ReasoningImageFolder)
        if not twin:  # which checks itself
            check_for_dataset(hparams, {})
            check_test_envs(name, self.ENVIRONMENTS, test_envs)
        folder = dataset_folder(root, self.FOLDER, name)
        table = read_table(folder / self.TABLE, self.ENVIRONMENTS, self.COLUMNS, self.SPLITS)
        augment = hparams["data_augmentation"]
        self.input_shape, self.num_classes = IMAGE_SHAPE, len(table.classes)
        self.datasets = [
            ImageList(
                str(folder),
                environment,
                table.paths[env],
                table.labels[env],
                table.classes,
                to_floats(IMAGE_SHAPE, augment and env not in test_envs),
            )
            for env, environment in enumerate(self.ENVIRONMENTS)
        ]
        if not twin:
            check_splits(name, sizes_of(self.datasets), test_envs, hparams, self.N_WORKERS)


class ReasoningImageTable(ReasoningImageFolder, ImageTableDataset):
    """Images listed in a table, with a five-stage chain for every image.

    Class attributes: those of `ImageTableDataset` and of `ReasoningImageFolder`.
    """

    def open_images(self, root: str, test_envs: Collection[int], hparams: dict[str, Any]) -> pathlib.Path:
        """Open the table; return the dataset's folder."""
        ImageTableDataset.__init__(self, root, test_envs, hparams)
        return dataset_folder(root, self.FOLDER, type(self).__name__)
