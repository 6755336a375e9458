"""ShapesReasoning, the embedded benchmark: rendered on the fly, without downloads or ``data_dir``."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from domainbed.datasets import MultipleDomainDataset
from PIL import Image
from torchvision import transforms

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.preflight import check_splits, check_test_envs
from domainbed_reasoning.datasets.base import (
    Samples,
    hand_over,
    mllm_transform,
    model_edge,
    own_algorithm,
    report_chains,
)
from domainbed_reasoning.hparam_checks import FROM_0_TO_1, integer, one_of
from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.task import Task
from domainbed_reasoning.registry import Hparam, check_for_dataset


class Rendered(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """One domain for baselines: floats in [-1, 1], ``(3, 28, 28)``, the size of DomainBed's small convolutional net."""

    transform = transforms.Compose(
        [transforms.Resize((28, 28)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )

    def __init__(self, domain: int, size: int, misleading: bool, rho: float):
        self.items = [
            (self.transform(_picture(domain, index, misleading, rho)), shapes.label(domain, index))
            for index in range(size)
        ]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return image and class."""
        return self.items[index]


@functools.lru_cache(maxsize=8192)
def _picture(domain: int, index: int, misleading: bool, rho: float) -> Image.Image:
    return shapes.render(domain, index, misleading=misleading, rho=rho)


class ShapesReasoning(MultipleDomainDataset):  # type: ignore[misc]
    """ShapesReasoning: creatures made of parts, in four styles, on a background that misleads in the target domain.

    Input: RGB image of 48 x 48 pixels (28 x 28 for baselines), rendered from (domain, index) alone.
    Label: 7 classes (blicket, dax, fep, gorp, tove, wug, zorb), each a code of four parts of three kinds; any two codes
        differ in at least three parts, and 15% of the images have one part altered.
    Domains: photo, cartoon, sketch, negative; 140 images each (20 per class), 560 in all. The background's hue follows
        the class with probability ``rho`` in source domains and is another class's in target domains.
    License: MIT, as this package.
    Chains: written by the renderer, which describes the visible parts. See `images.shapes`.
    """

    N_STEPS = 121
    CHECKPOINT_FREQ = 40
    N_WORKERS = 0  # rendering takes a millisecond, and every image is kept
    ENVIRONMENTS = list(shapes.DOMAINS)
    INPUT_SHAPE = (3, 28, 28)
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "rho": Hparam(
            shapes.RHO,
            None,
            "how often the background's hue is the cue, in [0, 1]; 0 is no cue at all",
            allowed=FROM_0_TO_1,
        ),
        "teacher": Hparam(
            "own",
            None,
            "chains as the embedded model writes; other: at length, in words of their own",
            allowed=one_of(*shapes.TEACHERS),
        ),
        "target_per_class": Hparam(
            shapes.PER_CLASS, None, "images a class of a target domain, as in the sources", allowed=integer(1)
        ),
    }

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]):
        super().__init__()
        check_for_dataset(hparams, self.HPARAMS)
        check_test_envs(type(self).__name__, self.ENVIRONMENTS, test_envs)
        self.input_shape = self.INPUT_SHAPE
        self.num_classes = len(shapes.CLASS_NAMES)
        algorithm = own_algorithm(hparams)
        # A baseline's hparams are its stock twin's: these two are there only where ``--hparams`` gives them.
        rho = float(hparams.get("rho", shapes.RHO))
        of_target = hparams.get("target_per_class", shapes.PER_CLASS)
        sizes = [
            len(shapes.CLASS_NAMES) * (of_target if env in test_envs else shapes.PER_CLASS)
            for env in range(len(shapes.DOMAINS))
        ]
        domains = list(zip(shapes.DOMAINS, sizes, strict=True))
        check_splits(type(self).__name__, domains, test_envs, hparams, self.N_WORKERS)
        if algorithm is None:
            self.datasets: list[Any] = [Rendered(env, size, env in test_envs, rho) for env, size in enumerate(sizes)]
        else:
            self._for_mllm(algorithm, sorted(test_envs), sizes, rho, hparams)

    def _for_mllm(
        self, algorithm: str, test_envs: list[int], sizes: list[int], rho: float, hparams: dict[str, Any]
    ) -> None:
        labels = [[shapes.label(env, index) for index in range(size)] for env, size in enumerate(sizes)]
        chains = {
            (env, index): shapes.chain(env, index, hparams["teacher"], rho)
            for env, size in enumerate(sizes)
            if algorithm in registry.READ_CHAINS and env not in test_envs
            for index in range(size)
        }
        edge = model_edge(algorithm, hparams)
        self.datasets = [
            Samples(
                functools.partial(_picture, env, misleading=env in test_envs, rho=rho),
                labels[env],
                env,
                mllm_transform(edge, hparams["data_augmentation"] and env not in test_envs),
            )
            for env in range(len(sizes))
        ]
        task = Task(
            dataset=type(self).__name__,
            class_names=shapes.CLASS_NAMES,
            environments=shapes.DOMAINS,
            test_envs=tuple(test_envs),
            subject="creature",
            labels=labels,
            images=[
                [f"{name}/{index}" for index in range(size)] for name, size in zip(shapes.DOMAINS, sizes, strict=True)
            ],
            chains=chains,
            loaded_from=weakref.ref(self),
        )
        report_chains(task, algorithm in registry.READ_CHAINS, hparams.get("answer_matching") == "exact")
        hand_over(self, hparams, task)
