"""Check that transformers' model classes accept the arguments that this package passes.

A model's forward pass accepts ``**kwargs``, so an argument that a release does not know is ignored without an error:
transformers below 5.18 ignores encoded images and trains on text alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from domainbed_reasoning.mllm.devices import kept_random_state
from domainbed_reasoning.mllm.families import Family, ModelError
from domainbed_reasoning.mllm.language_model import LanguageModel

LEAST_TRANSFORMERS = "5.18"
CACHES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument

_FORWARD = ("input_ids", "attention_mask", "position_ids", "mm_encoder_outputs")
_FORWARD_OF_TREE = {"plain": (), "rope": ("image_grid_thw", "mm_token_type_ids"), "windows": ("token_type_ids",)}
_ROPE_INDEX = ("input_ids", "mm_token_type_ids", "image_grid_thw")
_QUESTION = "What is in this photo?"


def require_interface(network: Any, family: Family) -> None:
    """Reject a model whose methods lack arguments that this package passes.

    Args:
        network: the transformers model.
        family: its row.

    Raises:
        ModelError: with the method, the missing arguments and the release to install.
    """
    core = getattr(network, "model", network)
    _require(core, "forward", (*_FORWARD, *_FORWARD_OF_TREE[family.tree]))
    if not set(CACHES) & _arguments(core.forward):
        _refuse(core, "forward", CACHES[:1])
    _require(network, "get_image_features", ("pixel_values",))
    _require(network, "generate", ("custom_generate",))
    if family.tree == "rope":
        _require(core, "get_rope_index", _ROPE_INDEX)


def _require(owner: Any, method: str, names: tuple[str, ...]) -> None:
    found = _arguments(getattr(owner, method, None))
    if absent := tuple(name for name in names if name not in found):
        _refuse(owner, method, absent)


def _arguments(method: Callable[..., Any] | None) -> set[str]:
    """Return the argument names of a method; empty for None."""
    return set(inspect.signature(method).parameters) if method is not None else set()


def _refuse(owner: Any, method: str, names: tuple[str, ...]) -> None:
    import transformers

    raise ModelError(
        f"transformers {transformers.__version__} does not support {type(owner).__name__}: its {method} takes no "
        f"{', '.join(names)}, and would silently ignore such arguments, images among them. Install "
        f"{LEAST_TRANSFORMERS} or newer: pip install --upgrade 'transformers>={LEAST_TRANSFORMERS}'."
    )


@torch.no_grad()
def require_sight(mllm: LanguageModel) -> None:
    """Reject a model that ignores its images, by two short forward passes.

    Args:
        mllm: the model; its mode and the random state are preserved.

    Raises:
        ModelError: if its hidden states do not depend on the image.
    """
    import transformers

    edge = mllm.image_size
    black = torch.zeros(3, edge, edge, dtype=torch.uint8)
    pattern = (torch.arange(3 * edge * edge) * 7 % 256).to(torch.uint8).view(3, edge, edge)
    prompt = mllm.prompt(_QUESTION)["input_ids"].to(mllm.device)
    hidden = []
    for picture in (black, pattern):  # separately: rows of one batch may differ by rounding
        with kept_random_state(mllm.device):  # the same dropout for both
            encoded = mllm.encode(picture[None])
            hidden.append(mllm.core(1, _QUESTION, prompt, encoded, use_cache=False)[0][:, -1])
    if torch.equal(*hidden):
        raise ModelError(
            f"{mllm.family.name} under transformers {transformers.__version__} ignores its images: two different "
            "images give the same hidden states. Install another release of transformers, or use another checkpoint: "
            "this one's vision encoder may be empty."
        )
