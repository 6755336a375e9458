"""Tiny random models of architectures that have no row in the table of families: a row each.

Configs, processors and model classes are transformers' own; tokenizers are small, and chat templates are ChatML with
the image token that each model has. Sizes and weights are not the models'.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from builders.families import CHATML, MEAN_AND_STD, TEXT, _save, _siglip, _text, _tokenizer

EDGE = {"height": 32, "width": 32}
PIXELS = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, **MEAN_AND_STD}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "projection_dim": 64,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **_siglip(32), "vision_use_head": False}
MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2]}
Built = tuple[torch.nn.Module, Any]


def _words(image: str = "<image>", *more: str, **named: str) -> Any:
    """Return a tokenizer of Qwen's kind with an image token, which has the ``named`` ones as attributes, too."""
    added = ["<|im_start|>", "<|im_end|>", image, *more, *named.values()]
    return _tokenizer(
        tf.Qwen2Tokenizer,
        "bytes",
        list(dict.fromkeys(added)),
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": image, **named},
    )


def _chat(image: str = "<image>") -> str:
    return CHATML.replace("IMAGE", image + "\\n")


def _decoder(kind: str, tokenizer: Any, **more: Any) -> dict[str, Any]:
    text = {"model_type": kind, **_text(tokenizer, num_key_value_heads=2), "bos_token_id": None}
    if kind == "mistral":
        text["sliding_window"] = None  # as in Mistral 0.2 and later
    return text | {"eos_token_id": tokenizer.eos_token_id, **more}


def _ids(tokenizer: Any, **tokens: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


# ---- Qwen, GLM, ERNIE: patches of any size, positions in three dimensions ----


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


# ---- LLaVA's kin: a vision encoder, a projector, a decoder ----


def _llava_like(name: str, processor: Any, words: Any, text: str = "llama", vision: Any = None, **more: Any) -> Built:
    config = getattr(tf, f"{name}Config")(
        vision_config=vision or CLIP,
        text_config=_decoder(text, words),
        image_token_index=words.convert_tokens_to_ids(words.image_token),
        **more,
    )
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor


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


# ---- others ----


def llama4() -> Built:
    marks = ["<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
    words = _words("<|image|>", *marks)
    processor = tf.Llama4Processor(
        tf.Llama4ImageProcessor(size=EDGE, max_patches=1, **MEAN_AND_STD), words, patch_size=8, pixel_shuffle_ratio=0.5,
        chat_template=_chat("<|image|>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "vision_output_dim": 64, "projector_input_dim": 64,
        "projector_output_dim": 64,
    }  # fmt: skip
    text = _decoder(
        "llama4_text", words, head_dim=16, intermediate_size_mlp=128, num_local_experts=4, num_experts_per_tok=1,
        attention_chunk_size=64,
    )  # fmt: skip
    ids = _ids(words, image_token_index="<|patch|>", boi_token_index="<|image_start|>", eoi_token_index="<|image_end|>")
    config = tf.Llama4Config(vision_config=vision, text_config=text, **ids)
    return tf.Llama4ForConditionalGeneration(config), processor


def mllama() -> Built:
    words = _words("<|image|>", "<|python_tag|>", "<|begin|>")
    words.bos_token = "<|begin|>"
    processor = tf.MllamaProcessor(
        tf.MllamaImageProcessor(size=EDGE, max_image_tiles=2, **MEAN_AND_STD), words, chat_template=_chat("<|image|>")
    )
    vision = {
        "hidden_size": 64, "attention_heads": 4, "num_hidden_layers": 2, "num_global_layers": 1,
        "intermediate_size": 128, "image_size": 32, "patch_size": 8, "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "vision_output_dim": 128,
        "intermediate_layers_indices": [1],
    }  # fmt: skip
    text = _decoder(
        "mllama_text_model", words, num_hidden_layers=3, cross_attention_layers=[1], bos_token_id=words.bos_token_id
    )
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = tf.MllamaConfig(vision_config=vision, text_config=text, **_ids(words, image_token_index="<|image|>"))
    model = tf.MllamaForConditionalGeneration(config)
    for name, gate in model.named_parameters():
        if "gate" in name and gate.numel() == 1:  # closed in a random model, which would be blind
            torch.nn.init.constant_(gate, 0.5)
    return model, processor


def gemma4() -> Built:
    named = {
        "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>", "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }  # fmt: skip
    words = _words("<|image|>", "<|video|>", **named)
    images = {"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(), tf.Gemma4ImageProcessor(**images), words,
        tf.Gemma4VideoProcessor(**images), chat_template=_chat("<|image|>"), image_seq_length=70,
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "patch_size": 8, "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }  # fmt: skip
    text = _text(
        words, num_key_value_heads=2, head_dim=16, global_head_dim=16, sliding_window=16, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=len(words) + 8,
        hidden_size_per_layer_input=8, bos_token_id=None, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    ids = _ids(
        words, image_token_id="<|image|>", video_token_id="<|video|>", boi_token_id="<|image>", eoi_token_id="<image|>",
        audio_token_id="<|audio|>", boa_token_id="<|audio>",
    )  # fmt: skip
    config = tf.Gemma4Config(vision_config=vision, text_config=text, audio_config=None, **ids)
    return tf.Gemma4ForConditionalGeneration(config), processor


def kimi_k25() -> Built:
    words = _words(
        "<|media_pad|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", video_token="<|kimi_video|>"
    )
    processor = tf.Kimi_K25Processor(
        tf.Kimi_K25ImageProcessor(size={"max_height": 56, "max_width": 56}, **MEAN_AND_STD), words,
        tf.Kimi_K25VideoProcessor(**MEAN_AND_STD), chat_template=_chat("<|media_pad|>"),
    )  # fmt: skip
    vision = {
        "patch_size": 14, "pos_emb_height": 4, "pos_emb_width": 4, "num_attention_heads": 4, "num_hidden_layers": 2,
        "hidden_size": 64, "intermediate_size": 128,
    }  # fmt: skip
    text = _decoder(
        "deepseek_v3", words, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    ids = _ids(words, image_token_id="<|media_pad|>", video_token_id="<|kimi_video|>")
    config = tf.Kimi_K25Config(vision_config=vision, text_config=text, projection_hidden_size=64, **ids)
    return tf.Kimi_K25ForConditionalGeneration(config), processor


def molmo2() -> Built:
    names = {
        "image_start_token_id": "<im_start>", "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>", "image_patch_id": "<im_patch>", "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }  # fmt: skip
    words = _words("<|image|>", *names.values(), "<im_col>", "<|video|>", "<im_low>")
    processor = tf.Molmo2Processor(
        tf.Molmo2ImageProcessor(size=EDGE, patch_size=8, max_crops=1, overlap_margins=[1, 1]),
        tf.Molmo2VideoProcessor(), words, chat_template=_chat("<|image|>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "image_size": [32, 32], "patch_size": 8, "num_position_embeddings": 16,
    }  # fmt: skip
    adapter = {
        "vision_feature_layer": [-1, -2], "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 16, "intermediate_size": 128, "text_hidden_size": 64,
    }  # fmt: skip
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(words), "additional_vocab_size": 8}
    config = tf.Molmo2Config(vision_config=vision, adapter_config=adapter, text_config=text, **_ids(words, **names))
    return tf.Molmo2ForConditionalGeneration(config), processor


def fast_vlm() -> Built:
    words = _words()
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **MEAN_AND_STD),
        words, patch_size=64, vision_feature_select_strategy="full", chat_template=_chat(),
    )  # fmt: skip
    vision = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 256, "initializer_range": 0.02,
        "model_args": {
            "inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 32, 64, 128], "mlp_ratios": [2] * 5,
        },
    }  # fmt: skip
    model, processor = _llava_like("FastVlm", processor, words, "qwen2", vision, image_seq_length=4)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):  # a deep chain of small random ones lets nothing through
            torch.nn.init.kaiming_normal_(layer.weight)
    return model, processor


def perception_lm() -> Built:
    words = _words("<|image|>", video_token="<|video|>")
    processor = tf.PerceptionLMProcessor(
        tf.PerceptionLMVideoProcessor(),
        tf.PerceptionLMImageProcessor(tile_size=32, size=EDGE, max_num_tiles=1, vision_input_type="vanilla"),
        words, patch_size=8, pooling_ratio=2, chat_template=_chat("<|image|>"),
    )  # fmt: skip
    vision = {
        "model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "do_pooling": True,
        "num_classes": 0, "global_pool": "map", "initializer_range": 0.02,
        "model_args": {
            "embed_dim": 64, "img_size": [32, 32], "patch_size": [8, 8], "depth": 2, "num_heads": 4,
            "global_pool": "", "use_post_transformer_norm": False, "ref_feat_shape": [4, 4],
        },
    }  # fmt: skip
    config = tf.PerceptionLMConfig(
        vision_config=vision, text_config=_decoder("llama", words), projector_pooling_ratio=2,
        **_ids(words, image_token_id="<|image|>", video_token_id="<|video|>"),
    )  # fmt: skip
    return tf.PerceptionLMForConditionalGeneration(config), processor


def granite4_vision() -> Built:
    words = _words()
    processor = tf.Granite4VisionProcessor(
        tf.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=EDGE, image_grid_pinpoints=[[32, 64], [64, 32]], **MEAN_AND_STD
        ),
        words, patch_size=8, vision_feature_select_strategy="full", downsample_rate="1/2", chat_template=_chat(),
    )  # fmt: skip
    qformer = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
        "encoder_hidden_size": 64,
    }  # fmt: skip
    config = tf.Granite4VisionConfig(
        vision_config=SIGLIP, text_config=_decoder("granite4_vision_text", words), qformer_config=qformer,
        vision_feature_select_strategy="full", image_grid_pinpoints=[[32, 64], [64, 32]], downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]], **_ids(words, image_token_index="<image>"),
    )  # fmt: skip
    return tf.Granite4VisionForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[], Built]] = {
    "Qwen2-VL": qwen2_vl,
    "Qwen3-VL-MoE": qwen3_vl_moe,
    "Qwen3.5": qwen35,
    "Qwen3.5-MoE": qwen35_moe,
    "GLM-4.1V": glm4v,
    "GLM-4.6V": glm46v,
    "GLM-4.5V": glm4v_moe,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "ViP-LLaVA": vipllava,
    "Pixtral": pixtral,
    "Mistral3": mistral3,
    "AyaVision": aya_vision,
    "Cohere2Vision": cohere2_vision,
    "Ovis2": ovis2,
    "LFM2-VL": lfm2_vl,
    "DeepSeek-VL": deepseek_vl,
    "Janus": janus,
    "Aria": aria,
    "Idefics2": idefics2,
    "PaliGemma": paligemma,
    "Llama4": llama4,
    "Mllama": mllama,
    "Gemma4": gemma4,
    "Kimi-K2.5": kimi_k25,
    "Molmo2": molmo2,
    "PerceptionLM": perception_lm,
    "Granite4Vision": granite4_vision,
}


def build(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Build one architecture's tiny model, the same every time, and return its folder."""
    torch.manual_seed(0)
    _save(folder, *BUILDERS[name]())
    return folder
