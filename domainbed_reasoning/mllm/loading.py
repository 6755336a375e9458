"""Find, check, and load a multimodal LLM and its processor, optionally quantized and with LoRA adapters."""

from __future__ import annotations

import importlib.util
import pathlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from domainbed_reasoning.mllm import lora
from domainbed_reasoning.mllm.families import Family, ModelError, family_of, fitted, is_general, tile_grid
from domainbed_reasoning.mllm.mixtures import kept_by_peft
from domainbed_reasoning.mllm.opening import EMBEDDED, check_weights, loading, read_config
from domainbed_reasoning.mllm.sealed import import_bitsandbytes
from domainbed_reasoning.mllm.towers import PROJECTOR, convolutions_note, is_linear, is_of_mixture, parts_of
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_MAX_EDGE = 8192  # pixels of a tile; the families' have 224 to 896

_NO_EXPERTS = ("Linear", "Embedding", "Conv", "Norm")  # modules whose weights are not experts


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters.

    Attributes:
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: of the adapter's input, in [0, 1).
        towers: ``both`` (the paper's), ``vision`` or ``language``.
        projector: whether the layers between the towers get adapters too.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    towers: str = "both"
    projector: bool = False

    @classmethod
    def of(cls, hparams: Mapping[str, Any]) -> LoraSettings:
        """Return the adapters that these hyper-parameters describe."""
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_projector")
        return cls(*(hparams[name] for name in names))


def resolve(model: str) -> str:
    """Return a folder or hub id that transformers can load; files of a hub id are cached or can be downloaded.

    Raises:
        ModelError: no such folder or repository, or the hub is unreachable; says what to do.
    """
    if model in EMBEDDED:
        return str(EMBEDDED[model])
    path = pathlib.Path(model).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ModelError(
                f"model {model!r}: the folder holds adapters, not a model. Pass their base model; `predict` takes a "
                "job's folder or what `export --job` wrote."
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
    _require_hub(model)
    return model


def _require_hub(model: str) -> None:
    """Fail early if ``model`` is neither cached nor reachable on the hub."""
    import huggingface_hub
    from huggingface_hub import errors

    if isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json"), str):
        return
    fixes = "Pass a folder with the model, download it first with `hf download`, or use 'tiny'."
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ModelError(f"model {model!r} is not in the local cache and HF_HUB_OFFLINE is set. {fixes}")
    try:
        huggingface_hub.model_info(model, timeout=10)
    except errors.GatedRepoError as error:
        raise ModelError(f"model {model!r} is gated: accept its terms on the hub, then run `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"model {model!r}: the hub has no such model, or it is private. {fixes}") from error
    except Exception as error:  # connection, proxy, TLS, time-out: whatever the HTTP library raises
        raise ModelError(f"model {model!r} is not cached and the hub cannot be reached ({error}). {fixes}") from error


def default_dtype() -> torch.dtype:
    """Return bfloat16 on CUDA (the precision the checkpoints were trained in), float32 on the CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_network(model: str, dtype: str, quantize: str, device: torch.device) -> tuple[torch.nn.Module, Any, Family]:
    """Load network and processor through transformers' Auto classes, without remote code.

    Args:
        model: ``tiny``, a folder or a hub id.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        quantize: ``none``, ``nf4`` or ``int8`` (bitsandbytes).
        device: where the weights go.

    Returns:
        network, processor, family.

    Raises:
        ModelError: if the model is missing, unsupported, has no chat template, or does not fit on the GPU.
    """
    import transformers

    where = resolve(model)
    config, family = _config_and_family(model, where)
    for package in family.requires:
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"{family.name} needs the package {package}: pip install {package}.")
    with loading(model, where):
        processor = transformers.AutoProcessor.from_pretrained(where, trust_remote_code=False)
        edge = family.tile_edge(processor.image_processor)
    if is_general(family):
        family = fitted(family, processor.image_processor)
    if not 1 <= edge <= _MAX_EDGE:
        raise ModelError(f"model {model!r}: its preprocessor_config.json requests images of {edge:,} pixels per side.")
    if not processor.chat_template:
        raise ModelError(
            f"model {model!r} has no chat template. Use its instruction-tuned version, often named -Instruct or -it."
        )
    precision = default_dtype() if dtype == "auto" else getattr(torch, dtype)
    if device.type == "cuda" or (where not in map(str, EMBEDDED.values()) and pathlib.Path(where).is_dir()):
        count = sum(weight.numel() for weight in _empty(config, model, where).parameters())
        check_weights(model, where, count)
    if device.type == "cuda":
        check_memory(model, count, precision, quantize, free_memory(device))
    settings: dict[str, Any] = {"dtype": precision, "device_map": {"": device}, "trust_remote_code": False}
    if not is_general(family):  # other architectures keep their default attention
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


def empty_network(model: str) -> tuple[torch.nn.Module, Family]:
    """Return a model's architecture without its weights, on the meta device, and its family.

    Raises:
        ModelError: if the model is missing or unsupported.
    """
    where = resolve(model)
    config, family = _config_and_family(model, where)
    return _empty(config, model, where), family


def _empty(config: Any, model: str, where: str) -> torch.nn.Module:
    import transformers

    network: torch.nn.Module
    with loading(model, where), torch.device("meta"):
        network = transformers.AutoModelForImageTextToText.from_config(config)
    return network


def config_of(model: str) -> tuple[Any, Family]:
    """Return a model's config and its family.

    Raises:
        ModelError: if the model is missing or unsupported.
    """
    return _config_and_family(model, resolve(model))


def _config_and_family(model: str, where: str) -> tuple[Any, Family]:
    config = read_config(model, where)
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    return config, family_of(architecture, config)


def image_edge(model: str, max_tiles: int = 1) -> int:
    """Return the edge in pixels at which a model sees an image, from its configs alone, without its weights.

    Args:
        model: ``tiny``, a folder or a hub id.
        max_tiles: at most so many tiles an image.

    Raises:
        ModelError: if the model is missing, unsupported, or does not tile images.
    """
    import transformers

    where = resolve(model)
    _, family = _config_and_family(model, where)
    with loading(model, where):
        processor = transformers.AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
    return family.tile_edge(processor) * tile_grid(family, max_tiles)


_BYTES = {"nf4": 0.6, "int8": 1.1}  # per weight, including scales and layers that are not quantized


def free_memory(device: torch.device) -> int:
    """Return the bytes available on a GPU: free memory, and what PyTorch has reserved but not allocated."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


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


def lora_targets(network: torch.nn.Module, towers: str, projector: bool) -> list[str]:
    """Return the full names of the linear layers that get adapters.

    Every Linear of the chosen towers, quantized or not, except the output head; layers between the towers only with
    ``projector``.

    Raises:
        ModelError: for an unknown choice of towers.
    """
    if towers not in ("both", "vision", "language"):
        raise ModelError(f"lora_targets must be 'both', 'vision' or 'language'; got {towers!r}.")
    wanted = ("vision", "language") if towers == "both" else (towers,)
    names, parts = [], parts_of(network)
    for name, module in network.named_modules():
        part = parts(name)
        if is_linear(module) and (part == "projector" and projector or part in wanted):
            names.append(name)
    return kept_by_peft(network, names) if without_adapters(network, towers) else names


def without_adapters(network: torch.nn.Module, towers: str = "both") -> dict[str, int]:
    """Return the matrices of the chosen towers that are not part of a Linear layer, with their sizes.

    These are the fused expert weights of a mixture, ``(experts, out, in)``, and its routers. Embeddings, convolutions,
    and norms are not counted: they never get adapters.

    Args:
        network: the model, before adapters are added.
        towers: ``both``, ``vision`` or ``language``.
    """
    wanted = ("vision", "language") if towers == "both" else (towers,)
    parts = parts_of(network)
    return {
        f"{name}.{key}": weight.numel()
        for name, module in network.named_modules()
        if parts(name) in wanted and not any(kind in type(module).__name__ for kind in _NO_EXPERTS)
        for key, weight in module.named_parameters(recurse=False)
        if is_of_mixture(module) and weight.dim() > 1 and min(weight.shape) > 1
    }


def experts_note(fused: Mapping[str, int], total: int) -> str:
    """Return a note on weights without adapters; empty if every layer gets one.

    Args:
        fused: as `without_adapters` returns them.
        total: number of weights of the model.
    """
    if not fused:
        return ""
    count, largest = sum(fused.values()), max(fused, key=lambda name: fused[name])
    return (
        f"{count:,} of {total:,} weights ({count / total:.0%}) get no adapters: they are fused experts and routers, "
        f"not Linear layers ({len(fused)} tensors, such as {largest}). LoRA trains the other layers only."
    )


def cached_numbers(config: Any) -> int:
    """Return the number of cached elements per token: keys and values of all layers."""
    text = config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_width)


def add_lora(
    network: torch.nn.Module, settings: LoraSettings, values: Mapping[str, torch.Tensor] | None = None
) -> torch.nn.Module:
    """Return ``network`` as a PEFT model in which only the adapters are trainable; logs which layers get none.

    Args:
        network: the bare model.
        settings: of the adapters.
        values: initial values, whose names and shapes are checked first; None for a fresh initialization.

    Raises:
        ModelError: the chosen tower has no linear layers.
        ValueError: as `check_adapters`.
    """
    if values:
        check_adapters(adapter_shapes(network, settings), values)
    total = sum(weight.numel() for weight in network.parameters())
    for note in (experts_note(without_adapters(network, settings.towers), total), convolutions_note(network)):
        if note:
            _log.warning("WARNING: %s", note)
    targets = lora_targets(network, settings.towers, settings.projector)
    if not targets:
        raise ModelError(
            f"{type(network).__name__} has no linear layers in its {settings.towers} tower, so LoRA has nothing to "
            "adapt: a tower of convolutions stays frozen. Set lora_targets to 'both' or 'language'."
        )
    return adapted(
        network,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )


def adapter_shapes(network: torch.nn.Module, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Return the shapes that `add_lora` would give the adapters, by their names in the PEFT model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in lora_targets(network, settings.towers, settings.projector):
        layer: Any = network.get_submodule(name)
        shapes[f"base_model.model.{name}.lora_A.default.weight"] = (settings.rank, layer.in_features)
        shapes[f"base_model.model.{name}.lora_B.default.weight"] = (layer.out_features, settings.rank)
    return shapes


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


def import_peft() -> Any:
    """Return PEFT, which imports bitsandbytes."""
    import_bitsandbytes()
    import peft

    return peft


def adapted(network: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    """Return ``network`` as a PEFT model with adapters of these settings of its `LoraConfig`, see `lora`."""
    peft = import_peft()
    config = peft.LoraConfig(bias="none", **settings)
    config._register_custom_module(lora.layers())
    with warnings.catch_warnings():  # peft uses an attribute that transformers deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model: torch.nn.Module = peft.get_peft_model(network, config)
    lora.recompute_gates(model)
    return model
