"""What differs between families of multimodal LLMs: one row each. Everything else is one code path.

Measured on tiny models of each real architecture under transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class ModelError(ValueError):
    """A model that cannot be used: the message names the fault and the cure."""


@dataclass(frozen=True)
class Family:
    """One architecture of the transformers library.

    Attributes:
        name: as its authors print it.
        one_tile: arguments of the processor that make one picture one tile.
        image_size: edge in pixels to which a picture is resized before the processor sees it, read from the image
            processor's size.
        tree_mask: whether a custom 4-D mask over plain positions is right, which the trie of class names needs.
        example: a checkpoint.
    """

    name: str
    one_tile: dict[str, Any]
    image_size: Callable[[dict[str, Any]], int]
    tree_mask: bool
    example: str
    requires: tuple[str, ...] = field(default=())


def _square(size: dict[str, Any]) -> int:
    return int(size.get("height") or size.get("shortest_edge") or size["longest_edge"])


def _fixed(edge: int) -> Callable[[dict[str, Any]], int]:
    return lambda size: edge


FAMILIES: dict[str, Family] = {
    "InternVLForConditionalGeneration": Family(
        "InternVL3", {"crop_to_patches": False}, _square, True, "OpenGVLab/InternVL3-8B-hf"
    ),
    "LlavaForConditionalGeneration": Family("LLaVA-1.5", {}, _square, True, "llava-hf/llava-1.5-7b-hf"),
    # Qwen takes any size: 448 is 16 x 16 merged patches of 28 (2.5) and 14 x 14 of 32 (3), InternVL3's own edge.
    "Qwen2_5_VLForConditionalGeneration": Family("Qwen2.5-VL", {}, _fixed(448), False, "Qwen/Qwen2.5-VL-7B-Instruct"),
    "Qwen3VLForConditionalGeneration": Family("Qwen3-VL", {}, _fixed(448), False, "Qwen/Qwen3-VL-8B-Instruct"),
    "Idefics3ForConditionalGeneration": Family(
        "Idefics3", {"do_image_splitting": False}, _square, True, "HuggingFaceM4/Idefics3-8B-Llama3"
    ),
    "SmolVLMForConditionalGeneration": Family(
        "SmolVLM",
        {"do_image_splitting": False},
        _square,
        True,
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        requires=("num2words",),
    ),
    # Gemma 3's image tokens see each other and its layers slide: a mask of ours would have to repeat both.
    "Gemma3ForConditionalGeneration": Family("Gemma 3", {}, _square, False, "google/gemma-3-4b-it"),
}


def family_of(architecture: str) -> Family:
    """Return the row of a model class.

    Raises:
        ModelError: for an architecture without a row, naming those that have one.
    """
    if architecture not in FAMILIES:
        known = "; ".join(f"{row.name} ({row.example})" for row in FAMILIES.values())
        raise ModelError(f"{architecture} is not a supported multimodal LLM. Supported: {known}.")
    return FAMILIES[architecture]
