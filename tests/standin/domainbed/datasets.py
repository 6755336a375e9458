"""Sets of environments, each with its images and labels."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from PIL import ImageFile
from torch.utils.data import TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

ImageFile.LOAD_TRUNCATED_IMAGES = True

DATASETS = ["Debug28", "Debug224", "VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet", "SVIRO"]

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def get_dataset_class(dataset_name: str) -> type:
    """Return the class of that name."""
    try:
        return globals()[dataset_name]
    except KeyError:
        raise NotImplementedError(f"Dataset not found: {dataset_name}") from None


def num_environments(dataset_name: str) -> int:
    """Return how many environments the dataset of that name has."""
    return len(get_dataset_class(dataset_name).ENVIRONMENTS)


class MultipleDomainDataset:
    """A list of environments. A subclass sets ``datasets``, ``input_shape`` and ``num_classes``."""

    N_STEPS, CHECKPOINT_FREQ, N_WORKERS = 5001, 100, 8
    ENVIRONMENTS: list[str] | None = None
    INPUT_SHAPE: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.datasets)

    def __getitem__(self, environment: int) -> Any:
        return self.datasets[environment]


class Debug(MultipleDomainDataset):
    """Three environments of sixteen random images in two classes."""

    ENVIRONMENTS = ["0", "1", "2"]

    def __init__(self, root: str, test_envs: list[int], hparams: dict[str, Any]) -> None:
        self.input_shape, self.num_classes = self.INPUT_SHAPE, 2
        self.datasets = []
        while len(self.datasets) < len(self.ENVIRONMENTS):
            images = torch.randn(16, *self.input_shape)
            self.datasets.append(TensorDataset(images, torch.randint(self.num_classes, (16,))))


class Debug28(Debug):
    """``Debug`` at 28×28."""

    INPUT_SHAPE = (3, 28, 28)


class Debug224(Debug):
    """``Debug`` at 224×224."""

    INPUT_SHAPE = (3, 224, 224)


def evaluation_transform() -> transforms.Compose:
    """Return PIL image to normalized tensor (3, 224, 224)."""
    return transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(**IMAGENET)])


def training_transform() -> transforms.Compose:
    """Return the same with random crop, flip, colors and grey."""
    change = [transforms.RandomResizedCrop(224, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip()]
    change += [transforms.ColorJitter(*4 * [0.3]), transforms.RandomGrayscale()]
    return transforms.Compose([*change, transforms.ToTensor(), transforms.Normalize(**IMAGENET)])


class MultipleEnvironmentImageFolder(MultipleDomainDataset):
    """One image folder an environment, in the alphabetical order of the sub-folders of ``root``."""

    CHECKPOINT_FREQ = 300

    def __init__(self, root: str, test_envs: list[int], augment: bool, hparams: dict[str, Any]) -> None:
        folders = sorted(entry for entry in pathlib.Path(root).iterdir() if entry.is_dir())
        self.datasets = []
        for position, folder in enumerate(folders):
            train = augment and position not in test_envs
            self.datasets.append(ImageFolder(str(folder), training_transform() if train else evaluation_transform()))
        self.input_shape = (3, 224, 224)
        self.num_classes = len(self.datasets[-1].classes)


class _NamedFolder(MultipleEnvironmentImageFolder):
    """An image-folder set whose files lie in ``FOLDER`` below the data directory."""

    FOLDER: str

    def __init__(self, root: str, test_envs: list[int], hparams: dict[str, Any]) -> None:
        super().__init__(str(pathlib.Path(root) / self.FOLDER), test_envs, hparams["data_augmentation"], hparams)


class VLCS(_NamedFolder):
    """Caltech101, LabelMe, SUN09, VOC2007."""

    FOLDER, ENVIRONMENTS = "VLCS", ["C", "L", "S", "V"]


class PACS(_NamedFolder):
    """Art, cartoons, photos, sketches."""

    FOLDER, ENVIRONMENTS = "PACS", ["A", "C", "P", "S"]


class OfficeHome(_NamedFolder):
    """Art, clip art, products, the real world."""

    FOLDER, ENVIRONMENTS = "office_home", ["A", "C", "P", "R"]


class TerraIncognita(_NamedFolder):
    """Four camera traps."""

    FOLDER, ENVIRONMENTS = "terra_incognita", ["L100", "L38", "L43", "L46"]


class DomainNet(_NamedFolder):
    """Six styles."""

    CHECKPOINT_FREQ = 1000
    FOLDER, ENVIRONMENTS = "domain_net", ["clip", "info", "paint", "quick", "real", "sketch"]


class SVIRO(_NamedFolder):
    """The rear seats of ten car models."""

    FOLDER = "sviro"
    ENVIRONMENTS = "aclass escape hilux i3 lexus tesla tiguan tucson x5 zoe".split()
