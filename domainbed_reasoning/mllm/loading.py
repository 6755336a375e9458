"""Find, check, and load a multimodal LLM and its processor, optionally quantized."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import torch

from domainbed_reasoning.mllm.attention import check_attention
from domainbed_reasoning.mllm.devices import free_memory
from domainbed_reasoning.mllm.dynamic_tiles import DynamicTiles
from domainbed_reasoning.mllm.families import (
    Family,
    ModelError,
    family_of,
    fitted,
    is_general,
    require_dynamic,
    tile_grid,
)
from domainbed_reasoning.mllm.family_plugins import discover, entry_of
from domainbed_reasoning.mllm.opening import EMBEDDED, check_weights, hub_arguments, loading, read_config
from domainbed_reasoning.mllm.opening import TINY as TINY
from domainbed_reasoning.mllm.sealed import import_bitsandbytes
from domainbed_reasoning.mllm.towers import PROJECTOR

_MAX_EDGE = 8192  # pixels of a tile; the families' have 224 to 896


def resolve(model: str, revision: str | None = None) -> str:
    """Return a folder or hub id that transformers can load; files of a hub id are cached or can be downloaded.

    Args:
        model: ``tiny``, a folder or a hub id.
        revision: a branch, tag or commit of a hub id's repository; None is its main branch.

    Raises:
        ModelError: no such folder, repository or revision, or the hub is unreachable; says what to do.
    """
    if revision is not None and (model in EMBEDDED or pathlib.Path(model).expanduser().is_dir()):
        what = "the embedded model" if model in EMBEDDED else "a folder"
        raise ModelError(
            f"revision {revision!r} selects a version of a hub repository, but model {model!r} is {what}. Leave "
            f"revision out, or download that version: hf download REPOSITORY --revision {revision} --local-dir FOLDER."
        )
    if model in EMBEDDED:
        return str(EMBEDDED[model])
    path = pathlib.Path(model).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ModelError(
                f"model {model!r}: the folder has an adapter_config.json and no config.json: it holds adapters, not a "
                "model. Pass their base model; `predict --job` accepts a job's folder or an exported one."
            )
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model {model!r}: the folder has no config.json, so it is not a saved transformers model."
            )
        return str(path)
    if model.count("/") != 1 or path.is_absolute() or model.startswith("."):
        raise ModelError(
            f"model {model!r} is neither a folder nor a hub id. Use a folder with a config.json, a hub id such as "
            "'OpenGVLab/InternVL3-8B-hf', or 'tiny' for the embedded model."
        )
    _require_hub(model, revision)
    return model


def _require_hub(model: str, revision: str | None) -> None:
    """Fail early if ``model`` is neither cached nor reachable on the hub."""
    import huggingface_hub
    from huggingface_hub import errors

    if isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision), str):
        return
    name = f"{model!r}" if revision is None else f"{model!r} at revision {revision!r}"
    fixes = "Pass a folder with the model, download it first with `hf download`, or use 'tiny'."
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ModelError(f"model {name} is not in the local cache and HF_HUB_OFFLINE is set. {fixes}")
    try:
        huggingface_hub.model_info(model, revision=revision, timeout=10)
    except errors.GatedRepoError as error:
        raise ModelError(f"model {model!r} is gated: accept its terms on the hub, then run `hf auth login`.") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"model {model!r} has no revision {revision!r} on the hub. Set the hparam revision to a branch, tag or "
            "commit of its repository."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"model {model!r}: the hub has no such model, or it is private. {fixes}") from error
    except Exception as error:  # connection, proxy, TLS, time-out: whatever the HTTP library raises
        raise ModelError(f"model {name} is not cached and the hub cannot be reached ({error}). {fixes}") from error


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on accelerators (the precision the checkpoints were trained in), float32 on the CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_network(
    model: str,
    dtype: str,
    quantize: str,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "auto",
) -> tuple[torch.nn.Module, Any, Family]:
    """Load network and processor through transformers' Auto classes.

    Args:
        model: ``tiny``, a folder or a hub id.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        quantize: ``none``, ``nf4`` or ``int8`` (bitsandbytes).
        device: where the weights go.
        revision: see `hub_arguments`.
        trust_remote_code: see `hub_arguments`.
        attn_implementation: see `attention`; ``auto`` is sdpa, and transformers' default for other architectures.

    Returns:
        network, processor, family.

    Raises:
        ModelError: if the model is missing, unsupported, has no chat template, or does not fit on the GPU.
    """
    import transformers

    precision = default_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    check_attention(attn_implementation, precision, device)
    where, arguments = resolve(model, revision), hub_arguments(revision, trust_remote_code)
    config, family = _config_and_family(model, where, revision, trust_remote_code)
    for package in family.requires:
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"{family.name} needs the package {package}: pip install {package}.")
    with loading(model, where):
        processor = transformers.AutoProcessor.from_pretrained(where, **arguments)
        edge = family.tile_edge(processor.image_processor)
    if is_general(family):
        family = fitted(family, processor.image_processor)
    if not 1 <= edge <= _MAX_EDGE:
        raise ModelError(f"model {model!r}: its preprocessor_config.json requests images of {edge:,} pixels per side.")
    if not processor.chat_template:
        raise ModelError(
            f"model {model!r} has no chat template: its {type(processor).__name__} found none in chat_template.jinja, "
            "processor_config.json or tokenizer_config.json. Use its instruction-tuned version, often named -Instruct "
            "or -it; captioning models have none."
        )
    free = free_memory(device) if device.type != "cpu" else None
    if free is not None or (where not in map(str, EMBEDDED.values()) and pathlib.Path(where).is_dir()):
        count = sum(weight.numel() for weight in empty_network_of(config, model, trust_remote_code).parameters())
        check_weights(model, where, count)
        if free is not None:
            check_memory(model, count, precision, quantize, free)
    settings: dict[str, Any] = {"dtype": precision, "device_map": {"": device}, **arguments}
    if attn_implementation != "auto":
        settings["attn_implementation"] = attn_implementation
    elif not is_general(family):  # other architectures keep their default attention
        settings["attn_implementation"] = "sdpa"
    if quantize != "none":
        settings["quantization_config"] = _quantization(quantize, precision)
    with loading(model, where):
        network = transformers.AutoModelForImageTextToText.from_pretrained(where, **settings)
    module: Any
    for module in network.modules():
        # With AVX512-BF16, bitsandbytes repacks 4-bit weights at the first inference and cannot train afterwards.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    network.requires_grad_(False)
    return network, processor, family


def empty_network(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[torch.nn.Module, Family]:
    """Return a model's architecture without its weights, on the meta device, and its family.

    Args:
        model: ``tiny``, a folder or a hub id.
        revision: see `hub_arguments`.
        trust_remote_code: see `hub_arguments`.

    Raises:
        ModelError: if the model is missing or unsupported.
    """
    where = resolve(model, revision)
    config, family = _config_and_family(model, where, revision, trust_remote_code)
    return empty_network_of(config, model, trust_remote_code), family


def empty_network_of(config: Any, model: str, trust_remote_code: bool = False) -> torch.nn.Module:
    """Return the architecture of a config without weights, on the meta device.

    Args:
        config: of the model.
        model: its name, for messages.
        trust_remote_code: see `hub_arguments`.

    Raises:
        ModelError: for a config of which transformers makes no model.
    """
    import transformers

    network: torch.nn.Module
    with loading(model, model), torch.device("meta"):
        network = transformers.AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    return network


def config_of(model: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Family]:
    """Return a model's config and its family.

    Args:
        model: ``tiny``, a folder or a hub id.
        revision: see `hub_arguments`.
        trust_remote_code: see `hub_arguments`.

    Raises:
        ModelError: if the model is missing or unsupported.
    """
    return _config_and_family(model, resolve(model, revision), revision, trust_remote_code)


def _config_and_family(model: str, where: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Family]:
    discover()  # a package may register its model classes with transformers, too
    config = read_config(model, where, revision, trust_remote_code)
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    plugin = entry_of(architecture)
    if plugin is not None and plugin.family is not None:
        return config, plugin.family
    try:
        return config, family_of(architecture, config)
    except ModelError as error:
        raise ModelError(f"model {model!r}: {error}") from error


def image_edge(model: str, max_tiles: int = 1, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """Return the edge in pixels at which a model sees an image, from its configs alone, without its weights.

    Args:
        model: ``tiny``, a folder or a hub id.
        max_tiles: at most so many tiles an image.
        revision: see `hub_arguments`.
        trust_remote_code: see `hub_arguments`.

    Raises:
        ModelError: if the model is missing, unsupported, or does not tile images.
    """
    family, processor = _image_processor(model, revision, trust_remote_code)
    return family.tile_edge(processor) * tile_grid(family, max_tiles)


def dynamic_tiles(
    model: str, max_tiles: int, revision: str | None = None, trust_remote_code: bool = False
) -> DynamicTiles:
    """Return what cuts images into a model's dynamic tiles, from its configs alone; see `image_edge`.

    Raises:
        ModelError: if the model is missing, unsupported, or has no dynamic tiles, or ``max_tiles`` is out of range.
    """
    family, processor = _image_processor(model, revision, trust_remote_code)
    require_dynamic(family)
    return DynamicTiles(processor, family.tile_edge(processor), max_tiles)


def _image_processor(model: str, revision: str | None, trust_remote_code: bool) -> tuple[Family, Any]:
    import transformers

    where = resolve(model, revision)
    _, family = _config_and_family(model, where, revision, trust_remote_code)
    with loading(model, where):
        arguments = hub_arguments(revision, trust_remote_code)
        return family, transformers.AutoImageProcessor.from_pretrained(where, **arguments)


_BYTES = {"nf4": 0.6, "int8": 1.1}  # per weight, including scales and layers that are not quantized


def check_memory(model: str, weights: int, dtype: torch.dtype, quantize: str, free: int) -> None:
    """Reject a model whose weights alone do not fit on the GPU.

    Args:
        model: its name, for the message.
        weights: number of weights.
        dtype: of the unquantized weights.
        quantize: ``none``, ``nf4`` or ``int8``.
        free: free bytes on the GPU.

    Raises:
        ModelError: with the memory needed, the memory free, and what to do.
    """
    need = int(weights * _BYTES.get(quantize, dtype.itemsize) * 1.1)
    if need > free:
        fix = "a smaller model" if quantize == "nf4" else 'a smaller model, or --hparams \'{"quantize": "nf4"}\''
        raise ModelError(
            f"model {model!r} needs {need / 2**30:.1f} GiB for its weights and the GPU has {free / 2**30:.1f} GiB "
            f"free. Use {fix}."
        )


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    import transformers

    # Patterns match from the start of a module name to the end of one of its components.
    skip = ["lm_head", *(rf".*{part}\w*" for part in PROJECTOR)]
    import_bitsandbytes()
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # absent, or broken in any way
        raise ModelError(
            f"quantize {quantize!r} requires bitsandbytes, which cannot be imported ({type(error).__name__}: "
            f"{str(error):.200}). Run `pip install bitsandbytes`, or use quantize 'none'."
        ) from error
    if quantize == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    if quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    raise ModelError(f"quantize must be 'none', 'nf4' or 'int8'; got {quantize!r}.")


def cached_numbers(config: Any) -> int:
    """Return the number of cached elements per token: keys and values of all layers."""
    text = config.get_text_config()
    # Of a config whose layers differ, transformers refuses to say what they do not share.
    differ = getattr(text, "is_heterogeneous", False)
    return sum(map(_cached_by_layer, text.per_layer_config if differ else [text] * text.num_hidden_layers))


def _cached_by_layer(layer: Any) -> int:
    head_width = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    return int(2 * heads * head_width)
