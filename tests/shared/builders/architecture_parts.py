"""Parts shared by the tiny models of further architectures: words, chat template, vision configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from builders.families import CHATML, MEAN_AND_STD, _siglip, _text, _tokenizer

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


def _llava_like(name: str, processor: Any, words: Any, text: str = "llama", vision: Any = None, **more: Any) -> Built:
    config = getattr(tf, f"{name}Config")(
        vision_config=vision or CLIP,
        text_config=_decoder(text, words),
        image_token_index=words.convert_tokens_to_ids(words.image_token),
        **more,
    )
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor
