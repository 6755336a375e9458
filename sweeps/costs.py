"""Cost model of a job: floating-point operations and bytes, computed from a model's config; see `hours`.

Counts are exact up to small terms (a test compares them with PyTorch's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from domainbed_reasoning.mllm.adapters import LoraSettings, adapter_shapes, lora_targets, without_adapters
from domainbed_reasoning.mllm.decoding import numbers_a_token, prompts_at_a_time
from domainbed_reasoning.mllm.families import Family, ModelError, family_of, require_dynamic, tile_grid
from domainbed_reasoning.mllm.loading import cached_numbers, config_of, empty_network_of
from domainbed_reasoning.mllm.towers import parts_of
from domainbed_reasoning.results.published import KNOWN_CONFIGS

BYTES_PER_WEIGHT = {"none": 2.0, "nf4": 0.56, "int8": 1.03}


@dataclass(frozen=True)
class Tower:
    """A stack of transformer blocks.

    Attributes:
        weights: in its linear layers.
        inputs: sum of the linear layers' input widths.
        outputs: sum of their output widths.
        layers: number of blocks.
        width: of queries and of attention's output.
        per_rank: adapter weights per unit of the rank; None: one for each input and output of the linear layers.
    """

    weights: int
    inputs: int
    outputs: int
    layers: int
    width: int
    per_rank: int | None = None

    def forward(self, tokens: float, causal: bool = False) -> float:
        """Return the operations of one forward pass over a row of ``tokens`` tokens."""
        attention = 4 * self.layers * tokens**2 * self.width
        return 2 * self.weights * tokens + (attention / 2 if causal else attention)

    def lora_weights(self, rank: int) -> int:
        """Return the number of adapter weights on all linear layers."""
        return rank * (self.inputs + self.outputs if self.per_rank is None else self.per_rank)

    def saved_bytes(self, tokens: float, itemsize: int, dropout: float = 0.0) -> float:
        """Return the bytes that a training forward saves for the backward pass.

        These are every linear layer's input and output; with dropout also the adapters' input and its mask.
        """
        dropped = (itemsize + 1) * self.inputs if dropout else 0
        return tokens * (itemsize * (self.inputs + self.outputs) + dropped)


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model that determine its cost.

    Attributes:
        vision: the image encoder.
        language: the decoder, without its head.
        weights: of the whole model.
        embeddings: weights in embeddings and head, which are not quantized.
        head: weights in the output head.
        vocabulary: tokens of the head.
        patches: tokens of the image encoder per tile.
        image_tokens: tokens of the decoder per tile.
        tiles: per image.
        kv_bytes: of one token's keys and values at 16 bits.
        prefill_bytes: of one token while its prompt is read, at 16 bits.
        fused: weights of experts and routers by tensor, which the towers do not include.
    """

    vision: Tower
    language: Tower
    weights: int
    embeddings: int
    head: int
    vocabulary: int
    patches: int
    image_tokens: int
    tiles: int
    kv_bytes: int
    prefill_bytes: int
    fused: Mapping[str, int] = field(default_factory=dict)


def shape_of(
    model: str,
    max_tiles: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tiling: str = "square",
) -> Shape:
    """Return the shape of a model, from its config; those of the paper's models are built in.

    Args:
        model: ``tiny``, a folder or a hub id.
        max_tiles: at most so many tiles an image.
        revision: see `load_mllm`.
        trust_remote_code: see `load_mllm`.
        tiling: see `load_mllm`; an image is assumed to have the maximum number of dynamic tiles.

    Raises:
        ModelError: the model is missing or not supported.
    """
    config, family = _known(model) or config_of(model, revision, trust_remote_code)
    if not family.has_entry:
        raise ModelError(
            f"{model}: the costs of {family.name} cannot be estimated: how many tokens an image has is known only "
            "from its processor. Try it out with `domainbed-reasoning doctor --model`."
        )
    network: Any = empty_network_of(config, model, trust_remote_code)
    text, vision = config.get_text_config(), config.vision_config
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    edge = _tile_edge(vision)
    if tiling == "dynamic":
        require_dynamic(family)
    most = max_tiles if tiling == "dynamic" else tile_grid(family, max_tiles) ** 2
    head = network.get_output_embeddings().weight.numel()
    return Shape(
        vision=_vision(network, vision, edge, family.image_tokens(config, edge)),
        language=_tower(network, "language", text.num_hidden_layers, heads * head_width),
        weights=sum(weight.numel() for weight in network.parameters()),
        embeddings=head + network.get_input_embeddings().weight.numel(),
        head=head,
        vocabulary=text.vocab_size,
        patches=(edge // _patch(vision)) ** 2 if _layers(vision) else family.image_tokens(config, edge),
        image_tokens=family.image_tokens(config, edge),
        tiles=1 if most == 1 else most + 1,
        kv_bytes=2 * cached_numbers(config),
        prefill_bytes=2 * numbers_a_token(config),
        fused=without_adapters(network),
    )


def _known(model: str) -> tuple[Any, Family] | None:
    if model not in KNOWN_CONFIGS:
        return None
    import transformers

    architecture, values = KNOWN_CONFIGS[model]
    config = getattr(transformers, architecture.removesuffix("ForConditionalGeneration") + "Config")(**values)
    return config, family_of(architecture)


def _layers(vision: Any) -> int:
    """Return the number of transformer blocks; 0 for a tower of convolutions, whose config names none."""
    return int(getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None) or 0)


def _patch(vision: Any) -> int:
    return int(vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0])


def _tile_edge(vision: Any) -> int:
    size = getattr(vision, "image_size", None) or 448  # Qwen accepts any size; `mllm` uses 448
    return int(size if isinstance(size, int) else size[0])


def _vision(network: Any, vision: Any, edge: int, tokens: int) -> Tower:
    """Return the vision tower; one of convolutions as a stack without layers.

    Its numbers are per position of its last layer. In 16 bits, an adapted convolution keeps its input also in float32,
    in which PEFT computes, and its output before and after normalization.
    """
    if _layers(vision):
        return _tower(network, "vision", _layers(vision), vision.hidden_size)
    from torch.utils.flop_counter import FlopCounterMode

    shapes = adapter_shapes(network, LoraSettings(1, 1, towers="vision"))
    layers = [network.get_submodule(name) for name in lora_targets(network, "vision", projector=False)]
    sizes: list[tuple[int, int]] = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, given, out: sizes.append((given[0].numel(), out.numel())))
    tower = network.model.vision_tower.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        seen = tower(torch.zeros(1, 3, edge, edge, device="meta")).last_hidden_state
    positions = seen[0, 0].numel()
    inputs, outputs = map(sum, zip(*sizes, strict=True))
    return Tower(
        weights=round(counter.get_total_flops() / 2 / positions),
        inputs=round(3 * inputs / positions),
        outputs=round(2 * outputs / positions),
        layers=0,
        width=0,
        per_rank=sum(math.prod(shape) for shape in shapes.values()),
    )


def _tower(network: torch.nn.Module, part: str, layers: int, width: int) -> Tower:
    parts = parts_of(network)
    linear = [
        (module.in_features, module.out_features)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and parts(name) == part
    ]
    return Tower(sum(i * o for i, o in linear), sum(i for i, _ in linear), sum(o for _, o in linear), layers, width)


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts in tokens.

    Attributes:
        question: q_cls with the chat template.
        instruction: of q_reason, in addition.
        name: a class name with its end token.
        chain: a chain.
    """

    question: float
    instruction: float
    name: float
    chain: float


def lengths_for(classes: int, chain: float = 250) -> Lengths:
    """Return typical lengths: a class name with its comma is about 3 tokens; the paper's chains are about 250."""
    return Lengths(question=35 + 3 * classes, instruction=85, name=3, chain=chain)


def training_flops(shape: Shape, lengths: Lengths, label: bool, chain: bool) -> float:
    """Return the operations of one sample's training step, forward and backward.

    Frozen weights cost a forward and the gradient of the input, twice the forward; attention costs three times. Both
    paths share one row up to the end of q_cls.
    """
    vision = shape.tiles * shape.vision.forward(shape.patches)
    vision_attention = shape.tiles * 4 * shape.vision.layers * shape.patches**2 * shape.vision.width
    prefix = shape.tiles * shape.image_tokens + lengths.question
    row = prefix + (lengths.name if label else 0) + (lengths.instruction + lengths.chain if chain else 0)
    language = shape.language.forward(row)
    attention = 4 * shape.language.layers * row**2 * shape.language.width
    supervised = (lengths.name if label else 0) + (lengths.chain if chain else 0)
    return 2 * (vision + language + 2 * shape.head * supervised) + vision_attention + attention


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the GPU at the peak of training.

    Attributes:
        weights: of the frozen model.
        adapters: weights, gradients and AdamW's two moments, float32.
        activations: of one micro-batch, with logits.
        copy: of the merged weights, for generating chains and answers.
        generation: keys and values of one batch of answers, and reading its prompts.
    """

    weights: float
    adapters: float
    activations: float
    copy: float
    generation: float

    @property
    def peak(self) -> float:
        """Peak in bytes: training and generation alternate, the copy stays."""
        return 1.1 * (self.weights + self.adapters + self.copy + max(self.activations, self.generation))


def memory_of(shape: Shape, lengths: Lengths, hparams: Mapping[str, Any]) -> MemoryEstimate:
    """Return the peak memory of a job with these hyper-parameters.

    Args:
        shape: of the model.
        lengths: of the texts.
        hparams: ``quantize``, ``eval_batch``, ``max_new_tokens``, and of training ``micro_batch``, ``lora_rank``,
            ``lora_dropout`` and ``gradient_checkpointing``.
    """
    itemsize = 2
    per_weight = BYTES_PER_WEIGHT[hparams["quantize"]]
    weights = (shape.weights - shape.embeddings) * per_weight + shape.embeddings * itemsize
    prefix = shape.tiles * shape.image_tokens + lengths.question
    cached = prefix + lengths.instruction + hparams["max_new_tokens"]
    generation = hparams["eval_batch"] * cached * shape.kv_bytes
    prompt = prefix + lengths.instruction
    generation += min(hparams["eval_batch"], prompts_at_a_time(math.ceil(prompt))) * prompt * shape.prefill_bytes
    if "lora_rank" not in hparams:
        return MemoryEstimate(weights, 0, 0, 0, generation)
    adapters = 16.0 * (
        shape.vision.lora_weights(hparams["lora_rank"]) + shape.language.lora_weights(hparams["lora_rank"])
    )
    row = prefix + lengths.name + lengths.instruction + lengths.chain
    saved = shape.tiles * shape.vision.saved_bytes(shape.patches, itemsize, hparams.get("lora_dropout", 0.0))
    saved += shape.language.saved_bytes(row, itemsize, hparams.get("lora_dropout", 0.0))
    if hparams["gradient_checkpointing"]:  # the input of each block, and all of one block
        layers = shape.vision.layers + shape.language.layers
        saved = saved / layers + itemsize * shape.language.layers * row * shape.language.width
    logits = (lengths.name + lengths.chain) * shape.vocabulary * (itemsize + 4 + 4)
    copy = weights if hparams["quantize"] == "none" else 0
    return MemoryEstimate(weights, adapters, hparams["micro_batch"] * (saved + logits), copy, generation)
