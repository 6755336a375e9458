"""DomainBed-Reasoning: DomainBed's image-folder datasets with a five-stage reasoning chain for every image.

Chains are read from ``<data_dir>/<folder>/reasoning.jsonl``, one JSON object per line with ``image`` (path below the
folder) and ``chain``, and from the bundle that a dataset class names, or from where the hparam ``chains`` says (see
`chains.training_chains`). The paper's (arXiv 2602.23777) were written by GPT-4o with the label withheld; write yours
with ``domainbed-reasoning annotate``, or import them. Training never sees chains of target domains.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import shlex
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tqdm
from domainbed import datasets as stock
from PIL import Image

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.preflight import check_splits, check_test_envs
from domainbed_reasoning.chains.chain import check_class_names
from domainbed_reasoning.chains.image_names import composed, require_image_names
from domainbed_reasoning.datasets.base import (
    Samples,
    hand_over,
    mllm_transform,
    model_edge,
    own_algorithm,
    report_chains,
)
from domainbed_reasoning.datasets.teacher_chains import NEEDS_NO_DATA, teacher_chains
from domainbed_reasoning.hparam_checks import TEXT_OR_NONE, integer, one_of
from domainbed_reasoning.images.catalog import CHAIN_FILE, STOCK, ImageFolder, class_names, scan
from domainbed_reasoning.images.decode import check_header, read_rgb, reject_truncated_images
from domainbed_reasoning.method.task import SampleId, Task
from domainbed_reasoning.registry import Hparam, check_for_dataset

FOLDER_HPARAMS = {
    "chains": Hparam(
        None,
        None,
        f"None: {CHAIN_FILE} in the dataset's folder and the dataset's bundle; or a chain file, bundled, or none",
        allowed=TEXT_OR_NONE,
    ),
    "chain_verification": Hparam(
        "verified",
        None,
        "all rules; unverified: all but the label's, so that chains that conclude another class are trained on",
        allowed=one_of("verified", "unverified"),
    ),
    "workers": Hparam(
        2, None, "loader processes a split: DomainBed's 8 would make 88 of an MLLM's", allowed=integer(0)
    ),
}


class ReasoningImageFolder:
    """Mixed in before a stock image-folder dataset; with a baseline it changes nothing.

    Class attributes:
        FOLDER: the dataset's folder below ``data_dir``.
        SUBJECT: what the images show, the noun of the question.
        READABLE: names for prompts of class folders for which `readable_name` would not do.
        BUNDLE: chains that come with the dataset: a bundle of this package's or the path of a ``.jsonl.xz`` file; None
            without any. See `chains.bundled`.

    Raises:
        FileNotFoundError: when the dataset is not below ``data_dir``, or a class has no image in a domain.
        ValueError: when target domains, hyper-parameters or splits cannot be used, domains have other classes, an image
            cannot be read, or the chain file is broken or has no chain to learn from; all before any training.
    """

    HPARAMS: ClassVar[dict[str, Hparam]] = FOLDER_HPARAMS
    FOLDER: ClassVar[str]
    SUBJECT: ClassVar[str] = "object"
    READABLE: ClassVar[Mapping[str, str]] = {}
    BUNDLE: ClassVar[str | None] = None
    ENVIRONMENTS: ClassVar[list[str]]
    N_WORKERS: int
    datasets: list[Any]

    def __init__(self, root: str, test_envs: Collection[int], hparams: dict[str, Any]):
        check_for_dataset(hparams, self.HPARAMS)
        check_test_envs(type(self).__name__, self.ENVIRONMENTS, test_envs)
        folder = dataset_folder(root, self.FOLDER, type(self).__name__, len(self.ENVIRONMENTS))
        with empty_classes_named(root, self.FOLDER, type(self).__name__):
            super().__init__(root, test_envs, hparams)  # type: ignore[call-arg]
        _check_classes(self.datasets, folder)
        algorithm = own_algorithm(hparams)
        workers = self.N_WORKERS if algorithm is None else hparams["workers"]
        check_splits(type(self).__name__, sizes_of(self.datasets), test_envs, hparams, workers)
        if algorithm is not None:
            self._for_mllm(folder, algorithm, sorted(test_envs), hparams)

    def _for_mllm(
        self, folder: pathlib.Path, algorithm: str, test_envs: Sequence[int], hparams: dict[str, Any]
    ) -> None:
        folders = self.datasets
        edge = model_edge(algorithm, hparams)
        images = [[_below(folder, path) for path, _ in f.samples] for f in folders]
        require_image_names(folder, (path for paths in images for path in paths))
        labels = [list(f.targets) for f in folders]
        names = class_names(folders[0].classes, self.READABLE)
        if problem := check_class_names(names):
            raise ValueError(f"{folder}: {problem}. Rename the class folders.")
        check_images(folder, [path for paths in images for path in paths])
        reads_chains = algorithm in registry.READ_CHAINS
        chains: dict[SampleId, str] = {}
        bundle = ""
        if reads_chains:
            chains, bundle = teacher_chains(type(self).__name__, self.BUNDLE, folder, images, names, test_envs, hparams)
        task = Task(
            dataset=type(self).__name__,
            class_names=names,
            environments=tuple(pathlib.Path(f.root).name for f in folders),
            test_envs=tuple(test_envs),
            subject=self.SUBJECT,
            labels=labels,
            images=images,
            chains=chains,
            bundle=bundle,
            folder=str(folder),
            loaded_from=weakref.ref(self),
        )
        exact, unverified = hparams.get("answer_matching") == "exact", hparams["chain_verification"] == "unverified"
        report_chains(task, reads_chains, exact, unverified)
        self.datasets = [
            Samples(
                _Opener([path for path, _ in f.samples]),
                f.targets,
                env,
                mllm_transform(edge, hparams["data_augmentation"] and env not in test_envs),
            )
            for env, f in enumerate(folders)
        ]
        self.N_WORKERS = hparams["workers"]
        hand_over(self, hparams, task)


class _Opener:
    """Opens image i of a list of files; picklable for loaders' workers."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __call__(self, index: int) -> Image.Image:
        picture: Image.Image = read_rgb(self.paths[index])
        return picture


def dataset_folder(root: str | None, folder: str, name: str, environments: int) -> pathlib.Path:
    """Return the dataset's folder below ``data_dir``.

    Raises:
        FileNotFoundError: when it is not there or has other than ``environments`` domain folders.
    """
    if root is None:
        raise FileNotFoundError(f"{name} needs --data_dir: the folder that holds {folder}/. {NEEDS_NO_DATA}")
    path = pathlib.Path(root, folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{name}: folder {path} not found. --data_dir must be the folder that contains {folder}/; run "
            f"`domainbed-reasoning check --dataset {name} --data_dir {shlex.quote(str(root))}` for "
            f"details. {NEEDS_NO_DATA}"
        )
    with os.scandir(path) as entries:
        domains = sorted(entry.name for entry in entries if entry.is_dir())
    if len(domains) != environments:
        raise FileNotFoundError(
            f"{name}: {path} has {len(domains)} domain folders ({', '.join(domains) or 'none'}), "
            f"expected {environments}. Add the missing ones; move other folders elsewhere: DomainBed treats each as a "
            "domain."
        )
    return path


@contextlib.contextmanager
def empty_classes_named(root: str, folder: str, name: str) -> Iterator[None]:
    """Say in which domain a class has no image, where torchvision's error names the class alone.

    Raises:
        FileNotFoundError: in place of torchvision's.
    """
    try:
        yield
    except FileNotFoundError as error:
        on_disk = scan(ImageFolder(name, folder, ()), root)
        if not on_disk.missing:
            raise
        places = [
            f"{label!r} in the domain {domain!r} ({on_disk.root / domain / label})" for domain, label in on_disk.missing
        ]
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        raise FileNotFoundError(
            f"{name}: no image of the class {', '.join(places[:5])}{more}. Add some, or remove the class "
            "from every domain."
        ) from error


def sizes_of(folders: Sequence[Any]) -> list[tuple[str, int]]:
    """Return name and number of images of each domain."""
    return [(pathlib.Path(folder.root).name, len(folder)) for folder in folders]


def _below(folder: pathlib.Path, path: str) -> str:
    return pathlib.PurePath(os.path.relpath(path, folder)).as_posix()


def _check_classes(folders: Sequence[Any], root: pathlib.Path) -> None:
    """Refuse domains with different class folders: DomainBed numbers classes within each."""
    first, names = folders[0], [composed(name) for name in folders[0].classes]
    for other in folders[1:]:
        if [composed(name) for name in other.classes] != names:
            odd = sorted(ascii(name)[1:-1] for name in set(other.classes) ^ set(first.classes))
            raise ValueError(
                f"{root}: the domains {pathlib.Path(first.root).name} and {pathlib.Path(other.root).name} have "
                f"different class folders ({', '.join(odd)}); make them the same."
            )


def check_images(folder: pathlib.Path, images: Sequence[str]) -> None:
    """Look at every image's header and end mark, so that a broken file is named now and not hours later.

    Args:
        folder: of the dataset.
        images: paths below it.

    Raises:
        ValueError: naming the broken files, at most ten.
    """

    def problem(image: str) -> str | None:
        try:
            check_header(folder / image)
        except OSError as error:
            return str(error)
        return None

    with reject_truncated_images(), concurrent.futures.ThreadPoolExecutor() as pool:
        checks = pool.map(problem, images)
        problems = [
            text for text in tqdm.tqdm(checks, "checking images", len(images), leave=False, disable=None) if text
        ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{len(problems)} unreadable images: {' '.join(problems[:10])}{more}")


class VLCSReasoning(ReasoningImageFolder, stock.VLCS):  # type: ignore[misc]
    """VLCS: object classes shared by four photo collections.

    Input: RGB photo. Label: 5 classes (bird, car, chair, dog, person).
    Domains: Caltech101 (1,415 images), LabelMe (2,656), SUN09 (3,282), VOC2007 (3,376); 10,729 in all.
    Website: https://www.mathcs.emory.edu/~torralba/research/bias/
    License: that of the four source collections.
    Chains: see the module's docstring.

    @inproceedings{fang2013unbiased,
      title = {Unbiased Metric Learning: On the Utilization of Multiple Datasets and Web Images for Softening Bias},
      author = {Fang, Chen and Xu, Ye and Rockmore, Daniel N.},
      booktitle = {ICCV}, year = {2013}}
    """

    FOLDER = "VLCS"


class PACSReasoning(ReasoningImageFolder, stock.PACS):  # type: ignore[misc]
    """PACS: objects in four styles of depiction.

    Input: RGB photo, painting or drawing. Label: 7 classes (dog, elephant, giraffe, guitar, horse, house, person).
    Domains: art_painting (2,048 images), cartoon (2,344), photo (1,670), sketch (3,929); 9,991 in all.
    Website: https://dali-dl.github.io/project_iccv2017.html
    License: see the website.
    Chains: the bundle PACS, for 9,472 images, of which 9,413 chains conclude the class (`chains/bundles/PACS.md`); see
        also the module's docstring.

    @inproceedings{li2017deeper,
      title = {Deeper, Broader and Artier Domain Generalization},
      author = {Li, Da and Yang, Yongxin and Song, Yi-Zhe and Hospedales, Timothy M.},
      booktitle = {ICCV}, year = {2017}}
    """

    FOLDER = "PACS"
    BUNDLE = STOCK["PACS"].bundle


class OfficeHomeReasoning(ReasoningImageFolder, stock.OfficeHome):  # type: ignore[misc]
    """Office-Home: everyday objects of office and home.

    Input: RGB photo or drawing. Label: 65 classes.
    Domains: Art (2,427 images), Clipart (4,365), Product (4,439), Real World (4,357); 15,588 in all.
    Website: https://www.hemanthdv.org/officeHomeDataset.html
    License: see the website.
    Chains: see the module's docstring.

    @inproceedings{venkateswara2017deep,
      title = {Deep Hashing Network for Unsupervised Domain Adaptation},
      author = {Venkateswara, Hemanth and Eusebio, Jose and Chakraborty, Shayok and Panchanathan, Sethuraman},
      booktitle = {CVPR}, year = {2017}}
    """

    FOLDER = "office_home"
    READABLE = STOCK["OfficeHome"].readable


class TerraIncognitaReasoning(ReasoningImageFolder, stock.TerraIncognita):  # type: ignore[misc]
    """Terra Incognita: animals photographed by camera traps at four locations.

    Input: RGB photo, in color by day and gray by night. Label: 10 classes (nine animals and "empty").
    Domains: location_100 (4,741 images), location_38 (9,736), location_43 (3,970), location_46 (5,883); 24,330 in all.
        The download that most papers report had 24,788: 4,879, 9,767, 4,020, 6,122.
    Website: https://beerys.github.io/CaltechCameraTraps/
    License: Community Data License Agreement, permissive (Caltech Camera Traps).
    Chains: see the module's docstring.

    @inproceedings{beery2018recognition,
      title = {Recognition in Terra Incognita},
      author = {Beery, Sara and Van Horn, Grant and Perona, Pietro},
      booktitle = {ECCV}, year = {2018}}
    """

    FOLDER = "terra_incognita"


class DomainNetReasoning(ReasoningImageFolder, stock.DomainNet):  # type: ignore[misc]
    """DomainNet, cleaned version: many objects in six styles of depiction.

    Input: RGB photo, painting or drawing. Label: 345 classes.
    Domains: clipart (48,129 images), infograph (51,605), painting (72,266), quickdraw (172,500), real (172,947), sketch
        (69,128); 586,575 in all.
    Website: https://ai.bu.edu/M3SDA/
    License: see the website.
    Chains: see the module's docstring.

    @inproceedings{peng2019moment,
      title = {Moment Matching for Multi-Source Domain Adaptation},
      author = {Peng, Xingchao and Bai, Qinxun and Xia, Xide and Huang, Zijun and Saenko, Kate and Wang, Bo},
      booktitle = {ICCV}, year = {2019}}
    """

    FOLDER = "domain_net"


class SVIROReasoning(ReasoningImageFolder, stock.SVIRO):  # type: ignore[misc]
    """SVIRO: rendered rear seats of ten cars.

    Input: synthetic RGB image of one seat. Label: 7 classes: empty seat, infant in an infant seat, child in a child
        seat, adult, everyday object, empty infant seat, empty child seat (folders 0 to 6).
    Domains: aclass, escape, hilux, i3, lexus, tesla, tiguan, tucson, x5, zoe; 56,000 images in all.
    Website: https://sviro.kl.dfki.de
    License: see the website.
    Chains: see the module's docstring.

    @inproceedings{diasdacruz2020sviro,
      title = {{SVIRO}: Synthetic Vehicle Interior Rear Seat Occupancy Dataset and Benchmark},
      author = {Dias Da Cruz, Steve and Wasenmüller, Oliver and Beise, Hans-Peter and Stifter, Thomas and
        Stricker, Didier},
      booktitle = {WACV}, year = {2020}}
    """

    FOLDER = "sviro"
    READABLE = STOCK["SVIRO"].readable
