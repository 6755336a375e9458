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

_CODE = (
    "model {model!r} comes with Python code of its own (auto_map), which does not run unless you allow it. Use the "
    "checkpoint converted for transformers (such as OpenGVLab/InternVL3-8B-hf); or read its code, then train with "
    "--hparams '{{\"trust_remote_code\": true}}' or pass --trust-remote-code to the command. What a job or a folder "
    "records allows nothing: a job that was trained with its code needs the option again."
)
TINY = pathlib.Path(__file__).parent / "tiny_model"
EMBEDDED = {"tiny": TINY, "tiny-creatures": TINY.with_name("tiny_creatures")}


def hub_arguments(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments of every ``from_pretrained``: which files of a repository are read, and whether code runs.

    Args:
        revision: a branch, tag or commit of the hub's repository; None is its main branch.
        trust_remote_code: whether the checkpoint's own Python files run.
    """
    return {"revision": revision or "main", "trust_remote_code": trust_remote_code}


def read_config(model: str, where: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return a model's config after checking its small files, which are untrusted.

    Args:
        model: its name, for messages.
        where: as `resolve` returned it.
        revision: see `hub_arguments`.
        trust_remote_code: see `hub_arguments`.

    Raises:
        ModelError: if the files or the config cannot be used.
    """
    import transformers

    if where not in map(str, EMBEDDED.values()):
        require_sound(model, _folder_of(model, where, revision))
    with loading(model, where):
        return transformers.AutoConfig.from_pretrained(where, **hub_arguments(revision, trust_remote_code))


def small_files_digest(model: str, where: str, revision: str | None = None) -> str:
    """Return a digest of all of a model's files but its weights."""
    return digest_of(model, _folder_of(model, where, revision))


def _folder_of(model: str, where: str, revision: str | None) -> pathlib.Path:
    """Return the folder of a model's small files; from the hub, only these are downloaded."""
    if pathlib.Path(where).is_dir():
        return pathlib.Path(where)
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(where, revision=revision, allow_patterns=list(SMALL_FILES))
        )
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
            if "trust_remote_code" in message:
                raise ModelError(_CODE.format(model=model)) from error
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
