"""What differs between families of multimodal LLMs: one row each. Everything else is one code path.

Measured on tiny models of each real architecture under transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class ModelError(ValueError):
    """A model that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Family:
    """One architecture of the transformers library.

    Attributes:
        name: as its authors print it.
        tile_edge: edge in pixels at which its vision encoder takes a picture, read from the image processor.
        image_settings: arguments of the image processor that make a square picture of ``grid`` x ``grid`` tiles, each
            ``edge`` pixels wide, those tiles (and, for more than one, a view of the whole): ``(edge, grid)``.
        tiled: whether a picture may be more than one tile.
        image_tokens: how many tokens of the language model a tile is, from the config and the tile's edge.
        tree: what rows that share a prefix (both paths, the trie of class names) have to repeat of its attention:
            nothing (``plain``), Qwen's positions in three dimensions (``rope``), Gemma's image tokens that see each
            other and its layers' ``windows``.
        example: a checkpoint.
        requires: packages that its processor imports.
    """

    name: str
    tile_edge: Callable[[Any], int]
    image_settings: Callable[[int, int], dict[str, Any]]
    tiled: bool
    image_tokens: Callable[[Any, int], int]
    tree: str
    example: str
    requires: tuple[str, ...] = ()


def _own_edge(processor: Any) -> int:
    size = dict(processor.size)
    return int(size.get("height") or size["shortest_edge"])


def _crop_edge(processor: Any) -> int:
    return int(dict(processor.crop_size)["height"])


def _largest_tile(processor: Any) -> int:
    return int(dict(processor.max_image_size)["longest_edge"])


def _any_edge(processor: Any) -> int:
    """Return 448, InternVL3's own edge, for a model that takes any size within its limits on pixels.

    It is 16 x 16 merged patches of 28 pixels in Qwen2.5-VL and 14 x 14 of 32 in Qwen3-VL.
    """
    size, patch = dict(processor.size), int(processor.patch_size * processor.merge_size)
    most = math.isqrt(int(size["longest_edge"])) // patch * patch
    least = -(-math.isqrt(int(size["shortest_edge"])) // patch) * patch
    return max(least, min(448 // patch * patch, most))


def _crops(edge: int, grid: int) -> dict[str, Any]:
    if grid == 1:
        return {"crop_to_patches": False}
    return {"crop_to_patches": True, "min_patches": grid * grid, "max_patches": grid * grid}


def _splits(edge: int, grid: int) -> dict[str, Any]:
    return {"do_image_splitting": grid > 1, "size": {"longest_edge": edge * grid}}


def _patches(config: Any, edge: int) -> int:
    patch = config.vision_config.patch_size
    return int((edge // (patch if isinstance(patch, int) else patch[0])) ** 2)


def _merged_patches(config: Any, edge: int) -> int:
    return _patches(config, edge) // int(config.vision_config.spatial_merge_size) ** 2


def _scaled_patches(config: Any, edge: int) -> int:
    return _patches(config, edge) // int(config.scale_factor) ** 2


def _sampled_patches(config: Any, edge: int) -> int:
    return int(_patches(config, edge) * config.downsample_ratio**2)


def _set_number(config: Any, edge: int) -> int:
    return int(config.mm_tokens_per_image)


def _sequence_length(config: Any, edge: int) -> int:
    return int(config.image_seq_length)


def _nothing(edge: int, grid: int) -> dict[str, Any]:
    return {}


FAMILIES: dict[str, Family] = {
    "InternVLForConditionalGeneration": Family(
        "InternVL3", _own_edge, _crops, True, _sampled_patches, "plain", "OpenGVLab/InternVL3-8B-hf"
    ),
    "LlavaForConditionalGeneration": Family(
        "LLaVA-1.5", _own_edge, _nothing, False, _patches, "plain", "llava-hf/llava-1.5-7b-hf"
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "Qwen2.5-VL", _any_edge, _nothing, False, _merged_patches, "rope", "Qwen/Qwen2.5-VL-7B-Instruct"
    ),
    "Qwen3VLForConditionalGeneration": Family(
        "Qwen3-VL", _any_edge, _nothing, False, _merged_patches, "rope", "Qwen/Qwen3-VL-8B-Instruct"
    ),
    "Idefics3ForConditionalGeneration": Family(
        "Idefics3", _largest_tile, _splits, True, _scaled_patches, "plain", "HuggingFaceM4/Idefics3-8B-Llama3"
    ),
    "SmolVLMForConditionalGeneration": Family(
        "SmolVLM",
        _largest_tile,
        _splits,
        True,
        _scaled_patches,
        "plain",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        requires=("num2words",),
    ),
    "Gemma3ForConditionalGeneration": Family(
        "Gemma 3", _own_edge, _nothing, False, _set_number, "windows", "google/gemma-3-4b-it"
    ),
    "FastVlmForConditionalGeneration": Family(
        "FastVLM", _crop_edge, _nothing, False, _sequence_length, "plain", "KamilaMila/FastVLM-7B"
    ),
}


def tile_grid(family: Family, max_tiles: int) -> int:
    """Return how many tiles a side a picture gets: the largest square grid of at most ``max_tiles`` tiles.

    Pictures are made square before they are cut (one tile of InternVL squeezes them as well), so every image of a
    dataset has the same number of tiles and every prompt of a question the same tokens. 4 tiles are 2 x 2, 9 are 3 x 3;
    a view of the whole picture comes on top, as the families were trained.

    Raises:
        ModelError: for less than one tile, or more than one of a family that has no tiles.
    """
    if max_tiles < 1:
        raise ModelError(f"max_tiles must be at least 1; got {max_tiles}.")
    if max_tiles > 1 and not family.tiled:
        tiled = ", ".join(row.name for row in FAMILIES.values() if row.tiled)
        raise ModelError(f"{family.name} does not tile images: set max_tiles to 1. Families with tiles: {tiled}.")
    return math.isqrt(max_tiles)


def family_of(architecture: str) -> Family:
    """Return the row of a model class.

    Raises:
        ModelError: for an architecture without a row, naming those that have one.
    """
    if architecture not in FAMILIES:
        known = "; ".join(f"{row.name} ({row.example})" for row in FAMILIES.values())
        raise ModelError(f"{architecture} is not a supported multimodal LLM. Supported: {known}.")
    return FAMILIES[architecture]
