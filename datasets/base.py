"""Reasoning-augmented datasets: the stock dataset for baselines; sample ids, names and chains for MLLM algorithms.

The hparam ``algorithm``, which only our algorithms have, identifies an MLLM algorithm. Without it, a class here equals
its stock twin, tensor for tensor. With it, images are bytes at the model's input resolution, prepared in the loaders'
workers, and carry their sample ids.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision import transforms

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.samples import attach_task, with_ids
from domainbed_reasoning.chains.chain import conclusion_of
from domainbed_reasoning.images.decode import read_rgb
from domainbed_reasoning.method.answering import misled
from domainbed_reasoning.method.task import SampleId, Task
from domainbed_reasoning.mllm.clip import clip_image_edge
from domainbed_reasoning.mllm.dynamic_tiles import DynamicTiles
from domainbed_reasoning.mllm.loading import dynamic_tiles, image_edge
from domainbed_reasoning.mllm.pixels import from_picture
from domainbed_reasoning.terminal import get_logger, printable

_log = get_logger(__name__)

IMAGE_SHAPE = (3, 224, 224)  # of a baseline's images, as in DomainBed's image folders


class Samples(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """One environment's images as bytes with sample ids.

    Args:
        open_image: returns the RGB image at an index.
        labels: the class of every index.
        env: number of the environment.
        transform: PIL image to uint8 tensor ``(3, H, W)``.

    Attributes:
        task: the dataset's task, through which the algorithm finds it; dropped in loaders' workers.
    """

    task: Task | None = None

    def __init__(
        self,
        open_image: Callable[[int], Image.Image],
        labels: Sequence[int],
        env: int,
        transform: Callable[[Image.Image], torch.Tensor],
    ):
        self.open_image = open_image
        self.labels = labels
        self.env = env
        self.transform = transform

    def __getstate__(self) -> dict[str, Any]:
        """Drop the task, which contains all chains: workers only read images."""
        return {name: value for name, value in vars(self).items() if name != "task"}

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return image and class; the image is a `SampleTensor`."""
        x = self.transform(self.open_image(index))
        return with_ids(x, torch.tensor([self.env, int(index)])), self.labels[index]


class ImageOpener:
    """Opens image i of a folder's paths; for loaders' workers, which share its memory."""

    def __init__(self, folder: str, paths: Sequence[str]):
        self.folder, self.paths = folder, paths

    def __call__(self, index: int) -> Image.Image:
        """Return an image as an RGB picture."""
        picture: Image.Image = read_rgb(os.path.join(self.folder, self.paths[index]))
        return picture


class ImageList(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """One domain's images, listed: for baselines. It has torchvision's `ImageFolder`'s ``classes`` and ``targets``.

    Args:
        folder: of the dataset.
        name: of the domain.
        paths: below the folder.
        targets: the class of every image.
        classes: names in label order.
        transform: picture to floats ``(3, H, W)``.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        paths: Sequence[str],
        targets: Sequence[int],
        classes: Sequence[str],
        transform: Callable[[Image.Image], torch.Tensor],
    ):
        self.name, self.paths, self.targets, self.classes = name, paths, targets, list(classes)
        self.transform, self.open_image = transform, ImageOpener(folder, paths)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return image and class."""
        return self.transform(self.open_image(int(index))), self.targets[int(index)]


class RandomCrop(transforms.RandomResizedCrop):  # type: ignore[misc]
    """The crop of torchvision's `RandomResizedCrop` at its own size and aspect ratio."""

    def forward(self, img: Image.Image) -> Image.Image:
        """Return a random crop of an image."""
        crop: Image.Image = transforms.functional.crop(img, *self.get_params(img, self.scale, self.ratio))
        return crop


def mllm_transform(seen: int | DynamicTiles, augment: bool) -> Callable[[Image.Image], torch.Tensor]:
    """Return the transform from PIL image to the model's bytes, optionally with DomainBed's augmentation.

    Args:
        seen: how the model sees images, see `seen_by`.
        augment: apply DomainBed's random crop, flip, color jitter and grayscale. Dynamic tiles are cut from the crop,
            whose aspect ratio is in [3/4, 4/3].
    """
    to_bytes = from_picture(seen) if isinstance(seen, int) else seen
    if not augment:
        return to_bytes
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = RandomCrop(1, scale=(0.7, 1.0))
    if isinstance(seen, int):
        crop, to_bytes = transforms.RandomResizedCrop(seen, (0.7, 1.0), interpolation=bicubic), transforms.PILToTensor()
    transform: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            to_bytes,
        ]
    )
    return transform


def own_algorithm(hparams: Mapping[str, Any]) -> str | None:
    """Return the name of our algorithm that these hparams are for; None for a baseline."""
    name = hparams.get("algorithm")
    return name if isinstance(name, str) and name in registry.ALGORITHMS else None


def seen_by(algorithm: str, hparams: Mapping[str, Any]) -> int | DynamicTiles:
    """Return how an algorithm's model sees images: as squares, by their edge in pixels, or as dynamic tiles."""
    if algorithm in registry.ON_CLIP:
        return clip_image_edge(hparams["clip_model"])
    look = dynamic_tiles if hparams["tiling"] == "dynamic" else image_edge
    return look(hparams["model"], hparams["max_tiles"], hparams["revision"], hparams["trust_remote_code"])


def hand_over(dataset: Any, hparams: dict[str, Any], task: Task) -> None:
    """Pass the task to the algorithm, which schedules its stages over the steps of this dataset.

    Args:
        dataset: the instance; its attribute ``task`` is set.
        hparams: the dictionary that the algorithm also gets, or an equal one.
        task: the dataset's task.
    """
    for holder in (dataset, *dataset.datasets):
        holder.task = task
    attach_task(hparams, task)


_USES = {  # of chains that conclude with another class
    "verified": "left out; chain_verification 'unverified' would train on them",
    "unverified": "used anyway (chain_verification 'unverified')",
}


def report_chains(task: Task, wanted: bool, exact: bool = False, verification: str = "") -> Task:
    """Log the share of source-domain images with a chain, and how many chains conclude with another class.

    Verified chains are those that all rules accept: others that conclude with another class are removed.

    Args:
        task: the dataset's task.
        wanted: whether the algorithm trains on teacher chains; nothing is logged otherwise.
        exact: how the job reads conclusions, see `reader.read_conclusion`.
        verification: the hparam ``chain_verification``; "" for a dataset without it, which may train on any chain.

    Returns:
        The task with the chains to train on.

    Raises:
        ValueError: if no chain is left, or those left conclude with no class: a model trained on them would never name
            one.
    """
    if not wanted:
        return task
    total = len(task.chains)
    nothing, other = misled(task, exact)
    firsts = {place: conclusion_of(task.chains[place]) for found in (nothing, other) for place in found[:1]}
    if other and verification == "verified":
        dropped = set(other)
        left = {place: chain for place, chain in task.chains.items() if place not in dropped}
        task = dataclasses.replace(task, chains=left)
    for env, labels in enumerate(task.labels):
        if env not in task.test_envs:
            count = sum((env, index) in task.chains for index in range(len(labels)))
            name = task.environments[env]
            share = f"{count} of {len(labels)} images have a chain ({count / len(labels):.1%})"
            _log.info(printable(f"{task.dataset}, {name}: {share}", sys.stdout))
    for what, found in (("no class of the dataset", nothing), ("a class other than their image's", other)):
        if not found:
            continue
        env, index = found[0]
        message = (
            f"{len(found)} of {total} chains ({len(found) / total:.1%}) conclude with {what}. The first, of "
            f"{task.images[env][index]!r} ({task.class_names[task.labels[env][index]]}), concludes: "
            f"{firsts[env, index]!r:.80}"
        )
        if found is other and verification:
            if not task.chains:
                raise ValueError(f"{message}, so none is left to train on (chain_verification 'verified').")
            use = _USES[verification]
            _log.info(printable(f"{task.dataset}: {message}. They are {use}.", sys.stdout))
            continue
        fix = (
            "`domainbed-reasoning check` lists them; correct their <CONCLUSION>, normalize them with `annotate "
            "--rejudge`, or mark them as rejected."
        )
        if len(nothing) == len(task.chains):
            raise ValueError(f"{message}. A model trained on them would never name a class. {fix}")
        _log.warning(printable(f"WARNING: {message}. {fix}", sys.stdout))
    return task


def source_chains(
    by_image: Mapping[str, str], images: Sequence[Sequence[str]], test_envs: Collection[int]
) -> dict[SampleId, str]:
    """Return the chains of source-domain images by sample id; those of target domains are dropped here.

    Args:
        by_image: chain texts by image path.
        images: per environment, the path of every index.
        test_envs: the target domains.
    """
    return {
        (env, index): by_image[path]
        for env, paths in enumerate(images)
        if env not in test_envs
        for index, path in enumerate(paths)
        if path in by_image
    }
