"""Ground truth about captions and cues, for ShapesReasoning, whose images are rendered."""

from __future__ import annotations

import torch

from domainbed_reasoning.images import shapes
from domainbed_reasoning.method.task import SampleId
from domainbed_reasoning.mllm.pixels import from_picture


class ShapesCues:
    """ShapesReasoning: captions name four parts, and the background's hue is the cue, always present here (ρ = 1)."""

    def caption_for(self, label: int, caption: str) -> str:
        """Return the caption with its parts replaced by those of the class."""
        return shapes.with_parts_of(label, caption)

    def class_of(self, caption: str) -> int | None:
        """Return the class that differs from the caption in at most one part; it is unique."""
        return shapes.class_in_caption(caption)

    def image(self, sample: SampleId, misleading: bool) -> torch.Tensor:
        """Return the image on a background with its class's hue or another's; the rest is unchanged."""
        return from_picture(shapes.IMAGE_SIZE)(shapes.render(*sample, misleading=misleading, rho=1.0))

    def suggested(self, label: int) -> int:
        """Return the class that a misleading background suggests."""
        return (label + shapes.MISLEADING_SHIFT) % len(shapes.CLASS_NAMES)


def cues_of(dataset: str) -> ShapesCues | None:
    """Return the ground truth of a dataset; None if it has none."""
    return ShapesCues() if dataset == "ShapesReasoning" else None
