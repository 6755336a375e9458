"""SmolLM2-135M-Instruct and EfficientNet-Lite0 as one model of transformers' FastVLM architecture.

The projector between the two starts at random; `align` trains it. The vision tower has convolutions only and stays as
it was trained on ImageNet.
"""

from __future__ import annotations

import pathlib
from typing import Any

import timm
import torch
import transformers as tf

IMAGE_TOKEN = "<image>"
EDGE = 224  # pixels, of an image
ARCHITECTURE = "tf_efficientnet_lite0"  # of timm; its last feature map is 7 x 7 at 224 pixels
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_language_model(folder: pathlib.Path) -> tuple[Any, Any]:
    """Return SmolLM2 in float32 and its tokenizer, from the GGUF file below ``folder``."""
    file = next(folder.rglob("*.gguf"))
    tokenizer = tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model, tokenizer


def read_tower(folder: pathlib.Path) -> torch.nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet classifier, from the checkpoint below ``folder``.

    The checkpoint names its tensors otherwise than timm and has them in the same order.

    Raises:
        ValueError: the checkpoint's tensors do not have timm's shapes.
    """
    saved = torch.load(next(folder.rglob("*.pth")), map_location="cpu", weights_only=True)
    tower: torch.nn.Module = timm.create_model(ARCHITECTURE)
    own = tower.state_dict()
    if [value.shape for value in saved.values()] != [value.shape for value in own.values()]:
        raise ValueError(f"{folder}: the checkpoint's {len(saved)} tensors do not match timm's {ARCHITECTURE}.")
    tower.load_state_dict(dict(zip(own, saved.values(), strict=True)))
    return tower.eval()


def compose(language_model: Any, tokenizer: Any, tower: torch.nn.Module, architecture: str = ARCHITECTURE) -> Any:
    """Return a FastVLM of these parts, its projector random, and its processor.

    Args:
        language_model: a causal language model with tied embeddings.
        tokenizer: its tokenizer, which gets the image token; turns end with ``<|im_end|>``.
        tower: a timm model of that architecture.
        architecture: its name in timm.

    Returns:
        the model in float32, and the processor.
    """
    tokenizer.add_tokens([tf.AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    with torch.no_grad():
        channels, rows, columns = tower.forward_features(torch.zeros(1, 3, EDGE, EDGE)).shape[1:]  # type: ignore[operator]

    text = language_model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "transformers_version", "dtype"):
        text.pop(key, None)
    text["vocab_size"] = -(-max(len(tokenizer), text["vocab_size"]) // 8) * 8
    config = tf.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": architecture,
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": channels,
            "model_args": {},
        },
        text_config={**text, "tie_word_embeddings": True},
        image_token_index=image_token,
        image_seq_length=rows * columns,
        tie_word_embeddings=True,
    )
    model = tf.FastVlmForConditionalGeneration(config).float().eval()
    own = model.model.vision_tower.timm_model
    own.load_state_dict({name: value for name, value in tower.state_dict().items() if name in own.state_dict()})

    # A model read from GGUF refuses save_pretrained, so its weights go into a new one. New tokens start at the mean.
    weights = language_model.model.state_dict()
    known = weights.pop("embed_tokens.weight")
    embedding = known.mean(0).repeat(text["vocab_size"], 1)
    embedding[: len(known)] = known
    model.model.language_model.load_state_dict({**weights, "embed_tokens.weight": embedding})
    model.tie_weights()
    model.generation_config = tf.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(
            size={"shortest_edge": EDGE},
            crop_size={"height": EDGE, "width": EDGE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer,
        patch_size=EDGE // rows,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
    return model, processor
