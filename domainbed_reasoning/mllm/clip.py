"""CLIP's two towers (Radford et al., ICML 2021, arXiv 2103.00020): images and texts as unit vectors of one space."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning.mllm.adapters import adapted
from domainbed_reasoning.mllm.families import ModelError
from domainbed_reasoning.mllm.loading import resolve
from domainbed_reasoning.mllm.opening import loading, read_config
from domainbed_reasoning.mllm.pixels import resize, to_uint8

# OpenAI's normalization, which every CLIP of theirs has.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_TINY_EDGE = 48
_TINY_SEED = 2103
_LAYERS = r".*\.self_attn\.[qkv]_proj"


class CLIP(torch.nn.Module):
    """A CLIP model, with or without adapters, and its tokenizer.

    Attributes:
        network: the transformers model, or the PEFT model around it.
        tokenizer: its tokenizer.
        image_size: edge in pixels of the images that the model sees.
    """

    _mean: torch.Tensor
    _std: torch.Tensor

    def __init__(self, network: torch.nn.Module, tokenizer: Any):
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.image_size: int = self.base.config.vision_config.image_size
        self._length = self.base.config.text_config.max_position_embeddings
        self.register_buffer("_mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(_STD)[:, None, None], persistent=False)

    @property
    def base(self) -> Any:
        """The transformers model, including adapters."""
        network: Any = self.network
        return network.base_model.model if hasattr(network, "peft_config") else network

    @property
    def logit_scale(self) -> torch.Tensor:
        """What cosines are multiplied by, a scalar above 0."""
        scale: torch.Tensor = self.base.logit_scale.exp()
        return scale

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images' unit vectors, ``(n, d)``.

        An image is squeezed to a square, as DomainBed's evaluation does, where CLIP's own would cut its sides off.

        Args:
            images: ``(n, c, H, W)``, bytes or DomainBed's floats.
        """
        pixels = resize(to_uint8(images.as_subclass(torch.Tensor)), self.image_size).to(self._mean.device)
        pixels = (pixels.float() / 255 - self._mean) / self._std
        features = self.base.get_image_features(pixel_values=pixels.to(self.base.dtype), return_dict=True)
        return torch.nn.functional.normalize(features.pooler_output, dim=-1)

    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the texts' unit vectors, ``(n, d)``; texts are truncated to CLIP's 77 tokens."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return self._text_vectors(tokens["input_ids"], tokens["attention_mask"])

    def long_text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the texts' unit vectors, ``(n, d)``: the mean over windows of 77 tokens."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._length,
            return_overflowing_tokens=True,
            return_tensors="pt",
        )
        vectors = self._text_vectors(tokens["input_ids"], tokens["attention_mask"])
        text = tokens["overflow_to_sample_mapping"].to(vectors.device)
        sums = vectors.new_zeros(len(texts), vectors.shape[1]).index_add(0, text, vectors)
        return torch.nn.functional.normalize(sums, dim=-1)

    def _text_vectors(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        where = self._mean.device
        features = self.base.get_text_features(ids.to(where), attention_mask=mask.to(where), return_dict=True)
        return torch.nn.functional.normalize(features.pooler_output, dim=-1)

    def adapters(self) -> dict[str, torch.Tensor]:
        """Return the trainable tensors by name; empty for a base model."""
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}

    def load_adapters(self, values: Mapping[str, torch.Tensor]) -> None:
        """Load adapter values by name.

        Raises:
            ValueError: for tensors that do not match this model's adapters.
        """
        odd = sorted(self.adapters().keys() ^ values.keys())
        if odd:
            raise ValueError(f"the checkpoint's adapters do not match this CLIP: only one of them has {odd[0]!r}.")
        try:
            self.network.load_state_dict(values, strict=False)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's adapters do not match this CLIP ({error}).") from error


def load_clip(model: str) -> CLIP:
    """Load a CLIP with frozen weights in float32, in evaluation mode, on the CPU.

    Args:
        model: a folder, a hub id, or ``tiny``: 62,000 random weights, the same ones everywhere, never trained.

    Raises:
        ModelError: if the model cannot be loaded or is not a CLIP.
    """
    import transformers

    if model == "tiny":
        network, tokenizer = _tiny()
    else:
        where = resolve(model)
        _config(model, where)
        with loading(model, where):
            network = transformers.CLIPModel.from_pretrained(where, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    network.requires_grad_(False)
    return CLIP(network.eval(), tokenizer)


def add_clip_lora(clip: CLIP, rank: int, alpha: float, dropout: float) -> CLIP:
    """Return ``clip`` with trainable adapters on queries, keys and values of both towers.

    As CLIP-LoRA (Zanella and Ben Ayed, CVPR workshops 2024, arXiv 2405.18541): in every layer, scaled by alpha / √rank.
    """
    network = adapted(
        clip.network, r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_LAYERS, use_rslora=True
    )
    return CLIP(network, clip.tokenizer)


def clip_image_edge(model: str) -> int:
    """Return the edge in pixels at which a CLIP sees an image, from its config alone.

    Raises:
        ModelError: if the model cannot be loaded or is not a CLIP.
    """
    return _TINY_EDGE if model == "tiny" else int(_config(model, resolve(model)).vision_config.image_size)


def is_clip(model: str) -> bool:
    """Return whether a folder or hub id holds a CLIP.

    Raises:
        ModelError: if the model cannot be loaded.
    """
    if (pathlib.Path(model).expanduser() / "task.json").is_file():
        return False  # a job of an MLLM algorithm
    where = resolve(model)
    try:
        return bool(read_config(model, where).model_type == "clip")
    except ModelError:
        return False


def _config(model: str, where: str) -> Any:
    config = read_config(model, where)
    if config.model_type != "clip":
        raise ModelError(
            f"model {model!r} is of type {config.model_type!r}, not CLIP. Use a CLIP folder or hub id, such as "
            "'openai/clip-vit-base-patch16', or 'tiny'."
        )
    return config


def _tiny() -> tuple[torch.nn.Module, Any]:
    """Return a random CLIP of 2 + 2 layers, and a byte-level tokenizer without merges."""
    import transformers
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        projection_dim=32,
        text_config={**tower, **ends, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(words)},
        vision_config={**tower, "image_size": _TINY_EDGE, "patch_size": 8},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_TINY_SEED)
        return transformers.CLIPModel(config), tokenizer
