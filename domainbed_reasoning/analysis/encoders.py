"""Pairs of image and text encoders: CLIP's towers, or those of a multimodal LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import tqdm

from domainbed_reasoning.analysis.checkpoints import open_checkpoint
from domainbed_reasoning.mllm import MLLM, ModelError
from domainbed_reasoning.mllm.clip import CLIP, is_clip, load_clip
from domainbed_reasoning.mllm.devices import default_device

DEFAULT = "openai/clip-vit-base-patch16"


class Encoder(Protocol):
    """Encodes images and texts as unit vectors."""

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images, ``(n, 3, H, W)`` bytes; return ``(n, d)``, float32, on the CPU."""

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode texts; return ``(n, d')``, float32, on the CPU."""


def load_encoder(name: str, model: str | None = None) -> Encoder:
    """Load a pair of encoders.

    Args:
        name: a CLIP model or an MLLM: a folder, a hub id, a job's folder or checkpoint, ``tiny`` (the embedded MLLM) or
            ``tiny-clip`` (random weights, for testing).
        model: base model, if the job's path no longer exists.

    Raises:
        ModelError: if the model cannot be used.
    """
    clip = clip_named(name)
    if clip is not None:
        return ClipEncoder(load_clip(clip).to(default_device()))
    return MLLMEncoder(open_checkpoint(name).load(model))


def clip_named(name: str) -> str | None:
    """Return the argument of `load_clip` for an encoder's name; None for an MLLM.

    Raises:
        ModelError: if the model is not available.
    """
    if name == "tiny-clip":
        return "tiny"
    return name if is_clip(name) else None


class ClipEncoder:
    """CLIP's two towers, which share a space; texts longer than 77 tokens are the mean over their windows."""

    def __init__(self, clip: CLIP):
        self.clip = clip

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Return the vectors of images."""
        parts = tqdm.tqdm(images.split(64), "encoding images", disable=None)
        return torch.cat([self.clip.image_features(part).float().cpu() for part in parts])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the vectors of texts."""
        starts = tqdm.tqdm(range(0, len(texts), 64), "encoding texts", disable=None)
        return torch.cat([self.clip.long_text_features(texts[i : i + 64]).float().cpu() for i in starts])


class MLLMEncoder:
    """An MLLM's own towers, which do not share a space and were not trained for comparison.

    An image is the mean of its projected tokens, a text the mean of the language model's last hidden states.
    """

    def __init__(self, mllm: MLLM):
        if not mllm.family.tree:
            raise ModelError(
                f"{mllm.family.name} runs on the general path, which cannot encode with separate towers. Use CLIP as "
                "the encoder, or a model of a family with shared-prefix rows."
            )
        self.mllm = mllm

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Return the vectors of images."""
        return _unit([self._image(image) for image in tqdm.tqdm(images, "encoding images", disable=None)])

    def _image(self, image: torch.Tensor) -> torch.Tensor:
        encoded = self.mllm.encode(image[None])
        if "groups" in encoded:  # dynamic tiles
            encoded = encoded["groups"][0].encoded
        features = encoded["mm_encoder_outputs"]["image"].pooler_output
        rows = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        return rows.flatten(0, -2).mean(0)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the vectors of texts."""
        return _unit([self._text(text) for text in tqdm.tqdm(texts, "encoding texts", disable=None)])

    def _text(self, text: str) -> torch.Tensor:
        ids = self.mllm.tokenizer(self.mllm.chat_format.escape(text), return_tensors="pt")["input_ids"].to(
            self.mllm.device
        )
        embedded = self.mllm.base.get_input_embeddings()(ids)
        hidden: torch.Tensor = self.mllm.base.model.language_model(inputs_embeds=embedded, use_cache=False)[0][0]
        return hidden.mean(0)


def _unit(vectors: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.stack(vectors).float().cpu(), dim=-1)
