"""InternVL3's architecture, small and random, at the paper's token counts: what the benchmarks run on.

A picture of 448 pixels is 1024 patches and 256 tokens, as in InternVL3; the tokenizer is the embedded model's without
the tokens that stand for whole sentences, so that the instructions cost about what they cost in InternVL3 (49 and 96
tokens; there 45 and 85).
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any

import torch

EDGE = 448


@dataclass(frozen=True)
class Size:
    """Widths and layers.

    Attributes:
        width: of the language model; heads are 64 wide, an eighth to a quarter of them have keys of their own.
        inner: of its feed-forward layers.
        layers: of it.
        vision_width: of the image encoder.
        vision_layers: of it.
        vocabulary: tokens of the output head, 2048 at least.
    """

    width: int
    inner: int
    layers: int
    vision_width: int
    vision_layers: int
    vocabulary: int = 2048


# Training: the image encoder has a fifth of the operations (8B: 8%, 2B: 36%), the output head a tenth of the weights
# (8B: 8%). Scoring 65 names: the encoder has an eighth (8B: 9%).
TRAINING = Size(width=512, inner=1792, layers=3, vision_width=192, vision_layers=2)
SCORING = Size(width=192, inner=512, layers=1, vision_width=32, vision_layers=1)


def build(folder: pathlib.Path, size: Size, edge: int = EDGE) -> str:
    """Save a model of that size with its processor, the same every time; return the folder."""
    import transformers

    from domainbed_reasoning.mllm.loading import TINY

    config = transformers.AutoConfig.from_pretrained(TINY)
    heads = max(1, size.width // 64)
    text: dict[str, Any] = {"hidden_size": size.width, "intermediate_size": size.inner, "vocab_size": size.vocabulary}
    text |= {"num_hidden_layers": size.layers, "layer_types": ["full_attention"] * size.layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}
    vision = {"hidden_size": size.vision_width, "intermediate_size": 4 * size.vision_width}
    vision |= {"num_hidden_layers": size.vision_layers, "num_attention_heads": max(1, size.vision_width // 64)}
    vision |= {"image_size": [edge, edge], "patch_size": [14, 14]}
    config.text_config.update(text)
    config.vision_config.update(vision)
    config.image_seq_length = (edge // 28) ** 2
    torch.manual_seed(0)
    network = transformers.AutoModelForImageTextToText.from_config(config).to(torch.float32)
    network.generation_config.eos_token_id = config.text_config.eos_token_id
    network.generation_config.pad_token_id = config.text_config.pad_token_id
    network.save_pretrained(folder)
    save_processor(folder, config.image_seq_length, edge)
    return str(folder)


def save_processor(folder: pathlib.Path, tokens: int, edge: int = EDGE) -> None:
    """Save the embedded model's processor, without tokens for sentences, for images of so many tokens and pixels."""
    import transformers
    from tokenizers import Tokenizer

    from domainbed_reasoning.mllm.loading import TINY

    processor = transformers.AutoProcessor.from_pretrained(TINY)
    processor.image_processor.size = {"height": edge, "width": edge}
    processor.image_seq_length = tokens
    processor.save_pretrained(folder)
    words = json.loads((TINY / "tokenizer.json").read_text("utf-8"))
    words["added_tokens"] = [token for token in words["added_tokens"] if len(token["content"]) < 20]
    Tokenizer.from_str(json.dumps(words)).save(str(folder / "tokenizer.json"))


def chain(tokenizer: Any, length: int, name: str) -> str:
    """Return a five-stage chain of about so many tokens that concludes with ``name``."""
    from domainbed_reasoning.chains.chain import Chain

    reasoning = "the body is round and the head is horned"
    while True:
        text = Chain("I look at the parts", "a thing on the ground", reasoning, "the colour may mislead", name).render()
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= length:
            return text
        reasoning += ", the feet are wheeled and the coat is plain"
