"""Tiny random models of eight real architectures, saved as their checkpoints are: nothing comes from the hub.

Configs, processors, tokenizer classes, special tokens and chat templates are the families' own; only the sizes and the
weights are not.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from domainbed_reasoning.chains.chain import STAGE_TAGS
from domainbed_reasoning.chains.prompts import q_reason

CLASSES = ("dog", "alarm clock", "dog house", "axe")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ 'IMAGE' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS = (
    "START{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "{{ '<start_of_image>' }}{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MEAN_AND_STD = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.3, 0.2]}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@functools.cache
def _merges(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a small BPE vocabulary with its merges, byte-level or with byte fallback."""
    texts = [q_reason(CLASSES), " ".join(STAGE_TAGS), *CLASSES, "ASSISTANT: USER: assistant user model"] * 3
    backend = Tokenizer(models.BPE(byte_fallback=kind == "fallback"))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special, alphabet = ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
        alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    vocabulary = backend.get_vocab()
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return vocabulary, merges


def _tokenizer(cls: Any, kind: str, added: list[str], **settings: Any) -> Any:
    vocabulary, merges = _merges(kind)
    tokenizer = cls(vocab=dict(vocabulary), merges=list(merges), **settings)
    tokenizer.add_tokens([tf.AddedToken(text, special=True, normalized=False) for text in added])
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {**TEXT, "vocab_size": len(tokenizer) + 8, "pad_token_id": tokenizer.pad_token_id, **more}


def internvl(folder: pathlib.Path) -> torch.nn.Module:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(
        tf.Qwen2Tokenizer, "bytes", ["<|im_start|>", "<|im_end|>", *names.values()],
        eos_token="<|im_end|>", extra_special_tokens=names,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    processor = tf.InternVLProcessor(
        tf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, **MEAN_AND_STD),
        tokenizer,
        tf.InternVLVideoProcessor(size=size, **MEAN_AND_STD),
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\\n"),
    )
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": [32, 32], "patch_size": [8, 8], "attention_bias": True,
    }  # fmt: skip
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **_text(tokenizer, num_key_value_heads=2)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return _save(folder, tf.InternVLForConditionalGeneration(config), processor)


def llava(folder: pathlib.Path) -> torch.nn.Module:
    tokenizer = _tokenizer(
        tf.LlamaTokenizer, "fallback", ["<image>"],
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}, legacy=True,
    )  # fmt: skip
    # As the checkpoint's tokenizer.json has it: a text's beginning gets a space, and one of its own is a second.
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    edge = {"height": 24, "width": 24}
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=edge, **MEAN_AND_STD),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 24, "patch_size": 8, "projection_dim": 64,
    }  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **_text(tokenizer, num_key_value_heads=2)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
    )
    return _save(folder, tf.LlavaForConditionalGeneration(config), processor)


def _qwen_tokenizer() -> Any:
    added = [
        "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    ]  # fmt: skip
    return _tokenizer(tf.Qwen2Tokenizer, "bytes", added, eos_token="<|im_end|>")


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


QWEN_CHAT = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


def qwen25_vl(folder: pathlib.Path) -> torch.nn.Module:
    tokenizer = _qwen_tokenizer()
    pixels = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, **MEAN_AND_STD}
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, **pixels),
        tokenizer,
        tf.Qwen2VLVideoProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, **pixels),
        chat_template=QWEN_CHAT,
    )
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14, "window_size": 56,
        "out_hidden_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = _text(tokenizer, num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2]})
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_qwen_ids(tokenizer))
    return _save(folder, tf.Qwen2_5_VLForConditionalGeneration(config), processor)


def qwen3_vl(folder: pathlib.Path) -> torch.nn.Module:
    tokenizer = _qwen_tokenizer()
    pixels = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}, **MEAN_AND_STD}
    processor = tf.Qwen3VLProcessor(
        tf.Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, **pixels),
        tokenizer,
        tf.Qwen3VLVideoProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, **pixels),
        chat_template=QWEN_CHAT,
    )
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 16,
        "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    text = _text(
        tokenizer, num_key_value_heads=2, head_dim=16,
        rope_parameters={"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    )  # fmt: skip
    config = tf.Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_ids(tokenizer))
    return _save(folder, tf.Qwen3VLForConditionalGeneration(config), processor)


def _split_tags() -> list[str]:
    return ["<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]


def _siglip(edge: int) -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": edge, "patch_size": 8,
    }  # fmt: skip


def idefics3(folder: pathlib.Path) -> torch.nn.Module:
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    start = "<|begin_of_text|>"
    tokenizer = _llama3_tokenizer([start, "<|eot_id|>", *_split_tags(), *marks], marks)
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32}, **MEAN_AND_STD),
        tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS.replace("START", start),
    )
    config = tf.Idefics3Config(
        vision_config=_siglip(32),
        text_config={"model_type": "llama", **_text(tokenizer, num_key_value_heads=2)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, tf.Idefics3ForConditionalGeneration(config), processor)


def _llama3_tokenizer(added: list[str], extra: list[str]) -> Any:
    """Return a tokenizer of the class and kind that Llama 3 has: byte-level BPE in the generic fast class."""
    vocabulary, merges = _merges("bytes")
    backend = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=added[0],
        eos_token=extra[-1],
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([tf.AddedToken(text, special=True, normalized=False) for text in added])
    return tokenizer


def smolvlm(folder: pathlib.Path) -> torch.nn.Module:
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    start = "<|im_start|>"
    tokenizer = _tokenizer(
        tf.GPT2Tokenizer, "bytes", [start, *_split_tags(), *marks],
        eos_token="<end_of_utterance>", bos_token=start, pad_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": marks[0], "image_token": marks[1], "end_of_utterance_token": marks[2],
            "global_image_token": "<global-img>",
        },
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
    processor = tf.SmolVLMProcessor(
        tf.SmolVLMImageProcessor(**sizes, **MEAN_AND_STD),
        tokenizer,
        tf.SmolVLMVideoProcessor(
            **sizes, **MEAN_AND_STD, video_sampling={"max_frames": 4, "fps": 1, "video_size": {"longest_edge": 32}}
        ),
        image_seq_len=4,
        chat_template=IDEFICS.replace("START", start),
    )
    config = tf.SmolVLMConfig(
        vision_config=_siglip(32),
        text_config={"model_type": "llama", **_text(tokenizer, num_key_value_heads=2)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, tf.SmolVLMForConditionalGeneration(config), processor)


def gemma3(folder: pathlib.Path) -> torch.nn.Module:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(
        tf.GemmaTokenizer, "fallback", ["<start_of_turn>", "<end_of_turn>", *names.values()],
        extra_special_tokens=names, add_bos_token=True,
    )  # fmt: skip
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessor(size={"height": 32, "width": 32}, **MEAN_AND_STD),
        tokenizer,
        chat_template=GEMMA,
        image_seq_length=4,
    )
    text = _text(
        tokenizer, num_key_value_heads=2, head_dim=16, sliding_window=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    config = tf.Gemma3Config(
        vision_config={**_siglip(32), "vision_use_head": False},
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    model = tf.Gemma3ForConditionalGeneration(config)
    # A random Gemma 3's projection is all zeros: its language model would be blind.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return _save(folder, model, processor, eos=["<eos>", "<end_of_turn>"])


def fastvlm(folder: pathlib.Path) -> torch.nn.Module:
    tokenizer = _tokenizer(
        tf.Qwen2Tokenizer, "bytes", ["<|im_start|>", "<|im_end|>", "<image>"],
        eos_token="<|im_end|>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **MEAN_AND_STD),
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\\n"),
    )
    vision = {
        "model_type": "timm_wrapper", "architecture": "test_efficientnet", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 256, "model_args": {},
    }  # fmt: skip
    config = tf.FastVlmConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **_text(tokenizer, num_key_value_heads=2)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    model = tf.FastVlmForConditionalGeneration(config)
    with_running_statistics(model.model.vision_tower)
    return _save(folder, model.eval(), processor)


def with_running_statistics(tower: torch.nn.Module) -> None:
    """Have batch normalization hold what training leaves: without it the features of random weights vanish."""
    tower.train()
    with torch.no_grad():
        for module in tower.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        tower(torch.randn(8, 3, 64, 64))
        for weight in tower.parameters():
            if weight.dim() > 1:
                weight.div_(2.0)  # `_save` doubles them


def _save(
    folder: pathlib.Path, model: torch.nn.Module, processor: Any, eos: list[str] | None = None
) -> torch.nn.Module:
    """Save as `save_pretrained` does, with weights large enough that images and prompts change the answers."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2.0)
        # A small output head could never be sure of a token.
        model.get_output_embeddings().weight.mul_(4.0)
    tokenizer = processor.tokenizer
    ends = [tokenizer.convert_tokens_to_ids(token) for token in eos] if eos else tokenizer.eos_token_id
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


BUILDERS: dict[str, Callable[[pathlib.Path], torch.nn.Module]] = {
    "InternVL": internvl,
    "LLaVA-1.5": llava,
    "Qwen2.5-VL": qwen25_vl,
    "Qwen3-VL": qwen3_vl,
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
    "Gemma3": gemma3,
    "FastVLM": fastvlm,
}


def build(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Build one family's tiny model, the same every time, and return its folder."""
    torch.manual_seed(0)
    BUILDERS[name](folder)
    return folder
