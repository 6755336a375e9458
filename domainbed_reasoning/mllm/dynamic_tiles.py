"""InternVL's dynamic tiles: a grid that fits the image's aspect ratio, and a thumbnail of the whole.

Among the grids of at most ``max_tiles`` tiles, InternVL's `dynamic_preprocess` takes the one whose aspect ratio is
closest to the image's; of those that are equally close, the largest that the image's area fills by more than half. The
image is resized to that grid, and a thumbnail is added to more than one tile. transformers' image processor implements
it (``crop_to_patches``), and is called here.

DomainBed's loaders stack samples, whose tensors must have one shape. An image is therefore a column of
``max_tiles + 1`` tiles, black where it has fewer, and a last row of pixels that holds its number of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.mllm.families import ModelError

MOST_TILES = 64


@dataclass(frozen=True)
class DynamicTiles:
    """Cuts images into tiles; picklable, for loaders' workers.

    Attributes:
        image_processor: of the model.
        edge: of a tile in pixels.
        max_tiles: maximum number of tiles per image, without the thumbnail, in [2, 64].

    Raises:
        ModelError: ``max_tiles`` is out of range.
    """

    image_processor: Any
    edge: int
    max_tiles: int

    def __post_init__(self) -> None:
        if not 2 <= self.max_tiles <= MOST_TILES:
            raise ModelError(
                f"tiling 'dynamic' requires max_tiles in [2, {MOST_TILES}], the largest number of tiles of a grid; got "
                f"{self.max_tiles}. InternVL's scripts use 12."
            )

    def __call__(self, picture: Any) -> torch.Tensor:
        """Return an image's column of tiles.

        Args:
            picture: an RGB PIL image, or a tensor of bytes ``(3, H, W)``.

        Returns:
            bytes, ``(3, (max_tiles + 1) * edge + 1, edge)``.
        """
        settings = {"crop_to_patches": True, "min_patches": 1, "max_patches": self.max_tiles}
        bytes_alone = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        tiles: torch.Tensor = self.image_processor(images=[picture], **settings, **bytes_alone)["pixel_values"]
        column = tiles.new_zeros(3, *self._shape)
        column[:, : len(tiles) * self.edge] = tiles.transpose(0, 1).reshape(3, -1, self.edge)
        column[:, -1] = len(tiles)
        return column

    @property
    def _shape(self) -> tuple[int, int]:
        return (self.max_tiles + 1) * self.edge + 1, self.edge

    def columns(self, images: torch.Tensor) -> torch.Tensor:
        """Return columns of tiles of a batch of bytes, ``(n, 3, H, W)``; columns are returned unchanged."""
        if images.shape[-2:] == self._shape:
            return images
        return torch.stack([self(image) for image in images])

    def counts(self, columns: torch.Tensor) -> list[int]:
        """Return the number of tiles of each image, with the thumbnail."""
        return [int(count) for count in columns[:, 0, -1, 0].tolist()]

    def cut(self, columns: torch.Tensor, count: int) -> torch.Tensor:
        """Return the tiles of images that have ``count`` each, bytes, ``(n * count, 3, edge, edge)``."""
        n, edge = len(columns), self.edge
        tiles = columns[:, :, : count * edge].reshape(n, 3, count, edge, edge)
        return tiles.transpose(1, 2).reshape(n * count, 3, edge, edge)

    def prompt_settings(self, count: int | None = None) -> dict[str, Any]:
        """Return arguments of the processor that give a square image ``count`` tiles; None for the maximum."""
        tiles = self.max_tiles if count is None else max(1, count - 1)  # without the thumbnail
        return {"crop_to_patches": tiles > 1, "min_patches": tiles, "max_patches": tiles}


def groups_of(counts: Sequence[int]) -> dict[int, list[int]]:
    """Return the rows that have each number of tiles, by that number."""
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        groups.setdefault(count, []).append(row)
    return dict(sorted(groups.items()))
