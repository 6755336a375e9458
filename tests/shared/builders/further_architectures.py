"""Tiny models of other decoders below InternVL's class, of what reads videos as well, and of further families."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from builders.architecture_parts import CLIP, EDGE, PIXELS, SIGLIP, Built, _chat, _decoder, _ids, _llava_like, _words
from builders.families import MEAN_AND_STD, _siglip
from builders.rotary_architectures import EXPERTS, QWEN_CHAT, _qwen_words


def _internvl(kind: str, **more: Any) -> Built:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = _words("<IMG_CONTEXT>", **named, video_token="<video>")
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(size=EDGE, crop_to_patches=False, **MEAN_AND_STD), words,
        tf.InternVLVideoProcessor(size=EDGE, **MEAN_AND_STD), image_seq_length=4, chat_template=_chat("<IMG_CONTEXT>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": [32, 32], "patch_size": [8, 8], "attention_bias": True,
    }  # fmt: skip
    config = tf.InternVLConfig(
        vision_config=vision, text_config=_decoder(kind, words, head_dim=16, **more), image_seq_length=4,
        tie_word_embeddings=False, **_ids(words, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    return tf.InternVLForConditionalGeneration(config), processor


def internvl35() -> Built:
    return _internvl("qwen3")


def internvl35_moe() -> Built:
    return _internvl("qwen3_moe", **EXPERTS)


def internvl35_gpt_oss() -> Built:
    return _internvl(
        "gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def blip2() -> Built:
    words = _words()
    processor = tf.Blip2Processor(tf.BlipImageProcessor(size=EDGE, **MEAN_AND_STD), words, num_query_tokens=4)
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    qformer = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
        "encoder_hidden_size": 64,
    }  # fmt: skip
    text = _decoder("opt", words, ffn_dim=128, word_embed_proj_dim=64)
    config = tf.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4,
        **_ids(words, image_token_index="<image>"),
    )  # fmt: skip
    return tf.Blip2ForConditionalGeneration(config), processor


def minicpm_v() -> Built:
    named = {
        "image_start_token": "<image>", "image_end_token": "</image>", "slice_start_token": "<slice>",
        "slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
        "video_token": "<|video_pad|>",
    }  # fmt: skip
    words = _words("<|image_pad|>", **named)
    images = {
        "patch_size": 14,
        "scale_resolution": 112,
        "max_slice_nums": 1,
        "slice_mode": False,
        "use_image_id": False,
    }
    processor = tf.MiniCPMV4_6Processor(
        tf.MiniCPMV4_6ImageProcessor(**images, **MEAN_AND_STD), tf.MiniCPMV4_6VideoProcessor(**images, **MEAN_AND_STD),
        words, chat_template=_chat("<|image_pad|>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 112, "patch_size": 14, "insert_layer_id": 1,
    }  # fmt: skip
    config = tf.MiniCPMV4_6Config(
        vision_config=vision, text_config=_decoder("qwen3", words, head_dim=16), image_size=112, insert_layer_id=1,
        **_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )  # fmt: skip
    return tf.MiniCPMV4_6ForConditionalGeneration(config), processor


def ernie45_vl_moe() -> Built:
    named = {
        "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>",
        "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>", "video_token": "<|VIDEO_PAD|>",
    }  # fmt: skip
    words = _words("<|IMAGE_PAD|>", **named)
    patches = {"patch_size": 14, "merge_size": 2, **PIXELS}
    processor = tf.Ernie4_5_VLMoeProcessor(
        tf.Ernie4_5_VLMoeImageProcessor(**patches), words,
        tf.Ernie4_5_VLMoeVideoProcessor(**patches, draw_on_frames=False),
        chat_template=_chat("<|IMAGE_START|><|IMAGE_PAD|><|IMAGE_END|>"),
    )  # fmt: skip
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14}
    text = _decoder(
        "ernie4_5_vl_moe_text", words, moe_intermediate_size=[32, 32], moe_k=2, moe_num_experts=4,
        moe_num_shared_experts=1, mlp_layer_types=["dense", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    )  # fmt: skip
    ids = {f"{name}_id": token for name, token in named.items()} | {"image_token_id": "<|IMAGE_PAD|>"}
    config = tf.Ernie4_5_VLMoeConfig(vision_config=vision, text_config=text, **_ids(words, **ids))
    return tf.Ernie4_5_VLMoeForConditionalGeneration(config), processor


def video_llama3() -> Built:
    words = _qwen_words()
    patches = {"patch_size": 14, "merge_size": 1, **PIXELS}
    processor = tf.VideoLlama3Processor(
        tf.VideoLlama3ImageProcessor(**patches), words, tf.VideoLlama3VideoProcessor(**patches | {"merge_size": 2}),
        chat_template=_chat("<|image_pad|>"),
    )  # fmt: skip
    vision = {k: v for k, v in _siglip(56).items() if k != "image_size"} | {"patch_size": 14}
    ids = _ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    config = tf.VideoLlama3Config(vision_config=vision, text_config=_decoder("qwen2", words), **ids)
    return tf.VideoLlama3ForConditionalGeneration(config), processor


def exaone45() -> Built:
    words = _qwen_words()
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, **PIXELS}
    processor = tf.Exaone4_5_Processor(
        tf.Qwen2VLImageProcessor(**patches), words, tf.Qwen2VLVideoProcessor(**patches), chat_template=QWEN_CHAT
    )
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_key_value_heads": 2,
        "patch_size": 14, "window_size": 56, "out_hidden_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = _decoder("exaone4", words, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    ids = _ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    config = tf.Exaone4_5_Config(vision_config=vision, text_config=text, **ids)
    return tf.Exaone4_5_ForConditionalGeneration(config), processor


def llava_next_video() -> Built:
    words = _words("<image>", video_token="<video>")
    images = {"size": {"shortest_edge": 32}, "crop_size": EDGE, **MEAN_AND_STD}
    processor = tf.LlavaNextVideoProcessor(
        tf.LlavaNextVideoVideoProcessor(**images),
        tf.LlavaNextImageProcessor(image_grid_pinpoints=[[32, 64], [64, 32]], **images), words, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=_chat(),
    )  # fmt: skip
    more = {"image_grid_pinpoints": [[32, 64], [64, 32]], **_ids(words, video_token_index="<video>")}
    return _llava_like("LlavaNextVideo", processor, words, vision=CLIP, **more)


def deepseek_vl_hybrid() -> Built:
    words = _words("<image_placeholder>")
    processor = tf.DeepseekVLHybridProcessor(
        tf.DeepseekVLHybridImageProcessor(
            size=EDGE, high_res_size={"height": 64, "width": 64}, **MEAN_AND_STD
        ),
        words, num_image_tokens=16, chat_template=_chat("<image_placeholder>"),
    )  # fmt: skip
    high = {
        "hidden_size": 64, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 8, "mlp_dim": 128, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16,
    }  # fmt: skip
    config = tf.DeepseekVLHybridConfig(
        vision_config=SIGLIP, high_res_vision_config=high, text_config=_decoder("llama", words),
        **_ids(words, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    model = tf.DeepseekVLHybridForConditionalGeneration(config)
    torch.nn.init.constant_(model.model.high_res_vision_alpha, 0.5)  # 0 in a random model
    return model, processor
