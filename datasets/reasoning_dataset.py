"""Base class of datasets with custom images and chains; for image folders see `user_datasets`."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from domainbed.datasets import MultipleDomainDataset
from PIL import Image
from torchvision import transforms

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.preflight import check_splits, check_test_envs
from domainbed_reasoning.chains.chain import ChainError, check_class_names, parse_chain
from domainbed_reasoning.datasets.base import (
    Samples,
    hand_over,
    mllm_transform,
    own_algorithm,
    report_chains,
    seen_by,
)
from domainbed_reasoning.method.task import SampleId, Task
from domainbed_reasoning.mllm.pixels import IMAGENET_MEAN, IMAGENET_STD
from domainbed_reasoning.registry import Hparam, check_for_dataset

_SMALL = 64  # pixels; DomainBed neither augments smaller images nor normalizes them with ImageNet's statistics


class ReasoningDataset(MultipleDomainDataset):  # type: ignore[misc]
    """Base class that turns labels, images and chains into a DomainBed dataset.

    Subclasses set the class attributes and implement `labels`, `picture` and, if there are chains, `chain`. `chain` is
    never called for target domains.

    Class attributes:
        ENVIRONMENTS: names of the domains.
        CLASS_NAMES: class names in the prompts, in label order.
        SUBJECT: what the images show, the noun in the question.
        INPUT_SHAPE: shape of a baseline's images; ``(3, 28, 28)`` selects DomainBed's small convolutional network.
        HPARAMS: hyper-parameters of the dataset.
        TWIN: the stock dataset whose hyper-parameters baselines use; ``"Debug28"`` for small images.
        OFFERED: per environment, the labels of the classes that its questions offer; empty if all offer all.

    Attributes:
        root: DomainBed's ``data_dir``.
        test_envs: numbers of the target domains.
        values: values of the hyper-parameters in ``HPARAMS``.

    Raises:
        ValueError: if target domains, hyper-parameters, labels, splits or chains are invalid; raised before training.
    """

    ENVIRONMENTS: ClassVar[list[str]]
    CLASS_NAMES: ClassVar[Sequence[str]]
    SUBJECT: ClassVar[str] = "object"
    INPUT_SHAPE: ClassVar[tuple[int, int, int]] = (3, 224, 224)
    HPARAMS: ClassVar[Mapping[str, Hparam]] = {}
    TWIN: ClassVar[str | None] = None
    OFFERED: ClassVar[Sequence[Sequence[int]]] = ()
    N_WORKERS = 2
    datasets: list[Any]

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]):
        super().__init__()
        name = type(self).__name__
        check_for_dataset(hparams, self.HPARAMS)
        check_test_envs(name, self.ENVIRONMENTS, test_envs)
        self.root, self.test_envs = root, sorted(test_envs)
        # A baseline gets its stock twin's hparams; ours are only present if ``--hparams`` sets them.
        self.values = {key: hparams.get(key, row.default) for key, row in self.HPARAMS.items()}
        self.input_shape, self.num_classes = self.INPUT_SHAPE, len(self.CLASS_NAMES)
        labels = [[int(label) for label in self.labels(env)] for env in range(len(self.ENVIRONMENTS))]
        self._check_labels(labels)
        domains = list(zip(self.ENVIRONMENTS, map(len, labels), strict=True))
        check_splits(name, domains, test_envs, hparams, self.N_WORKERS)
        algorithm = own_algorithm(hparams)
        if algorithm is None:
            augment = hparams["data_augmentation"]
            self.datasets = [
                self.for_baseline(env, of_env, augment and env not in test_envs) for env, of_env in enumerate(labels)
            ]
        else:
            self._for_mllm(algorithm, labels, hparams)

    def labels(self, env: int) -> Sequence[int]:
        """Return the class of every image of a domain."""
        raise NotImplementedError

    def picture(self, env: int, index: int) -> Image.Image:
        """Return an image of a domain as an RGB PIL image of any size."""
        raise NotImplementedError

    def chain(self, env: int, index: int) -> str | None:
        """Return the five-stage chain of an image of a source domain; None if it has none."""
        return None

    def image_name(self, env: int, index: int) -> str:
        """Return the name of an image in ``predictions.jsonl``."""
        return f"{self.ENVIRONMENTS[env]}/{index}"

    def for_baseline(self, env: int, labels: Sequence[int], augment: bool) -> Any:
        """Return a domain's images for baselines: floats of `INPUT_SHAPE`.

        Args:
            env: number of the domain.
            labels: classes of its images.
            augment: apply DomainBed's random crop, flip, color jitter and grayscale; small images are never augmented.
        """
        return _Floats(self._opener(env), labels, to_floats(self.INPUT_SHAPE, augment))

    def __getstate__(self) -> dict[str, Any]:
        """Drop images and chains: copies of a dataset, e.g. in loaders' workers, only open images."""
        return {name: value for name, value in vars(self).items() if name not in ("task", "datasets")}

    def _opener(self, env: int) -> Callable[[int], Image.Image]:
        return functools.partial(copy.copy(self).picture, env)  # a copy: loaders must not keep the dataset alive

    def _check_labels(self, labels: Sequence[Sequence[int]]) -> None:
        if problem := check_class_names(list(self.CLASS_NAMES)):
            raise ValueError(f"{type(self).__name__}: {problem}. Change CLASS_NAMES.")
        for env, of_env in enumerate(labels):
            wrong = next((label for label in of_env if not 0 <= label < self.num_classes), None)
            if wrong is not None:
                raise ValueError(
                    f"{type(self).__name__}: domain {env} ({self.ENVIRONMENTS[env]}) has label {wrong}, but "
                    f"CLASS_NAMES has {self.num_classes} names: labels are in [0, {self.num_classes - 1}]."
                )

    def _for_mllm(self, algorithm: str, labels: list[list[int]], hparams: dict[str, Any]) -> None:
        seen, reads_chains = seen_by(algorithm, hparams), algorithm in registry.READ_CHAINS
        chains = self._source_chains(labels) if reads_chains else {}
        if reads_chains and not chains and hparams.get("mtct_epochs") != 0:
            raise ValueError(
                f"{type(self).__name__}: no image of a source domain has a chain, but {algorithm} trains on chains. "
                "Implement `chain`, or use LabelSFT or MLLMZeroShot, which need none."
            )
        self.datasets = [
            Samples(
                self._opener(env),
                of_env,
                env,
                mllm_transform(seen, hparams["data_augmentation"] and env not in self.test_envs),
            )
            for env, of_env in enumerate(labels)
        ]
        task = Task(
            dataset=type(self).__name__,
            class_names=tuple(self.CLASS_NAMES),
            environments=tuple(self.ENVIRONMENTS),
            test_envs=tuple(self.test_envs),
            subject=self.SUBJECT,
            labels=labels,
            images=[[self.image_name(env, index) for index in range(len(of_env))] for env, of_env in enumerate(labels)],
            chains=chains,
            loaded_from=weakref.ref(self),
            offered=self.OFFERED,
        )
        exact = hparams.get("answer_matching") == "exact"
        task = report_chains(task, reads_chains, exact, hparams.get("chain_verification", ""))
        hand_over(self, hparams, task)

    def _source_chains(self, labels: Sequence[Sequence[int]]) -> dict[SampleId, str]:
        chains = {}
        for env, of_env in enumerate(labels):
            for index in range(len(of_env) if env not in self.test_envs else 0):
                chain = self.chain(env, index)
                if chain is not None:
                    try:
                        parse_chain(chain)
                    except (ChainError, TypeError) as error:
                        where = f"{type(self).__name__}: the chain of image {self.image_name(env, index)}"
                        raise ValueError(f"{where} is not a five-stage chain: {error}.") from error
                    chains[env, index] = chain
        return chains


class _Floats(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """One domain for baselines."""

    def __init__(
        self,
        open_image: Callable[[int], Image.Image],
        labels: Sequence[int],
        transform: Callable[[Image.Image], torch.Tensor],
    ):
        self.open_image, self.labels, self.transform = open_image, labels, transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return image and class."""
        return self.transform(self.open_image(index)), self.labels[index]


def to_floats(shape: tuple[int, int, int], augment: bool) -> Callable[[Image.Image], torch.Tensor]:
    """Return DomainBed's transform to floats: small images in [-1, 1], others augmented and ImageNet-normalized."""
    edges = shape[1:]
    small = min(edges) < _SMALL
    resize = [transforms.Resize(edges)]
    if augment and not small:
        resize = [
            transforms.RandomResizedCrop(edges, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
        ]
    normalize = transforms.Normalize(*(([0.5] * 3, [0.5] * 3) if small else (IMAGENET_MEAN, IMAGENET_STD)))
    chosen: Callable[[Image.Image], torch.Tensor] = transforms.Compose([*resize, transforms.ToTensor(), normalize])
    return chosen
