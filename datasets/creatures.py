"""The embedded benchmark's two regimes: creatures whose names the embedded model knows, seen well or badly."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from PIL import Image

from domainbed_reasoning.datasets.reasoning_dataset import ReasoningDataset
from domainbed_reasoning.datasets.shapes import Rendered
from domainbed_reasoning.hparam_checks import FROM_0_TO_1, integer, one_of
from domainbed_reasoning.images import creatures
from domainbed_reasoning.registry import Hparam


@functools.lru_cache(maxsize=8192)
def _picture(regime: str, domain: int, index: int) -> Image.Image:
    return creatures.render(regime, domain, index)


class ClearCreaturesReasoning(ReasoningDataset):
    """ClearCreaturesReasoning: creatures made of parts, in four styles, which the embedded model recognizes well.

    The regime of OfficeHome and PACS for InternVL3: names are known, zero-shot accuracy is 80 to 90%, and the teacher's
    chains are in another style than the model's own.

    Input: RGB image of 48 x 48 pixels (28 x 28 for baselines), rendered from (domain, index) alone.
    Label: 12 classes with names of two words (kas lun, kas gor, …, mip tov), each a code of four parts of three kinds;
        any two codes differ in at least two parts.
    Domains: photo, cartoon, sketch, negative; 240 images each (20 per class), 960 in all. The background is random.
    License: MIT, like this package.
    Chains: long ones, written by the renderer, which describes the visible parts. See `images.creatures`.
    """

    REGIME: ClassVar[str] = "clear"
    N_STEPS = 244
    CHECKPOINT_FREQ = 61
    N_WORKERS = 0  # rendering takes a millisecond, and images are cached
    ENVIRONMENTS = list(creatures.DOMAINS)
    CLASS_NAMES = creatures.CLASS_NAMES
    SUBJECT = "creature"
    INPUT_SHAPE = (3, 28, 28)
    HPARAMS: ClassVar[dict[str, Hparam]] = {
        "teacher": Hparam(
            "other",
            None,
            "other: longer chains, worded differently; own: the embedded model's style",
            allowed=one_of(*creatures.TEACHERS),
        ),
        "teacher_error": Hparam(
            0.0,
            None,
            "share of images that the teacher confuses with a similar class, in [0, 1]; verified chains exclude them",
            allowed=FROM_0_TO_1,
        ),
        "target_per_class": Hparam(
            creatures.PER_CLASS, None, "images per class in a target domain, as in the sources", allowed=integer(1)
        ),
    }

    def __init__(self, root: str | None, test_envs: Collection[int], hparams: dict[str, Any]):
        self._verified = hparams.get("chain_verification") != "unverified"
        super().__init__(root, test_envs, hparams)

    def labels(self, env: int) -> list[int]:
        """Return the class of every image of a domain."""
        return [creatures.label(index) for index in range(self.num_classes * self.per_class(env))]

    def per_class(self, env: int) -> int:
        """Return the number of images of each class in a domain."""
        count: int = self.values["target_per_class"] if env in self.test_envs else creatures.PER_CLASS
        return count

    def picture(self, env: int, index: int) -> Image.Image:
        """Return an image of a domain."""
        return _picture(self.REGIME, env, index)

    def chain(self, env: int, index: int) -> str | None:
        """Return the renderer's chain of an image; None if its conclusion is wrong and chains are verified."""
        error = float(self.values["teacher_error"])
        if self._verified and creatures.conclusion(self.REGIME, env, index, error) != creatures.label(index):
            return None
        return creatures.chain(self.REGIME, env, index, self.values["teacher"], error)

    def for_baseline(self, env: int, labels: Sequence[int], augment: bool) -> Rendered:
        """Return a domain's images, rendered once."""
        return Rendered([self.picture(env, index) for index in range(len(labels))], labels)


class CamouflagedCreaturesReasoning(ClearCreaturesReasoning):
    """CamouflagedCreaturesReasoning: the same creatures, smaller, behind grass and of low contrast.

    The regime of TerraIncognita for InternVL3: names are known, but zero-shot accuracy is about 50%, since creatures
    are hard to see.

    Input: RGB image of 48 x 48 pixels (28 x 28 for baselines), rendered from (domain, index) alone.
    Label: the 12 classes of ClearCreaturesReasoning.
    Domains: photo, cartoon, sketch, negative; 240 images each (20 per class), 960 in all. The background is random.
    License: MIT, like this package.
    Chains: long ones, written by the renderer, which describes the creature's parts. See `images.creatures`.
    """

    REGIME = "camouflaged"
