"""Image-folder datasets: their descriptions, and scans of their folders.

A dataset has DomainBed's layout, ``<data_dir>/<folder>/<domain>/<class>/…``: sub-folders in sorted order are the
domains, their sub-folders in sorted order the classes, with all images below; or a table in its folder lists them (see
`table`). Needs neither torch nor DomainBed.

All stock datasets use the published q_cls prompt, "What type of object is in this photo?": another noun for camera
traps or car seats would change the paper's prompt. A user's dataset may set its ``subject``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from domainbed_reasoning.chains.image_names import composed
from domainbed_reasoning.chains.prompts import readable_name
from domainbed_reasoning.images.table import read_table

# The extensions that torchvision's ImageFolder reads.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Default location of a dataset's chains: <data_dir>/<folder>/reasoning.jsonl.
CHAIN_FILE = "reasoning.jsonl"


@dataclass(frozen=True)
class ImageFolder:
    """A dataset in DomainBed's image-folder layout.

    Attributes:
        name: of the DomainBed dataset class.
        folder: below ``--data_dir``.
        environments: DomainBed's short names of the domains, in the order of the sorted sub-folders.
        domains: images per domain folder as published; None for a count that is not published. Empty: any domains.
        classes: class folders in sorted order as published; empty: unknown.
        num_classes: number of classes as published; None: any number.
        subject: the noun of the question; "object", as published, for every stock dataset.
        readable: class folder → name for prompts, where `prompts.readable_name` would not do.
        other_totals: (number of images, description) of other copies of the dataset.
        website: its homepage.
        obtain: how to obtain it, in words.
        bundle: chains that come with it, see `chains.bundled`; None without any.
        checkpoint_freq: DomainBed's steps between two evaluations.
        file: the user's TOML file that describes it; None for a stock dataset.
        table: of the images, a path below the folder; None for class folders. See `table.read_table`, also for what
            follows.
        columns: of the table, where they are called otherwise.
        splits: whose rows count; None for all.
    """

    name: str
    folder: str
    environments: tuple[str, ...]
    domains: Mapping[str, int | None] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    num_classes: int | None = None
    subject: str = "object"
    readable: Mapping[str, str] = field(default_factory=dict)
    other_totals: tuple[tuple[int, str], ...] = ()
    website: str = ""
    obtain: str = ""
    bundle: str | None = None
    checkpoint_freq: int = 300
    file: Path | None = None
    table: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] | None = None

    @property
    def total(self) -> int | None:
        """Number of images as published; None if it is not known for every domain."""
        counts = list(self.domains.values())
        return sum(filter(None, counts)) if counts and None not in counts else None

    def class_names(self, folders: Sequence[str]) -> tuple[str, ...]:
        """Return the names of class folders in prompts."""
        return class_names(folders, self.readable)


def class_names(folders: Sequence[str], readable: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names that prompts give to class folders, in composed Unicode form.

    Args:
        folders: in label order.
        readable: names of folders for which `prompts.readable_name` would not do.
    """
    names = {composed(folder): name for folder, name in readable.items()}
    return tuple(composed(names.get(form, readable_name(form))) for form in map(composed, folders))


@dataclass(frozen=True, slots=True)
class Picture:
    """An image on disk: its path below the dataset's folder (with ``/``), and its domain and class folders."""

    path: str
    domain: str
    label: str


@dataclass(frozen=True)
class FolderScan:
    """The contents of a dataset's folder.

    Attributes:
        root: the dataset's folder.
        domains: its sub-folders, sorted.
        classes: sub-folders of any domain, sorted.
        pictures: every image, in DomainBed's order (domain, class, path; of a table: domain, row).
        missing: (domain, class) pairs without a folder or images, for which DomainBed assigns wrong labels or fails.
    """

    root: Path
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]
    missing: tuple[tuple[str, str], ...]

    def per_domain(self) -> Counter[str]:
        """Return the number of images per domain."""
        return Counter(picture.domain for picture in self.pictures)

    def labels(self) -> dict[str, int]:
        """Return the label of every image by its path."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return {picture.path: numbers[picture.label] for picture in self.pictures}


def scan(dataset: ImageFolder, data_dir: str | os.PathLike[str]) -> FolderScan:
    """Return the contents of the dataset's folder below ``data_dir``.

    Raises:
        FileNotFoundError: if the folder is missing or has no domains; the message says how to obtain the dataset.
    """
    root = Path(data_dir) / dataset.folder
    obtain = dataset.obtain or "Set --data_dir to its parent folder."
    if not root.is_dir():
        raise FileNotFoundError(f"{dataset.name} not found: {root} does not exist. {obtain}")
    if dataset.table is not None:
        return _scan_table(dataset, root)
    domains = _folders(root)
    if not domains:
        raise FileNotFoundError(f"{dataset.name} not found: {root} has no domain folders. {obtain}")
    found = {domain: {composed(label): label for label in _folders(root / domain)} for domain in domains}
    spelt = {form: label for labels in reversed(found.values()) for form, label in labels.items()}
    classes = sorted(spelt.values())
    pictures: list[Picture] = []
    missing = []
    for domain in domains:
        for label in classes:
            paths = _pictures_below(root / domain / found[domain].get(composed(label), label), len(str(root)) + 1)
            if not paths:
                missing.append((domain, label))
            pictures += [Picture(path, domain, label) for path in paths]
    return FolderScan(root, tuple(domains), tuple(classes), tuple(pictures), tuple(missing))


def _scan_table(dataset: ImageFolder, root: Path) -> FolderScan:
    table = read_table(root / str(dataset.table), dataset.environments, dataset.columns, dataset.splits)
    pictures = tuple(
        Picture(path, domain, table.classes[label])
        for domain, paths, labels in zip(dataset.environments, table.paths, table.labels, strict=True)
        for path, label in zip(paths, labels, strict=True)
    )
    return FolderScan(root, dataset.environments, table.classes, pictures, ())


def check_domain_order(dataset: ImageFolder, domains: Sequence[str]) -> str | None:
    """Return an error if a user's dataset lists its domains in another order than their folders; else None.

    Args:
        dataset: its short names may differ from the folders'; only equal ones are compared.
        domains: its domain folders, sorted.
    """
    if dataset.file is None or dataset.table is not None or len(domains) != len(dataset.environments):
        return None
    folders = [domain.lower() for domain in domains]
    for place, name in enumerate(dataset.environments):
        if name.lower() in folders and folders[place] != name.lower():
            listed, found = ", ".join(dataset.environments), ", ".join(domains)
            return (
                f"{dataset.file}: 'environments' lists {listed}, the sorted domain folders are {found}: {name!r} "
                f"would label {domains[place]!r}. List the domains in the order of their folders."
            )
    return None


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _pictures_below(folder: Path, root: int) -> list[str]:
    """Return the paths of the images in a folder without their first ``root`` characters, sorted part by part."""
    found = [
        f"{place}{os.sep}{name}"[root:].replace(os.sep, "/")
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_EXTENSIONS)
    ]
    return sorted(found, key=lambda path: path.split("/"))


_DOWNLOAD = (
    "Download it with DomainBed's script, from inside a clone: "
    "`python -c \"from domainbed.scripts import download; download.download_{}('DIR')\"`"
)
_GET = "`domainbed-reasoning get-data {} --from hub:{} --data-dir DIR`."

# Counts: the totals of PACS, VLCS, OfficeHome, TerraIncognita (the older 24,788) and DomainNet are those that surveys
# of domain generalization list; OfficeHome 15,588 also the Hub's copies. TerraIncognita per domain: khanrc/miro issue
# 9, whose link to 24,330 for today's download is also DomainBed issue 58. Per-domain counts of PACS, VLCS, OfficeHome
# and DomainNet (cleaned version) are those commonly printed and add up to the totals; they were not checked against
# the archives. SVIRO: its commonly printed total; the meaning of its classes from its own website.
STOCK = {
    "PACS": ImageFolder(
        name="PACS",
        folder="PACS",
        environments=("A", "C", "P", "S"),
        domains={"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
        classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
        num_classes=7,
        bundle="PACS",
        website="https://dali-dl.github.io/project_iccv2017.html",
        obtain=_DOWNLOAD.format("pacs") + "; or the Hub's copy: " + _GET.format("PACS", "flwrlabs/pacs"),
    ),
    "VLCS": ImageFolder(
        name="VLCS",
        folder="VLCS",
        environments=("C", "L", "S", "V"),
        domains={"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376},
        classes=("bird", "car", "chair", "dog", "person"),
        num_classes=5,
        website="https://www.mathcs.emory.edu/~torralba/research/bias/",
        obtain=_DOWNLOAD.format("vlcs") + ".",
    ),
    "OfficeHome": ImageFolder(
        name="OfficeHome",
        folder="office_home",
        environments=("A", "C", "P", "R"),
        domains={"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
        num_classes=65,
        readable={"TV": "TV", "Flipflops": "flip-flops", "Postit_Notes": "post-it notes", "ToothBrush": "toothbrush"},
        website="https://www.hemanthdv.org/officeHomeDataset.html",
        obtain=_DOWNLOAD.format("office_home")
        + "; or the Hub's copy: "
        + _GET.format("OfficeHome", "flwrlabs/office-home"),
    ),
    "TerraIncognita": ImageFolder(
        name="TerraIncognita",
        folder="terra_incognita",
        environments=("L100", "L38", "L43", "L46"),
        domains={"location_100": 4741, "location_38": 9736, "location_43": 3970, "location_46": 5883},
        classes=("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"),
        num_classes=10,
        other_totals=((24788, "the older download, which the papers report: 4879, 9767, 4020, 6122"),),
        website="https://beerys.github.io/CaltechCameraTraps/",
        obtain=_DOWNLOAD.format("terra_incognita") + ".",
    ),
    "DomainNet": ImageFolder(
        name="DomainNet",
        folder="domain_net",
        environments=("clip", "info", "paint", "quick", "real", "sketch"),
        domains={
            "clipart": 48129,
            "infograph": 51605,
            "painting": 72266,
            "quickdraw": 172500,
            "real": 172947,
            "sketch": 69128,
        },
        num_classes=345,
        website="https://ai.bu.edu/M3SDA/",
        obtain=_DOWNLOAD.format("domain_net") + ".",
        checkpoint_freq=1000,
    ),
    "SVIRO": ImageFolder(
        name="SVIRO",
        folder="sviro",
        environments=("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
        domains=dict.fromkeys("aclass escape hilux i3 lexus tesla tiguan tucson x5 zoe".split()),
        classes=("0", "1", "2", "3", "4", "5", "6"),
        num_classes=7,
        readable={
            "0": "empty seat",
            "1": "infant in an infant seat",
            "2": "child in a child seat",
            "3": "adult",
            "4": "everyday object",
            "5": "empty infant seat",
            "6": "empty child seat",
        },
        other_totals=((56000, "the DomainBed paper"),),
        website="https://sviro.kl.dfki.de",
        obtain=_DOWNLOAD.format("sviro") + ".",
    ),
}
