"""Checkpoint folders as they are on the hub, with random weights: what no test with a tiny model exercises.

Sizes, configs, generation configs, image processors, chat templates and special tokens with their ids are those of the
published checkpoints. Tokenizers have the published size, class and pre-tokenization, and a vocabulary made here: what
BPE learns from this package's chains, then pairs of those tokens. Weights are bfloat16 in sharded safetensors with an
index, the head untied as published.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from domainbed_reasoning.chains.bundled import read_bundle
from domainbed_reasoning.mllm.loading import TINY
from domainbed_reasoning.results.published import KNOWN_CONFIGS

_LEARNED = 8_000  # tokens that BPE learns; the rest are pairs of these
_CHAINS = 500  # that it learns from
_PLAIN = ("<tool", "</tool", "<|fim", "<|repo", "<|file")  # added tokens that are not special
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        name: its hub id.
        architecture: its model class.
        config: of its config.json.
        generation: of its generation_config.json.
        processor: makes its processor.
        dtype: it is loaded in: bfloat16, what training takes on a GPU.
        weights: whether they are written; without, a model is counted on the meta device.
        shard: largest weight file; published ones have up to 5 GB, so that these models would be one file.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    processor: Callable[[], Any]
    dtype: str = "bfloat16"
    weights: bool = True
    shard: str = "1GB"


def build(checkpoint: Checkpoint, folder: pathlib.Path) -> int:
    """Write a checkpoint's folder, the same every time; return the number of its parameters."""
    import transformers

    processor = checkpoint.processor()
    config = _config(checkpoint)
    torch.manual_seed(0)
    with torch.device("cpu" if checkpoint.weights else "meta"):
        network: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    network.generation_config = transformers.GenerationConfig(**checkpoint.generation)
    if checkpoint.weights:
        network.save_pretrained(folder, max_shard_size=checkpoint.shard)
    else:
        network.config.save_pretrained(folder)
        network.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(weight.numel() for weight in network.parameters())


def _config(checkpoint: Checkpoint) -> Any:
    import transformers

    kind = checkpoint.architecture.removesuffix("ForConditionalGeneration")
    return getattr(transformers, f"{kind}Config")(**checkpoint.config, architectures=[checkpoint.architecture])


def shrunken(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with two narrow layers a tower, and everything else as published."""
    config = dict(checkpoint.config)
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    text |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text.pop("head_dim", None)
    config |= {"text_config": text, "vision_config": vision}
    return replace(checkpoint, config=config, shard="10MB")


# ---- tokenizers ----


def vocabulary(size: int, first: tuple[str, ...] = ()) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-level BPE vocabulary of ``size`` tokens, those of ``first`` before all others, and its merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_LEARNED,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chains = (str(record["chain"]) for _, record in read_bundle("PACS").lines[:_CHAINS])
    backend.train_from_iterator(chains, trainer)
    merges = [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]
    words = backend.get_vocab()
    learned = sorted(set(words) - set(first), key=lambda word: words[word])
    for left, right in itertools.product(learned, learned):
        if len(words) == size:
            break
        if left + right not in words:
            words[left + right] = len(words)
            merges.append((left, right))
    return words, merges


def _added(tokens: tuple[str, ...]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(token, special=not token.startswith(_PLAIN), normalized=False) for token in tokens]


# 151,643 and up.
_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
# 151,665 and up; the last has no row in the embedding of 151,674.
_INTERNVL_TOKENS = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>",
)  # fmt: skip
# 0 to 16 of SmolLM2.
_SMOLLM_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
)  # fmt: skip
# 49,152 and up.
_SMOLVLM_TOKENS = (
    "<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>", "<image>", *(f"<|reserved_special_token_{index}|>" for index in range(88)),
    "<end_of_utterance>",
)  # fmt: skip


def _tokenizer(cls: Any, words: Any, tokens: tuple[str, ...], **settings: Any) -> Any:
    """Return a tokenizer of that class whose added tokens have their published ids, which follow their order."""
    plain = cls(vocab=words[0], merges=words[1])
    plain.add_tokens(_added(tokens))
    return cls(tokenizer_object=plain.backend_tokenizer, **settings)


def _qwen_tokenizer(added: tuple[str, ...] = (), **settings: Any) -> Any:
    import transformers

    tokens = _QWEN_TOKENS + added
    return _tokenizer(transformers.Qwen2Tokenizer, vocabulary(151_643), tokens, eos_token="<|im_end|>", **settings)


# ---- processors ----


def _internvl_processor() -> Any:
    import transformers

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    size = {"height": 448, "width": 448}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size=size, crop_to_patches=False, min_patches=1, max_patches=12, **_IMAGENET
        ),
        _qwen_tokenizer(_INTERNVL_TOKENS, extra_special_tokens=named),
        transformers.InternVLVideoProcessor(size=size, **_IMAGENET),
        image_seq_length=256,
        chat_template=(TINY / "chat_template.jinja").read_text(encoding="utf-8"),
    )


_SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _smolvlm_processor() -> Any:
    import transformers

    tokens = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    tokenizer = _tokenizer(
        transformers.GPT2Tokenizer,
        vocabulary(49_152, _SMOLLM_TOKENS),
        _SMOLLM_TOKENS + _SMOLVLM_TOKENS,
        extra_special_tokens=named,
        **tokens,
    )
    sizes = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, **_HALF}
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**sizes),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**sizes, video_sampling=sampling),
        image_seq_len=64,
        chat_template=_SMOLVLM_TEMPLATE,
    )


# ---- the checkpoints ----

_TURN = {"bos_token_id": 151_643, "eos_token_id": 151_645}
_QWEN25 = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, **_TURN}


def _internvl(name: str, text: Mapping[str, Any], weights: bool = True) -> Checkpoint:
    known = KNOWN_CONFIGS["OpenGVLab/InternVL3-2B-hf"][1]  # the others' but for the decoder
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    config = {
        **known,
        "text_config": {**known["text_config"], **_QWEN25, "rope_parameters": rope, **text},
        "image_token_id": 151_667,
    }
    return Checkpoint(name, "InternVLForConditionalGeneration", config, _TURN, _internvl_processor, weights=weights)


_SMOLVLM2_500M: dict[str, Any] = {
    "text_config": {
        "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49_280,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "pad_token_id": 2, "bos_token_id": 1,
        "eos_token_id": 49_279, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    },
    "scale_factor": 4, "image_token_id": 49_190, "pad_token_id": 128_002, "tie_word_embeddings": False,
}  # fmt: skip

CHECKPOINTS = {
    "InternVL3-1B": _internvl(
        "OpenGVLab/InternVL3-1B-hf",
        {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        },
    ),
    "InternVL3-2B": _internvl("OpenGVLab/InternVL3-2B-hf", {}),
    "InternVL3-8B": _internvl(
        "OpenGVLab/InternVL3-8B-hf", KNOWN_CONFIGS["OpenGVLab/InternVL3-8B-hf"][1]["text_config"], weights=False
    ),
    "SmolVLM2-500M": Checkpoint(
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "SmolVLMForConditionalGeneration",
        _SMOLVLM2_500M,
        {"bos_token_id": 1, "eos_token_id": 49_279, "pad_token_id": 2},
        _smolvlm_processor,
    ),
}  # fmt: skip
