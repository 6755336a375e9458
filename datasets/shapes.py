"""ShapesReasoning, the embedded benchmark: rendered on the fly, requires no download or ``data_dir``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
from PIL import Image

from domainbed_reasoning.datasets.reasoning_dataset import ReasoningDataset, to_floats
from domainbed_reasoning.hparam_checks import FROM_0_TO_1, integer, one_of
from domainbed_reasoning.images import shapes
from domainbed_reasoning.registry import Hparam


class Rendered(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """One domain for baselines: floats in [-1, 1], ``(3, 28, 28)``, the input of DomainBed's small ConvNet."""

    def __init__(self, pictures: Sequence[Image.Image], labels: Sequence[int]):
        transform = to_floats(ShapesReasoning.INPUT_SHAPE, augment=False)
        self.items = list(zip(map(transform, pictures), labels, strict=True))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return image and class."""
        return self.items[index]


@functools.lru_cache(maxsize=8192)
def _picture(domain: int, index: int, misleading: bool, rho: float) -> Image.Image:
    return shapes.render(domain, index, misleading=misleading, rho=rho)


class ShapesReasoning(ReasoningDataset):
    """ShapesReasoning: creatures made of parts, in four styles, on a background that misleads in the target domain.

    Input: RGB image of 48 x 48 pixels (28 x 28 for baselines), rendered from (domain, index) alone.
    Label: 7 classes (blicket, dax, fep, gorp, tove, wug, zorb), each a code of four parts of three kinds; any two codes
        differ in at least three parts, and 15% of the images have one part altered.
    Domains: photo, cartoon, sketch, negative; 140 images each (20 per class), 560 in all. The background's hue follows
        the class with probability ``rho`` in source domains and is another class's in target domains.
    License: MIT, like this package.
    Chains: written by the renderer, which describes the visible parts. See `images.shapes`.
    """

    N_STEPS = 121
    CHECKPOINT_FREQ = 40
    N_WORKERS = 0  # rendering takes a millisecond, and images are cached
    ENVIRONMENTS = list(shapes.DOMAINS)
    CLASS_NAMES = shapes.CLASS_NAMES
    SUBJECT = "creature"
    INPUT_SHAPE = (3, 28, 28)
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "rho": Hparam(
            shapes.RHO,
            None,
            "probability that the background's hue is the cue, in [0, 1]; 0 for no cue",
            allowed=FROM_0_TO_1,
        ),
        "teacher": Hparam(
            "own",
            None,
            "own: the embedded model's style; other: longer chains, worded differently",
            allowed=one_of(*shapes.TEACHERS),
        ),
        "target_per_class": Hparam(
            shapes.PER_CLASS, None, "images per class in a target domain, as in the sources", allowed=integer(1)
        ),
    }

    def labels(self, env: int) -> list[int]:
        """Return the class of every image of a domain."""
        of_target = self.values["target_per_class"]
        size = self.num_classes * (of_target if env in self.test_envs else shapes.PER_CLASS)
        return [shapes.label(env, index) for index in range(size)]

    def picture(self, env: int, index: int) -> Image.Image:
        """Return an image of a domain."""
        return _picture(env, index, env in self.test_envs, float(self.values["rho"]))

    def chain(self, env: int, index: int) -> str:
        """Return the renderer's chain of an image."""
        return shapes.chain(env, index, self.values["teacher"], float(self.values["rho"]))

    def for_baseline(self, env: int, labels: Sequence[int], augment: bool) -> Rendered:
        """Return a domain's images, rendered once."""
        return Rendered([self.picture(env, index) for index in range(len(labels))], labels)
