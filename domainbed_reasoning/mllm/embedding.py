"""Place image features among the token embeddings of a row, at positions that the host knows from the prompt.

transformers searches for the image tokens on the GPU and synchronizes twice to compare their number with the images'.
All rows of a question begin with the same prompt, so that shapes alone tell whether they match.
"""

from __future__ import annotations

from typing import Any

import torch

from domainbed_reasoning.mllm.families import is_general
from domainbed_reasoning.mllm.language_model import LanguageModel
from domainbed_reasoning.mllm.transfer import moved


def embedded(mllm: LanguageModel, question: str, fed: torch.Tensor, encoded: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens and images of rows as inputs of the language model.

    Args:
        mllm: the model.
        question: that every row begins with, up to the image at least.
        fed: tokens, ``(rows, L)``.
        encoded: the images, from `MLLM.encode`.

    Returns:
        ``inputs_embeds`` for the families of our own table with plain rows. For other models, and for rows whose number
        of image tokens does not match, the inputs from which transformers places the images itself.
    """
    others = {name: value for name, value in encoded.items() if name != "mm_encoder_outputs"}
    placed_by_transformers = {"input_ids": fed, **others, "mm_encoder_outputs": dict(encoded["mm_encoder_outputs"])}
    if mllm.family.tree != "plain" or is_general(mllm.family):
        return placed_by_transformers
    image = mllm.base.config.image_token_id
    places = (mllm.prompt(question)["input_ids"][0] == image).nonzero()[:, 0]
    features = encoded["mm_encoder_outputs"]["image"].pooler_output
    if isinstance(features, (list, tuple)):
        features = torch.cat(list(features))
    width = features.shape[-1]
    if features.numel() != len(fed) * len(places) * width:
        return placed_by_transformers
    (at,) = moved((places,), fed.device)
    text = mllm.base.get_input_embeddings()(fed)
    return {**others, "inputs_embeds": text.index_copy(1, at, features.to(text).view(len(fed), -1, width))}
