"""A tiny Gemma 3n: a convolutional vision tower, an audio tower that no image reaches, per-layer embeddings."""

from __future__ import annotations

import torch
import transformers as tf

from builders.architecture_parts import Built, _chat, _ids, _words
from builders.families import MEAN_AND_STD, _text, with_running_statistics


def gemma3n() -> Built:
    named = {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "audio_token": "<audio_soft_token>",
        "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>",
    }  # fmt: skip
    words = _words("<image_soft_token>", **named)
    words.image_token_id, words.audio_token_id = (
        words.convert_tokens_to_ids(token) for token in (words.image_token, words.audio_token)
    )
    edge = {"height": 64, "width": 64}
    processor = tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(), tf.SiglipImageProcessor(size=edge, **MEAN_AND_STD), words,
        chat_template=_chat("<image_soft_token>"), image_seq_length=4, audio_seq_length=4,
    )  # fmt: skip
    size = len(words) + 8
    text = _text(
        words, num_key_value_heads=2, head_dim=16, sliding_window=16, num_hidden_layers=4, vocab_size=size,
        vocab_size_per_layer_input=size, hidden_size_per_layer_input=8, num_kv_shared_layers=1, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2, intermediate_size=[128] * 4,
        activation_sparsity_pattern=[0.0] * 4, bos_token_id=None, eos_token_id=words.eos_token_id,
    )  # fmt: skip
    vision = {
        "model_type": "gemma3n_vision", "architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 4,
        "vocab_offset": size - 8, "model_args": {},
    }  # fmt: skip
    audio = {
        "vocab_size": 4, "vocab_offset": size - 4, "hidden_size": 32, "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 4, "sscp_conv_channel_size": [8, 4], "input_feat_size": 128,
    }  # fmt: skip
    ids = _ids(
        words, image_token_id="<image_soft_token>", boi_token_id="<start_of_image>", eoi_token_id="<end_of_image>",
        audio_token_id="<audio_soft_token>", boa_token_id="<start_of_audio>", eoa_token_id="<end_of_audio>",
    )  # fmt: skip
    config = tf.Gemma3nConfig(
        vision_config=vision, audio_config=audio, text_config=text, vision_soft_tokens_per_image=4, **ids
    )
    model = tf.Gemma3nForConditionalGeneration(config)
    with_running_statistics(model.model.vision_tower)
    for layer in model.model.language_model.layers:
        torch.nn.init.ones_(layer.altup.correct_output_scale)  # zero in a random model: per-layer inputs would be idle
    return model.eval(), processor
