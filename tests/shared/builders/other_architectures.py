"""Tiny models of mixtures, cross-attention, convolutional towers and others."""

from __future__ import annotations

import torch
import transformers as tf

from builders.architecture_parts import EDGE, SIGLIP, Built, _chat, _decoder, _ids, _words
from builders.families import MEAN_AND_STD, TEXT, _text


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
        "num_key_value_heads": 4, "head_dim": 16, "image_size": [32, 32], "patch_size": 8,
        "num_position_embeddings": 16,
    }  # fmt: skip
    adapter = {
        "vision_feature_layer": [-1, -2], "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 16, "intermediate_size": 128, "text_hidden_size": 64,
    }  # fmt: skip
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(words), "additional_vocab_size": 8}
    config = tf.Molmo2Config(vision_config=vision, adapter_config=adapter, text_config=text, **_ids(words, **names))
    return tf.Molmo2ForConditionalGeneration(config), processor


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
