"""Tiny models with three-dimensional positions: Qwen-VL, GLM-V and relatives."""

from __future__ import annotations

from typing import Any

import transformers as tf

from builders.architecture_parts import MROPE, PIXELS, Built, _decoder, _ids, _words
from builders.families import CHATML, MEAN_AND_STD


def _qwen_words() -> Any:
    return _words("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


QWEN_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
QWEN_CHAT = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


def qwen2_vl() -> Built:
    words = _qwen_words()
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, **PIXELS}
    processor = tf.Qwen2VLProcessor(
        tf.Qwen2VLImageProcessor(**patches), words, tf.Qwen2VLVideoProcessor(**patches), chat_template=QWEN_CHAT
    )
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 14, "mlp_ratio": 2}
    text = _decoder("qwen2_vl_text", words, rope_parameters=MROPE)
    config = tf.Qwen2VLConfig(vision_config=vision, text_config=text, **_ids(words, **QWEN_IDS))
    return tf.Qwen2VLForConditionalGeneration(config), processor


def _qwen3_processor(words: Any) -> Any:
    pixels = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, **MEAN_AND_STD}
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, **pixels}
    return tf.Qwen3VLProcessor(
        tf.Qwen2VLImageProcessor(**patches), words, tf.Qwen3VLVideoProcessor(**patches), chat_template=QWEN_CHAT
    )


QWEN3_VISION = {
    "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 16,
    "out_hidden_size": 64, "num_position_embeddings": 16,
}  # fmt: skip
QWEN3_ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}


def qwen3_vl_moe() -> Built:
    words = _qwen_words()
    text = _decoder("qwen3_vl_moe_text", words, head_dim=16, rope_parameters=QWEN3_ROPE, **EXPERTS)
    vision = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
    config = tf.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **_ids(words, **QWEN_IDS))
    return tf.Qwen3VLMoeForConditionalGeneration(config), _qwen3_processor(words)


LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
    "rope_parameters": {**QWEN3_ROPE, "partial_rotary_factor": 1.0},
}  # fmt: skip


def qwen35() -> Built:
    words = _qwen_words()
    text = _decoder("qwen3_5_text", words, **LINEAR)
    config = tf.Qwen3_5Config(vision_config=QWEN3_VISION, text_config=text, **_ids(words, **QWEN_IDS))
    return tf.Qwen3_5ForConditionalGeneration(config), _qwen3_processor(words)


def qwen35_moe() -> Built:
    words = _qwen_words()
    text = _decoder("qwen3_5_moe_text", words, **LINEAR, **EXPERTS, shared_expert_intermediate_size=32)
    config = tf.Qwen3_5MoeConfig(vision_config=QWEN3_VISION, text_config=text, **_ids(words, **QWEN_IDS))
    return tf.Qwen3_5MoeForConditionalGeneration(config), _qwen3_processor(words)


GLM_IDS = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
GLM_VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14, "image_size": 56,
    "out_hidden_size": 64,
}  # fmt: skip


def _glm(name: str, kind: str, text_kind: str, **more: Any) -> Built:
    words = _words("<|image|>", *list(GLM_IDS.values())[1:])
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, **PIXELS}
    processor = getattr(tf, f"{kind}Processor")(
        getattr(tf, f"{kind}ImageProcessor")(**patches),
        words,
        getattr(tf, f"{kind}VideoProcessor")(**patches),
        chat_template=CHATML.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>"),
    )
    rope = {**MROPE, "partial_rotary_factor": 1.0}
    text = _decoder(text_kind, words, rope_parameters=rope, **more)
    config = getattr(tf, f"{name}Config")(vision_config=GLM_VISION, text_config=text, **_ids(words, **GLM_IDS))
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor


def glm4v() -> Built:
    return _glm("Glm4v", "Glm4v", "glm4v_text")


def glm46v() -> Built:
    return _glm("Glm46V", "Glm46V", "glm4v_text")


def glm4v_moe() -> Built:
    return _glm(
        "Glm4vMoe", "Glm4v", "glm4v_moe_text", head_dim=16, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
    )  # fmt: skip
