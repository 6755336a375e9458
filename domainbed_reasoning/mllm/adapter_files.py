"""Adapters' tensors: read from PEFT's folders, to start training from (hparam ``init_adapter``), and their shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from domainbed_reasoning.chains.record import parse_json
from domainbed_reasoning.files import format_version
from domainbed_reasoning.files.plain import MAX_DESCRIPTION_BYTES, open_plain, read_plain_text
from domainbed_reasoning.mllm.families import ModelError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
VERSION = 2  # of an exported adapter_model.safetensors, in its metadata under `VERSION_KEY`
VERSION_KEY = f"domainbed_reasoning.{format_version.KEY}"
_MAX_BYTES = 4 << 30


def peft_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return PEFT's saved tensors by their names in the model, which include the adapter's name.

    Raises:
        ModelError: the file is missing, or not one of safetensors.
    """
    import safetensors.torch

    try:
        open_plain(file, _MAX_BYTES).close()
        saved = safetensors.torch.load_file(file)
    except Exception as error:  # the format's own errors derive from Exception
        raise ModelError(f"{file} cannot be read ({str(error):.300})") from error
    return {name.removesuffix(".weight") + ".default.weight": tensor for name, tensor in saved.items()}


def version_problem(file: Path) -> str:
    """Return why the format version of readable adapters is unusable, and what to do; empty if it is usable."""
    import safetensors

    with safetensors.safe_open(file, "pt") as opened:
        version = (opened.metadata() or {}).get(VERSION_KEY, "1")
    if not version.isdecimal() or len(version) > 9:
        return f"{file}: {VERSION_KEY} in its metadata must be a number; got {version!r:.80}."
    newer = format_version.newer_than(VERSION, int(version))
    return f"{file}: {newer}. {format_version.UPGRADE}." if newer else ""


# Initializations that leave the base's weights as they are; PiSSA's and others' subtract the adapter from them.
_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_OTHER_METHODS = (
    "alora_invocation_tokens", "use_qalora", "kasa_config", "arrow_config", "monteclora_config", "velora_config",
    "use_bdlora",
)  # fmt: skip


def initial_adapter(
    folder: str, rank: int, alpha: float, variant: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Return the adapter that training starts from.

    Args:
        folder: that PEFT or ``domainbed-reasoning export`` wrote.
        rank: of the job's adapters.
        alpha: theirs.
        variant: theirs, ``lora``, ``rslora`` or ``dora``.
        shapes: theirs, by their names in the PEFT model.

    Raises:
        ModelError: the folder holds no LoRA adapter, or one that does not fit; the message gives both values.
    """
    path = Path(folder).expanduser()
    where = f"init_adapter {folder!r:.300}"
    config = _config(path, where)
    found = {"lora_rank": config.get("r"), "lora_alpha": config.get("lora_alpha"), "lora_variant": _variant(config)}
    for name, own in (("lora_rank", rank), ("lora_alpha", alpha), ("lora_variant", variant)):
        if found[name] != own:
            raise ModelError(f"{where}: it has {name} {found[name]!r:.80}, this job {own!r}. Set {name} to the same.")
    how = config.get("init_lora_weights", True)
    if how not in _KEEPS_THE_BASE or any(map(config.get, _OTHER_METHODS)):
        raise ModelError(
            f"{where}: it is not plain LoRA on the base model's own weights (init_lora_weights {how!r:.80}). Convert "
            "it with PEFT's path_initial_model_for_weight_conversion, or pass another."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise ModelError(f"{where}: its {name} gives layers ranks or scales of their own. Pass one without.")
    try:
        values = peft_tensors(path / PEFT_WEIGHTS)
    except ModelError as error:
        raise ModelError(f"{where}: {error}. Pass an adapter that was saved as safetensors.") from error
    if problem := version_problem(path / PEFT_WEIGHTS):
        raise ModelError(f"{where}: {problem}")
    theirs, ours = (sorted({name.partition(".lora_")[0] for name in names}) for names in (values, shapes))
    if theirs != ours:
        odd = sorted(set(theirs) ^ set(ours))[0]
        who = "only the adapter" if odd in theirs else "only this job"
        raise ModelError(
            f"{where}: it adapts {len(theirs)} layers, this job {len(ours)}; {who} has {_shown(odd)!r:.200}. Set "
            "lora_targets, lora_projector and lora_target_modules as it was trained."
        )
    for name, shape in shapes.items():
        tensor = values.get(name)
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            has = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ModelError(
                f"{where}: {name!r:.200} is {has}, and this model's has shape {tuple(shape)}. Pass the adapter of this "
                "base model."
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ModelError(f"{where}: {name!r:.200} contains NaN, infinity or no floating-point numbers.")
    if extra := sorted(values.keys() - shapes.keys()):
        raise ModelError(f"{where}: it has {extra[0]!r:.200}, which plain LoRA adapters of this job lack.")
    return values


def shapes_of_sum(
    shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of as many summed adapters as ``values`` holds: their A stacked, their B side by side."""
    first = next((name for name in shapes if ".lora_A." in name and name in values), "")
    count = max(1, values[first].shape[0] // shapes[first][0]) if first else 1
    axis = {".lora_A.": 0, ".lora_B.": 1}
    return {
        name: tuple(
            size * (count if axis.get(next((part for part in axis if part in name), "")) == place else 1)
            for place, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }


def check_adapters(shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, torch.Tensor]) -> None:
    """Reject adapter values that do not match a model.

    Args:
        shapes: of the model's adapters by name.
        values: of a checkpoint by name.

    Raises:
        ValueError: naming the first tensor that does not match.
    """
    for name in sorted(shapes.keys() ^ values.keys()):
        raise ValueError(f"the checkpoint's adapters do not match this model: only one of them has {name!r:.200}.")
    for name, shape in shapes.items():
        if values[name].shape != shape:
            raise ValueError(
                f"the checkpoint's adapters do not match this model: {name!r} has shape {tuple(values[name].shape)} "
                f"in the checkpoint and {tuple(shape)} in the model."
            )


def adapter_digest(folder: str) -> str:
    """Return the SHA-256 of an adapter folder's settings and tensors.

    Raises:
        OSError: one of the files cannot be read.
    """
    digest = hashlib.sha256()
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        with open_plain(Path(folder).expanduser() / name, _MAX_BYTES) as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def _config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = parse_json(read_plain_text(path / PEFT_CONFIG, MAX_DESCRIPTION_BYTES))
    except FileNotFoundError as error:
        raise ModelError(
            f"{where}: no {PEFT_CONFIG} found there. Pass a folder that PEFT wrote; `domainbed-reasoning export --job` "
            "makes one of a job."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: {PEFT_CONFIG} cannot be read ({str(error):.200}).") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"{where}: not a LoRA adapter. Pass one of peft_type LORA.")
    return config


def _variant(config: Mapping[str, Any]) -> str:
    kinds = [kind for kind, key in (("dora", "use_dora"), ("rslora", "use_rslora")) if config.get(key)]
    return "+".join(kinds) or "lora"


def _shown(name: str) -> str:
    return name.removeprefix("base_model.model.")
