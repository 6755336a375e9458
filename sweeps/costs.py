"""Cost model of a job: floating-point operations and bytes, computed from a model's config.

Counts are exact up to small terms (a test compares them with PyTorch's). Hours depend on the achieved share of a GPU's
peak, which is assumed, and the hours counted, until `benchmarks.gpu` has measured it on that GPU: see `rates`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from domainbed_reasoning.method.schedule import Schedule
from domainbed_reasoning.mllm.adapters import LoraSettings, adapter_shapes, lora_targets, without_adapters
from domainbed_reasoning.mllm.families import Family, ModelError, family_of, require_dynamic, tile_grid
from domainbed_reasoning.mllm.loading import cached_numbers, config_of, empty_network_of
from domainbed_reasoning.mllm.towers import parts_of
from domainbed_reasoning.results.published import KNOWN_CONFIGS, Data, Gpu
from domainbed_reasoning.sweeps.rates import ASSUMED, Rate

_BYTES_PER_WEIGHT = {"none": 2.0, "nf4": 0.56, "int8": 1.03}


STOCK_BATCH = 64  # batch size of DomainBed's evaluation, where chains are not generated ahead of it


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
        generation: keys and values of one batch of answers.
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
    per_weight = _BYTES_PER_WEIGHT[hparams["quantize"]]
    weights = (shape.weights - shape.embeddings) * per_weight + shape.embeddings * itemsize
    prefix = shape.tiles * shape.image_tokens + lengths.question
    cached = prefix + lengths.instruction + hparams["max_new_tokens"]
    generation = hparams["eval_batch"] * cached * shape.kv_bytes
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


@dataclass(frozen=True)
class Hours:
    """Hours of one job.

    Attributes:
        training: optimizer steps.
        labeling: generating SARR's chains that the previous evaluation has not generated.
        evaluation: DomainBed's evaluations of all splits.
        evaluations: number of evaluations.
    """

    training: float
    labeling: float
    evaluation: float
    evaluations: int

    @property
    def total(self) -> float:
        """Total hours."""
        return self.training + self.labeling + self.evaluation


def hours_of(
    shape: Shape,
    lengths: Lengths,
    data: Data,
    gpu: Gpu,
    hparams: Mapping[str, Any],
    schedule: Schedule,
    paths: tuple[bool, bool],
    evaluations: int | None = None,
    rates: Mapping[str, Rate] = ASSUMED,
) -> Hours:
    """Return the hours of one leave-one-domain-out job, assuming domains of equal size.

    Args:
        shape: of the model.
        lengths: of the texts.
        data: the dataset.
        gpu: of the job.
        hparams: of the algorithm.
        schedule: its stages; the evaluations follow DomainBed's rule.
        paths: whether the objective has a label term, and a chain term.
        evaluations: number of evaluations, if ``--checkpoint_freq`` overrides the schedule.
        rates: what the GPU achieves.
    """
    sources = data.domains - 1
    peak = gpu.tflops * 1e12
    slow = rates[f"{hparams['quantize']}_slowdown"].value if hparams["quantize"] != "none" else 1.0
    samples = schedule.n_steps * hparams.get("batch_size", 0) * sources if any(paths) else 0
    training = samples * training_flops(shape, lengths, *paths) / (peak * rates["training_mfu"].value) * slow
    if hparams.get("gradient_checkpointing"):
        training *= rates["checkpointing"].value
    a_chain = seconds_to_write(shape, lengths, gpu, hparams, rates, labels_greedily(hparams))
    batch = hparams["eval_batch"] if _looks_ahead(hparams) else min(STOCK_BATCH, hparams["eval_batch"])
    at_a_time, votes = {**hparams, "eval_batch": batch}, hparams.get("votes", 1)
    chain = seconds_to_write(shape, lengths, gpu, at_a_time, rates, votes == 1) * votes
    label = seconds_to_score(shape, lengths, data.classes, gpu, hparams, rates)
    rounds = sum(stage.round > 0 for stage in schedule.stages)
    if evaluations is None and _labels_are_answers(hparams):
        rounds = min(rounds, int(schedule.stages[0].round > 0))  # all later ones begin with an evaluation
    in_training = data.images * sources / data.domains * 0.8
    # Drawn with replacement: after e epochs, a share of 1 - exp(-e) has been drawn, and labeled once.
    met = in_training * (1 - math.exp(-hparams.get("sarr_epochs", 0)))
    first = min(hparams.get("first_evaluation", 0), schedule.n_steps)
    if evaluations is None:
        steps = {*range(0, schedule.n_steps, schedule.checkpoint_freq), schedule.n_steps - 1}
        evaluations = sum(step + 1 >= first for step in steps)
    elif first > 1:
        evaluations -= 1
    an_answer = chain if hparams["answer"] == "chain" else label
    evaluation = data.images * (evaluations * an_answer + (label + chain - an_answer) * hparams["both_answers"])
    labeling = rounds * met * a_chain * hparams.get("sarr_votes", 1)
    return Hours(training / 3600, labeling / 3600, evaluation / 3600, evaluations)


def _looks_ahead(hparams: Mapping[str, Any]) -> bool:
    """Return whether the chains of an evaluation are generated at its start, for all splits together."""
    return not hparams.get("data_augmentation", False) and hparams.get("votes", 1) == 1


def _labels_are_answers(hparams: Mapping[str, Any]) -> bool:
    """Return whether a round reuses the chains of the previous evaluation as its own."""
    return hparams["answer"] == "chain" and labels_greedily(hparams) and _looks_ahead(hparams)


def labels_greedily(hparams: Mapping[str, Any]) -> bool:
    """Return whether the chains of rounds are generated without sampling."""
    return bool(hparams.get("temperature", 0) == 0 and hparams.get("sarr_votes", 1) == 1)


def seconds_to_write(
    shape: Shape,
    lengths: Lengths,
    gpu: Gpu,
    hparams: Mapping[str, Any],
    rates: Mapping[str, Rate] = ASSUMED,
    greedy: bool = True,
) -> float:
    """Return the seconds to generate one of many chains, prefill included, ``eval_batch`` at a time.

    Greedy chains are decoded in slots that are refilled (`mllm.decoding`), so that a step gives a token of each; the
    last chains of an evaluation, when slots run empty, are not counted. Sampled ones are decoded in batches until the
    longest ends, assumed to be 1.5 times the mean. A step reads all weights, and all keys and values.
    """
    batch, quantized = hparams["eval_batch"], hparams["quantize"] != "none"
    prompt = shape.tiles * shape.image_tokens + lengths.question + lengths.instruction
    steps = min((1.0 if greedy else 1.5) * lengths.chain, hparams["max_new_tokens"])
    least = rates["step_overhead" if has_graphs(quantized, greedy) else "launch_overhead"].value
    per_weight = _BYTES_PER_WEIGHT[hparams["quantize"]]
    moved = bytes_of_a_token(shape, batch, prompt + steps / 2, per_weight)
    slow = 2.0 if quantized else 1.0  # unmerged adapters, dequantization
    a_step = slow * max(least, moved / (gpu.bandwidth * rates["bandwidth"].value))
    return float(_prefill(shape, prompt, gpu, rates) * slow + steps * a_step / batch)


def has_graphs(quantized: bool, greedy: bool) -> bool:
    """Return whether decoding steps are replayed as CUDA graphs, and not launched by Python."""
    return greedy and not quantized


def bytes_of_a_token(shape: Shape, batch: int, tokens: float, per_weight: float = 2.0) -> float:
    """Return the bytes that a decoding step reads: the weights, and the keys and values of ``tokens`` in each row."""
    return (shape.language.weights + shape.head) * per_weight + batch * tokens * shape.kv_bytes


def seconds_to_score(
    shape: Shape,
    lengths: Lengths,
    classes: int,
    gpu: Gpu,
    hparams: Mapping[str, Any],
    rates: Mapping[str, Rate] = ASSUMED,
) -> float:
    """Return the seconds of scoring one image by every class name: the prompt, and the trie of names in one forward."""
    slow = 2.0 if hparams["quantize"] != "none" else 1.0
    tokens = shape.tiles * shape.image_tokens + lengths.question + lengths.name * classes
    return _prefill(shape, tokens, gpu, rates) * slow


def prefill_flops(shape: Shape, tokens: float) -> float:
    """Return the operations of reading one image and a row of ``tokens`` tokens."""
    return shape.tiles * shape.vision.forward(shape.patches) + shape.language.forward(tokens, causal=True)


def _prefill(shape: Shape, tokens: float, gpu: Gpu, rates: Mapping[str, Rate]) -> float:
    return prefill_flops(shape, tokens) / (gpu.tflops * 1e12 * rates["prefill_mfu"].value)
