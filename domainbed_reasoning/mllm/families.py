"""The differences between families of multimodal LLMs, one entry each; everything else is one code path.

Measured on tiny models of each real architecture under transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from domainbed_reasoning.mllm.findings import Findings


class ModelError(ValueError):
    """A model cannot be used; the message says why and what to do."""


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
        tree: what rows with a shared prefix (both paths, the trie of class names) must reproduce of its attention:
            nothing (``plain``), Qwen's three-dimensional positions (``rope``), or Gemma's bidirectional image tokens
            and sliding ``windows``. Empty if rows share nothing, see `general`.
        example: a checkpoint.
        requires: packages that its processor imports.
        findings: of an architecture without an entry, what probing it has shown; see `trials`.
        dynamic: whether its image processor makes InternVL's dynamic tiles (``crop_to_patches``, ``min_patches``,
            ``max_patches``), and its prompt depends on nothing but their number.
    """

    name: str
    tile_edge: Callable[[Any], int]
    image_settings: Callable[[int, int], dict[str, Any]]
    tiled: bool
    image_tokens: Callable[[Any, int], int]
    tree: str
    example: str
    requires: tuple[str, ...] = ()
    findings: Findings | None = None
    dynamic: bool = False

    @property
    def has_entry(self) -> bool:
        """Whether the settings come from an entry, of this package or another's, rather than from the processor."""
        return bool(self.example)


TREES = ("", "plain", "rope", "windows")


def _own_edge(processor: Any) -> int:
    size = dict(processor.size)
    return int(size.get("height") or size["shortest_edge"])


def _crop_edge(processor: Any) -> int:
    return int(dict(processor.crop_size)["height"])


def _largest_tile(processor: Any) -> int:
    return int(dict(processor.max_image_size)["longest_edge"])


def _any_edge(processor: Any) -> int:
    """Return 448, InternVL3's edge, for a model that accepts any size within its limits on pixels.

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
        "InternVL3",
        _own_edge,
        _crops,
        True,
        _sampled_patches,
        "plain",
        "OpenGVLab/InternVL3-8B-hf",
        dynamic=True,
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


_AUTO_CLASS = "AutoModelForImageTextToText"


def tile_grid(family: Family, max_tiles: int) -> int:
    """Return the number of tiles per side: the largest square grid of at most ``max_tiles`` tiles.

    Images are resized to a square before tiling (as InternVL does for one tile), so that all images of a dataset have
    the same number of tiles and all prompts of a question the same tokens. 4 tiles are 2 x 2, 9 are 3 x 3; a thumbnail
    of the whole image is added, as the families were trained.

    Raises:
        ModelError: for less than one tile, or several for a family without tiling.
    """
    if max_tiles < 1:
        raise ModelError(f"max_tiles must be at least 1; got {max_tiles}.")
    if max_tiles > 1 and not family.tiled:
        tiled = ", ".join(row.name for row in FAMILIES.values() if row.tiled)
        raise ModelError(f"{family.name} does not tile images: set max_tiles to 1. Families with tiles: {tiled}.")
    return math.isqrt(max_tiles)


def require_dynamic(family: Family) -> None:
    """Reject a family whose image processor does not make InternVL's dynamic tiles.

    Raises:
        ModelError: naming those that do.
    """
    if not family.dynamic:
        own = "splits images by a rule of its own" if family.tiled else "does not tile images"
        rows = ", ".join(row.name for row in FAMILIES.values() if row.dynamic)
        raise ModelError(
            f"{family.name} {own}, so tiling cannot be 'dynamic': set tiling to 'square'. Families with dynamic tiles: "
            f"{rows}."
        )


def family_of(architecture: str, config: Any = None) -> Family:
    """Return the entry of a model class; without one, settings that are read from its processor and probed.

    Args:
        architecture: name of the class.
        config: of the model; LLaVA's class is used with other vision encoders than LLaVA-1.5's, too, and InternVL's
            with decoders that have sliding windows.

    Raises:
        ModelError: if it is not a multimodal LLM of the transformers library, naming those with an entry.
    """
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    row = FAMILIES.get(architecture)
    if row is not None and vision != "pixtral" and (row.tree == "windows" or _has_full_attention(config)):
        return row
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{architecture} is an encoder-decoder (is_encoder_decoder in config.json): it reads a prompt and writes "
            "in separate parts, so its answers do not continue a conversation. Use a chat model with a decoder alone, "
            "such as InternVL3 or Qwen3-VL."
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    own = getattr(config, "auto_map", None) or {}  # code of the checkpoint's, which has run or is refused elsewhere
    if architecture not in set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()) and _AUTO_CLASS not in own:
        known = "; ".join(f"{row.name} ({row.example})" for row in FAMILIES.values())
        lacking = ", which its auto_map lacks" if own else ""
        raise ModelError(
            f"{architecture} is not a supported multimodal LLM: transformers does not load it as one "
            f"({_AUTO_CLASS}{lacking}). Supported: {known}; and other chat models of that class."
        )
    return Family(architecture, _general_edge, _nothing, False, _patches, "", "")


def _has_full_attention(config: Any) -> bool:
    """Return whether every layer of the decoder attends to all previous tokens; shared prefixes require it."""
    kinds = getattr(getattr(config, "text_config", None), "layer_types", None)
    return set(kinds or ("full_attention",)) == {"full_attention"}


def is_general(family: Family) -> bool:
    """Return whether an architecture has no entry in this package, so that it is probed."""
    return family.name not in {row.name for row in FAMILIES.values()}


def _general_edge(processor: Any) -> int:
    """Return the edge of a square image that an unknown image processor takes as one tile, from its settings."""
    size = dict(getattr(processor, "size", None) or {})
    patch, merge = getattr(processor, "patch_size", None) or 1, getattr(processor, "merge_size", None) or 1
    patch = patch if isinstance(patch, int) else int(dict(patch)["height"])
    if getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None):
        return int(dict(processor.crop_size)["height"])
    if size.get("height"):
        return int(size["height"])
    if hasattr(processor, "temporal_patch_size") and {"shortest_edge", "longest_edge"} <= size.keys():
        return _any_edge(processor)  # its sizes count pixels
    if tokens := getattr(processor, "max_soft_tokens", None):  # as many patches as it has tokens
        return math.isqrt(tokens) * patch * int(processor.pooling_kernel_size)
    most = size.get("longest_edge") or size.get("shortest_edge") or size.get("max_height") or _ANY_EDGE
    return max(1, min(int(most), _ANY_EDGE) // (patch * merge)) * patch * merge


_ANY_EDGE = 448
_ONE_TILE = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan")


def fitted(family: Family, processor: Any) -> Family:
    """Return the settings of an architecture; without an entry, with tiling turned off.

    Args:
        family: as `family_of` returned it.
        processor: its image processor.
    """
    if family.has_entry:
        return family
    settings = dict.fromkeys((name for name in _ONE_TILE if hasattr(processor, name)), False)
    return replace(family, image_settings=lambda edge, grid: settings)
