"""Published figures that a plan needs: GPUs, datasets, and the configs of the paper's models. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        gib: memory.
        tflops: dense bfloat16 peak.
        bandwidth: bytes a second.
    """

    gib: float
    tflops: float
    bandwidth: float


GPUS = {
    "H200": Gpu(131, 989, 4.8e12),
    "H100": Gpu(74.5, 989, 3.35e12),
    "A100-80": Gpu(74.5, 312, 2.04e12),
    "A100-40": Gpu(37, 312, 1.56e12),
    "L40S": Gpu(44.7, 362, 0.86e12),
    "A6000": Gpu(44.7, 155, 0.77e12),
    "RTX4090": Gpu(22.4, 165, 1.01e12),
    "RTX3090": Gpu(22.4, 71, 0.94e12),
    "L4": Gpu(22.4, 121, 0.3e12),
}


@dataclass(frozen=True)
class Data:
    """A public dataset.

    Attributes:
        images: in all domains.
        domains: how many.
        classes: how many.
    """

    images: int
    domains: int
    classes: int


DATA = {
    "VLCS": Data(10_729, 4, 5),
    "PACS": Data(9_991, 4, 7),
    "OfficeHome": Data(15_588, 4, 65),
    "TerraIncognita": Data(24_788, 4, 10),
    "DomainNet": Data(586_575, 6, 345),
    "SVIRO": Data(56_000, 10, 7),
}

# The paper's models, for machines that hold neither them nor a way to the hub.
_INTERNVIT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
}  # fmt: skip
_QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 28, "vocab_size": 151_674}
KNOWN_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "OpenGVLab/InternVL3-8B-hf": (
        "InternVLForConditionalGeneration",
        {
            "vision_config": _INTERNVIT,
            "text_config": {
                **_QWEN2, "hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28,
                "num_key_value_heads": 4,
            },
            "tie_word_embeddings": False,
        },
    ),
    "OpenGVLab/InternVL3-2B-hf": (
        "InternVLForConditionalGeneration",
        {
            "vision_config": _INTERNVIT,
            "text_config": {
                **_QWEN2, "hidden_size": 1536, "intermediate_size": 8_960, "num_attention_heads": 12,
                "num_key_value_heads": 2,
            },
            "tie_word_embeddings": False,
        },
    ),
    "llava-hf/llava-1.5-7b-hf": (
        "LlavaForConditionalGeneration",
        {
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                "projection_dim": 768,
            },
            "text_config": {"model_type": "llama", "vocab_size": 32_064},
        },
    ),
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Return a GPU's data sheet by its name, whatever its spelling.

    Raises:
        ValueError: for one that is not in the table.
    """
    plain = "".join(char for char in name.upper() if char.isalnum()).removeprefix("NVIDIA").removesuffix("GB")
    for known, gpu in GPUS.items():
        if plain == known.upper().replace("-", ""):
            return gpu
    raise ValueError(f"GPU {name!r} is not known. Known: {', '.join(GPUS)}.")
