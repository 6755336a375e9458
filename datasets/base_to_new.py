"""Base-to-new generalization: trained on half of a dataset's classes, tested on the other half.

A dataset has two environments, ``base`` and ``new``: the images of the first half of its classes in label order (of 7,
four), and those of the others, from all of its domains. That is the split of CoOp and its successors (Zhou et al., CVPR
2022, arXiv 2203.05557); the paper (arXiv 2602.23777) does not publish its own. Each environment's questions offer its
own classes. With ``--test_envs 1``, images and chains of new classes never reach training; DomainBed's target accuracy
is that of the new classes, and its training-domain validation accuracy that of the base classes.

Labels are those of the whole dataset, so a network without class names, such as ERM, has no way to name a new class.
"""

from __future__ import annotations

import pathlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from domainbed.datasets import MultipleDomainDataset
from PIL import Image

from domainbed_reasoning.datasets.base import IMAGE_SHAPE, ImageList
from domainbed_reasoning.datasets.creatures import ClearCreaturesReasoning
from domainbed_reasoning.datasets.image_folders import ReasoningImageFolder, dataset_folder
from domainbed_reasoning.datasets.reasoning_dataset import to_floats
from domainbed_reasoning.images import creatures
from domainbed_reasoning.images.catalog import STOCK, ImageFolder, scan
from domainbed_reasoning.images.paths import Paths

ENVIRONMENTS = ["base", "new"]


def halves(num_classes: int) -> tuple[range, range]:
    """Return the labels of the base and of the new classes: of 7 classes, 0 to 3 and 4 to 6."""
    half = -(-num_classes // 2)
    return range(half), range(half, num_classes)


class BaseToNew(ReasoningImageFolder, MultipleDomainDataset):  # type: ignore[misc]
    """The images of an image-folder dataset, grouped by base and new classes instead of domains.

    Class attributes: those of `ReasoningImageFolder`, and
        TABLE, COLUMNS, SPLITS: of a dataset whose images a table lists, see `ImageTableDataset`.
        DOMAINS: values of the table's domain column.

    Raises:
        ValueError: if there are fewer than two classes; otherwise as `ReasoningImageFolder`.
    """

    ENVIRONMENTS = ENVIRONMENTS
    CHECKPOINT_FREQ = 300
    TABLE: ClassVar[str | None] = None
    COLUMNS: ClassVar[Mapping[str, str]] = {}
    SPLITS: ClassVar[tuple[str, ...] | None] = None
    DOMAINS: ClassVar[Sequence[str]] = ()

    def open_images(self, root: str, test_envs: Collection[int], hparams: dict[str, Any]) -> pathlib.Path:
        """List the images of every environment; return the dataset's folder."""
        MultipleDomainDataset.__init__(self)
        name = type(self).__name__
        folder = dataset_folder(root, self.FOLDER, name)
        domains = tuple(self.DOMAINS)
        layout = ImageFolder(name, self.FOLDER, domains, table=self.TABLE, columns=self.COLUMNS, splits=self.SPLITS)
        found = scan(layout, root)
        if len(found.classes) < 2:
            raise ValueError(f"{name}: {folder} has {len(found.classes)} class, but base and new classes need two.")
        labels = found.labels()
        self.input_shape, self.num_classes = IMAGE_SHAPE, len(found.classes)
        self.datasets = []
        for env, own in enumerate(halves(self.num_classes)):
            paths = Paths(picture.path for picture in found.pictures if labels[picture.path] in own)
            targets = array("i", (labels[path] for path in paths))
            transform = to_floats(IMAGE_SHAPE, hparams["data_augmentation"] and env not in test_envs)
            self.datasets.append(ImageList(str(folder), ENVIRONMENTS[env], paths, targets, found.classes, transform))
        return folder

    def offered(self, num_classes: int) -> Sequence[Sequence[int]]:
        """Return the labels of base and new classes."""
        return halves(num_classes)


class VLCSBaseToNew(BaseToNew):
    """VLCSBaseToNew: VLCS, trained on three of its classes and tested on the other two.

    Input, images, license and chains: those of `VLCSReasoning`, from all domains.
    Domains: base (bird, car, chair), new (dog, person).
    """

    FOLDER = "VLCS"


class PACSBaseToNew(BaseToNew):
    """PACSBaseToNew: PACS, trained on four of its classes and tested on the other three.

    Input, images, license and chains: those of `PACSReasoning`, from all domains.
    Domains: base (dog, elephant, giraffe, guitar), new (horse, house, person).
    """

    FOLDER = "PACS"
    BUNDLE = STOCK["PACS"].bundle


class OfficeHomeBaseToNew(BaseToNew):
    """OfficeHomeBaseToNew: Office-Home, trained on 33 of its classes and tested on the other 32.

    Input, images, license and chains: those of `OfficeHomeReasoning`, from all domains.
    Domains: base (the first 33 classes by name), new (the others).
    """

    FOLDER = "office_home"
    READABLE = STOCK["OfficeHome"].readable


class TerraIncognitaBaseToNew(BaseToNew):
    """TerraIncognitaBaseToNew: Terra Incognita, trained on five of its classes and tested on the other five.

    Input, images, license and chains: those of `TerraIncognitaReasoning`, from all locations.
    Domains: base (the first five classes by name), new (the others).
    """

    FOLDER = "terra_incognita"


class DomainNetBaseToNew(BaseToNew):
    """DomainNetBaseToNew: DomainNet, trained on 173 of its classes and tested on the other 172.

    Input, images, license and chains: those of `DomainNetReasoning`, from all domains.
    Domains: base (the first 173 classes by name), new (the others).
    """

    FOLDER = "domain_net"


class SVIROBaseToNew(BaseToNew):
    """SVIROBaseToNew: SVIRO, trained on four of its classes and tested on the other three.

    Input, images, license and chains: those of `SVIROReasoning`, from all cars.
    Domains: base (empty seat, infant, child, adult), new (everyday object, empty infant seat, empty child seat).
    """

    FOLDER = "sviro"
    READABLE = STOCK["SVIRO"].readable


class ClearCreaturesBaseToNew(ClearCreaturesReasoning):
    """ClearCreaturesBaseToNew: the rendered creatures, trained on six classes and tested on the other six.

    Input, license and chains: those of `ClearCreaturesReasoning`. The embedded model knows the names of all classes.
    Domains: base and new; 480 images each (80 per class), 960 in all, from the four styles.
    """

    ENVIRONMENTS = ENVIRONMENTS
    OFFERED = halves(len(ClearCreaturesReasoning.CLASS_NAMES))

    def labels(self, env: int) -> list[int]:
        """Return the class of every image of an environment: style by style, the classes in turn."""
        return [label for _ in creatures.DOMAINS for _ in range(self.per_class(env)) for label in self.OFFERED[env]]

    def picture(self, env: int, index: int) -> Image.Image:
        """Return an image of an environment."""
        return super().picture(*self._rendered(env, index))

    def chain(self, env: int, index: int) -> str | None:
        """Return the renderer's chain of an image; None if its conclusion is wrong and chains are verified."""
        return super().chain(*self._rendered(env, index))

    def _rendered(self, env: int, index: int) -> tuple[int, int]:
        """Return the style of an image and its index in that style."""
        offered = self.OFFERED[env]
        style, place = divmod(index, self.per_class(env) * len(offered))
        copy, position = divmod(place, len(offered))
        return style, copy * len(self.CLASS_NAMES) + offered[position]
