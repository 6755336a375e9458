"""Tiny random models of architectures without an entry in the table of families.

Configs, processors and model classes are transformers' own; tokenizers are small, and chat templates are ChatML with
the image token that each model has. Sizes and weights are not the models'.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import torch

from builders import convolutional
from builders import further_architectures as further
from builders import llava_architectures as llava
from builders import other_architectures as others
from builders import rotary_architectures as rotary
from builders.architecture_parts import Built
from builders.families import _save

BUILDERS: dict[str, Callable[[], Built]] = {
    "Qwen2-VL": rotary.qwen2_vl,
    "Qwen3-VL-MoE": rotary.qwen3_vl_moe,
    "Qwen3.5": rotary.qwen35,
    "Qwen3.5-MoE": rotary.qwen35_moe,
    "GLM-4.1V": rotary.glm4v,
    "GLM-4.6V": rotary.glm46v,
    "GLM-4.5V": rotary.glm4v_moe,
    "LLaVA-NeXT": llava.llava_next,
    "LLaVA-OneVision": llava.llava_onevision,
    "ViP-LLaVA": llava.vipllava,
    "Pixtral": llava.pixtral,
    "Mistral3": llava.mistral3,
    "AyaVision": llava.aya_vision,
    "Cohere2Vision": llava.cohere2_vision,
    "Ovis2": llava.ovis2,
    "LFM2-VL": llava.lfm2_vl,
    "DeepSeek-VL": llava.deepseek_vl,
    "Janus": llava.janus,
    "Aria": llava.aria,
    "Idefics2": llava.idefics2,
    "PaliGemma": llava.paligemma,
    "Llama4": others.llama4,
    "Mllama": others.mllama,
    "Gemma4": others.gemma4,
    "Gemma3n": convolutional.gemma3n,
    "Kimi-K2.5": others.kimi_k25,
    "Molmo2": others.molmo2,
    "PerceptionLM": others.perception_lm,
    "Granite4Vision": others.granite4_vision,
    "InternVL3.5": further.internvl35,
    "InternVL3.5-MoE": further.internvl35_moe,
    "InternVL3.5-GPT-OSS": further.internvl35_gpt_oss,
    "BLIP-2": further.blip2,
    "MiniCPM-V-4.6": further.minicpm_v,
    "ERNIE-4.5-VL": further.ernie45_vl_moe,
    "VideoLLaMA3": further.video_llama3,
    "EXAONE-4.5": further.exaone45,
    "LLaVA-NeXT-Video": further.llava_next_video,
    "DeepSeek-VL-Hybrid": further.deepseek_vl_hybrid,
}


def build(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Build one architecture's tiny model, the same every time, and return its folder."""
    torch.manual_seed(0)
    _save(folder, *BUILDERS[name]())
    return folder
