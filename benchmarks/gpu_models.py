"""Random models of published shapes, as folders that `load_mllm` loads: what `benchmarks.gpu` runs on."""

from __future__ import annotations

import pathlib
from typing import Any

import torch

from benchmarks import small_internvl
from domainbed_reasoning.results.published import KNOWN_CONFIGS

MODELS = {"8B": "OpenGVLab/InternVL3-8B-hf", "2B": "OpenGVLab/InternVL3-2B-hf"}
TINY = small_internvl.Size(width=128, inner=256, layers=2, vision_width=64, vision_layers=1)
TINY_EDGE = 112  # pixels; 16 tokens of the language model


def build(folder: pathlib.Path, name: str, device: torch.device) -> str:
    """Save a random model with the embedded model's tokenizer; return the folder.

    Args:
        folder: to create.
        name: of `MODELS`, in bfloat16 and sharded, or ``tiny``.
        device: where the weights are drawn, which for 8B takes minutes on a CPU.
    """
    if name == "tiny":
        return small_internvl.build(folder, TINY, TINY_EDGE)
    import transformers

    from domainbed_reasoning.mllm.loading import TINY as EMBEDDED

    tokens: Any = transformers.AutoConfig.from_pretrained(EMBEDDED)
    config: Any = transformers.InternVLConfig(**KNOWN_CONFIGS[MODELS[name]][1])
    config.image_token_id = tokens.image_token_id
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(config.text_config, key, getattr(tokens.text_config, key))
    config.image_seq_length = (small_internvl.EDGE // 28) ** 2
    torch.manual_seed(0)
    with device:
        network = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    network.generation_config.eos_token_id = config.text_config.eos_token_id
    network.generation_config.pad_token_id = config.text_config.pad_token_id
    network.save_pretrained(folder, max_shard_size="4GB")
    small_internvl.save_processor(folder, config.image_seq_length)
    return str(folder)
