"""Tiny models of the LLaVA kind: a vision encoder, a projector, a decoder."""

from __future__ import annotations

from typing import Any

import transformers as tf

from builders.architecture_parts import EDGE, SIGLIP, Built, _chat, _decoder, _ids, _llava_like, _words
from builders.families import MEAN_AND_STD, _siglip, _text


def llava_next() -> Built:
    words = _words()
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=EDGE, image_grid_pinpoints=[[32, 64], [64, 32]], **MEAN_AND_STD
        ),
        words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_chat(),
    )  # fmt: skip
    return _llava_like("LlavaNext", processor, words, "mistral", image_grid_pinpoints=[[32, 64], [64, 32]])


def llava_onevision() -> Built:
    words = _words("<image>", "<video>", video_token="<video>")
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=EDGE, image_grid_pinpoints=[[32, 32], [32, 64]], **MEAN_AND_STD),
        words, tf.LlavaOnevisionVideoProcessor(size=EDGE, **MEAN_AND_STD),
        num_image_tokens=16, vision_feature_select_strategy="full", chat_template=_chat(),
    )  # fmt: skip
    more = {"image_grid_pinpoints": [[32, 32], [32, 64]], **_ids(words, video_token_index="<video>")}
    return _llava_like("LlavaOnevision", processor, words, "qwen2", SIGLIP, **more)


def vipllava() -> Built:
    words = _words()
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=EDGE, **MEAN_AND_STD),
        words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_chat(),
    )  # fmt: skip
    return _llava_like("VipLlava", processor, words, vision_feature_layers=[-2, -1, 1])


PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "head_dim": 16,
}  # fmt: skip


def _pixtral_processor(words: Any, merge: int) -> Any:
    images = tf.PixtralImageProcessor(patch_size=8, size={"longest_edge": 32}, **MEAN_AND_STD)
    return tf.PixtralProcessor(images, words, patch_size=8, spatial_merge_size=merge, chat_template=_chat("[IMG]"))


def pixtral() -> Built:
    words = _words("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    more = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return _llava_like("Llava", _pixtral_processor(words, 1), words, "mistral", PIXTRAL, **more)


def mistral3() -> Built:
    words = _words("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return _llava_like("Mistral3", _pixtral_processor(words, 2), words, "mistral", PIXTRAL)


def aya_vision() -> Built:
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"]
    words = _words("<image>", *marks)
    processor = tf.AyaVisionProcessor(
        tf.GotOcr2ImageProcessor(size=EDGE, crop_to_patches=True, **MEAN_AND_STD),
        words, patch_size=8, img_size=32, downsample_factor=2, chat_template=_chat(),
    )  # fmt: skip
    config = tf.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config=_decoder("cohere2", words, layer_types=["sliding_attention", "full_attention"], sliding_window=16),
        downsample_factor=2,
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return tf.AyaVisionForConditionalGeneration(config), processor


def cohere2_vision() -> Built:
    marks = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    words = _words("<|IMG_PATCH|>", **marks)
    processor = tf.Cohere2VisionProcessor(
        tf.Cohere2VisionImageProcessor(size=EDGE, patch_size=2, **MEAN_AND_STD),
        words,
        chat_template=_chat("<|IMG_PATCH|>"),
    )
    config = tf.Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config=_decoder("cohere2", words, layer_types=["sliding_attention", "full_attention"], sliding_window=16),
        image_token_id=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        alignment_intermediate_size=128,
    )
    return tf.Cohere2VisionForConditionalGeneration(config), processor


def ovis2() -> Built:
    marks = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = _words("<image>", *marks)
    processor = tf.Ovis2Processor(
        tf.Ovis2ImageProcessor(size=EDGE, **MEAN_AND_STD), words, image_seq_length=4, chat_template=_chat()
    )
    config = tf.Ovis2Config(
        vision_config={**_siglip(32), "vocab_size": 64, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        text_config=_decoder("qwen2", words),
        image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=words.convert_tokens_to_ids(marks[1:]),
        vocab_size=len(words) + 8,
        hidden_size=64,
    )
    return tf.Ovis2ForConditionalGeneration(config), processor


def lfm2_vl() -> Built:
    rows = [f"<|img_row_{r}_col_{c}|>" for r in range(1, 4) for c in range(1, 4)]
    words = _words("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *rows)
    processor = tf.Lfm2VlProcessor(
        tf.Lfm2VlImageProcessor(
            size=EDGE, tile_size=32, encoder_patch_size=8, min_image_tokens=4, max_image_tokens=4, **MEAN_AND_STD
        ),
        words,
        chat_template=_chat(),
    )
    vision = {
        "model_type": "siglip2_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "patch_size": 8, "num_patches": 16, "vision_use_head": False,
    }  # fmt: skip
    config = tf.Lfm2VlConfig(
        vision_config=vision,
        text_config=_decoder(
            "lfm2", words, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_L_cache=3
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        projector_hidden_size=64,
    )
    return tf.Lfm2VlForConditionalGeneration(config), processor


def deepseek_vl() -> Built:
    words = _words("<image_placeholder>")
    processor = tf.DeepseekVLProcessor(
        tf.DeepseekVLImageProcessor(size=EDGE, **MEAN_AND_STD), words, num_image_tokens=16,
        chat_template=_chat("<image_placeholder>"),
    )  # fmt: skip
    config = tf.DeepseekVLConfig(
        vision_config=SIGLIP, text_config=_decoder("llama", words), **_ids(words, image_token_id="<image_placeholder>")
    )
    return tf.DeepseekVLForConditionalGeneration(config), processor


def janus() -> Built:
    marks = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    words = _words("<image_placeholder>", **marks)
    processor = tf.JanusProcessor(
        tf.JanusImageProcessor(size=EDGE, **MEAN_AND_STD), words, num_image_tokens=16,
        chat_template=_chat("<image_placeholder>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        "mlp_ratio": 2.0, "projection_dim": 64, "num_image_tokens": 16,
    }  # fmt: skip
    vq = {
        "embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64,
    }  # fmt: skip
    config = tf.JanusConfig(
        vision_config=vision, vq_config=vq, text_config=_decoder("llama", words),
        **_ids(words, image_token_id="<image_placeholder>"),
    )  # fmt: skip
    return tf.JanusForConditionalGeneration(config), processor


def aria() -> Built:
    words = _words()
    processor = tf.AriaProcessor(
        tf.AriaImageProcessor(max_image_size=980, min_image_size=336, **MEAN_AND_STD), words, chat_template=_chat(),
        size_conversion={490: 4, 980: 4},
    )  # fmt: skip
    vision = {"model_type": "idefics3_vision", **_siglip(980), "patch_size": 70}
    config = tf.AriaConfig(
        vision_config=vision,
        text_config=_decoder("aria_text", words, moe_num_experts=4, moe_num_shared_experts=1),
        projector_patch_to_query_dict={196: 4},
        **_ids(words, image_token_index="<image>"),
    )
    return tf.AriaForConditionalGeneration(config), processor


def idefics2() -> Built:
    words = _words(
        "<image>", "<fake_token_around_image>", "<end_of_utterance>", image_boundary_token="<fake_token_around_image>"
    )
    processor = tf.Idefics2Processor(
        tf.Idefics2ImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}, **MEAN_AND_STD),
        words, image_seq_len=4, chat_template=_chat(),
    )  # fmt: skip
    perceiver = {
        "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
        "resampler_head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    config = tf.Idefics2Config(
        vision_config=_siglip(32), perceiver_config=perceiver, text_config=_decoder("mistral", words),
        **_ids(words, image_token_id="<image>"),
    )  # fmt: skip
    return tf.Idefics2ForConditionalGeneration(config), processor


def paligemma() -> Built:
    words = _words()
    images = tf.SiglipImageProcessor(size=EDGE, **MEAN_AND_STD)
    images.image_seq_length = 16
    words.bos_token = "<|im_start|>"
    processor = tf.PaliGemmaProcessor(images, words, chat_template=_chat())
    text = {"model_type": "gemma", **_text(words, num_key_value_heads=2, head_dim=16)}
    config = tf.PaliGemmaConfig(
        vision_config=SIGLIP, text_config=text, projection_dim=64, **_ids(words, image_token_index="<image>")
    )
    return tf.PaliGemmaForConditionalGeneration(config), processor
