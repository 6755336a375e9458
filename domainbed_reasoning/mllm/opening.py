"""Open a base model's files with transformers after checking them, without downloading or running other code."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from domainbed_reasoning.mllm.families import ModelError
from domainbed_reasoning.mllm.probe import SMALL_FILES, digest_of, require_sound
from domainbed_reasoning.mllm.sealed import sealed

TINY = pathlib.Path(__file__).parent / "tiny_model"
EMBEDDED = {"tiny": TINY, "tiny-creatures": TINY.with_name("tiny_creatures")}


def read_config(model: str, where: str) -> Any:
    """Return a model's config after checking its small files, which are untrusted.

    Args:
        model: its name, for messages.
        where: as `resolve` returned it.

    Raises:
        ModelError: if the files or the config cannot be used.
    """
    import transformers

    if where not in map(str, EMBEDDED.values()):
        require_sound(model, _folder_of(model, where))
    try:
        with loading(model, where):
            return transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except ModelError as error:
        if "trust_remote_code" in f"{error} {error.__cause__}":
            raise ModelError(
                f"model {model!r} requires custom code (trust_remote_code), which is never run. Use the checkpoint "
                f"converted for transformers: {model}-hf for InternVL3, {model}-HF for InternVL3.5."
            ) from error
        raise


def small_files_digest(model: str, where: str) -> str:
    """Return a digest of all of a model's files but its weights."""
    return digest_of(model, _folder_of(model, where))


def _folder_of(model: str, where: str) -> pathlib.Path:
    """Return the folder of a model's small files; from the hub, only these are downloaded."""
    if pathlib.Path(where).is_dir():
        return pathlib.Path(where)
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(where, allow_patterns=list(SMALL_FILES)))
    except Exception as error:  # connection, disk, permissions: whatever the library raises
        raise ModelError(f"model {model!r}: its files cannot be downloaded ({str(error):.300}).") from error


@contextlib.contextmanager
def loading(model: str, where: str) -> Iterator[None]:
    """Let transformers read a model's files without downloading or running anything; its errors become ModelError."""
    with sealed(offline=pathlib.Path(where).is_dir()):
        try:
            yield
        except ModelError:
            raise
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            message = " ".join(str(error).split())
            raise ModelError(
                f"model {model!r}: transformers cannot load {where} ({type(error).__name__}: {message:.400}). "
                "Download the model again, or use another."
            ) from error


def check_weights(model: str, where: str, count: int) -> None:
    """Reject a config that describes more weights than the files contain: missing ones would be random.

    Args:
        model: its name, for the message.
        where: its folder, or a hub id, whose files may not be downloaded yet.
        count: number of weights that the config describes.

    Raises:
        ModelError: with both numbers.
    """
    if not pathlib.Path(where).is_dir():
        return
    files = [path for kind in ("*.safetensors", "*.bin") for path in pathlib.Path(where).glob(kind)]
    size = sum(path.stat().st_size for path in files)
    if not files:
        raise ModelError(
            f"model {model!r}: {where} contains no weights (model.safetensors). Download the complete model."
        )
    if count > size + (1 << 20):  # at least a byte per weight, unless it is tied
        raise ModelError(
            f"model {model!r}: {where}/config.json describes {count:,} parameters, but the weight files have "
            f"{size:,} bytes. Download the complete model."
        )
