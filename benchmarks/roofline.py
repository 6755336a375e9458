"""Operations, bytes and kernels of an MTCT step at InternVL3-8B's size, counted on the meta device: no GPU, no weights.

    python -m benchmarks.roofline                       # as training does: the last lines are values and their bars
    python -m benchmarks.roofline --adapters peft       # the same model with PEFT's own layers

Runs forward and backward of a micro-batch whose rows are `[prefix | chain | class name]`, as in training, and counts
every kernel that PyTorch's eager mode would launch. The roofline takes for each kernel the longer of moving its
bytes and computing its operations at the GPU's published peaks, and at least 2 µs; the launch floor takes 38 µs a
kernel on the host, as beside an H100 (results/gpu). Attention counts as one flash kernel, dropout as one fused kernel,
as on CUDA. The float32 arithmetic of adapters is what touches float32 tensors beyond what the same model without
adapters does.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from domainbed_reasoning.method.objective import chain_nll, label_nll
from domainbed_reasoning.mllm.adapters import adapted, lora_targets
from domainbed_reasoning.mllm.likelihood import token_log_likelihoods
from domainbed_reasoning.mllm.sealed import import_peft
from domainbed_reasoning.mllm.tree_attention import install
from domainbed_reasoning.results.published import GPUS, KNOWN_CONFIGS

MODEL = "OpenGVLab/InternVL3-8B-hf"
GPU = GPUS["H100"]
FLOAT32 = 67e12  # operations a second without tensor cores, H100 SXM data sheet
SHORTEST, LAUNCH = 2e-6, 38e-6  # seconds a kernel, on the GPU and on the host
FLOAT32_BAR, KEPT_BAR = 0.05, 3.6  # of the micro-batch's roofline; GiB an image
ADAPTERS = ("float32", "peft", "bfloat16", "none")
IMAGE, INSTRUCTION, QUESTION_OF_CHAIN, TAIL = 256, 35, 85, 3  # tokens; a class name in the prompt is 3
# Operations that launch no kernel.
VIEWS = set(
    "_reshape_alias _unsafe_view alias as_strided detach diagonal empty empty_like empty_strided expand is_same_size "
    "lift_fresh narrow new_empty new_empty_strided permute reshape select slice split split_with_sizes squeeze t "
    "transpose unbind unflatten unsafe_split unsqueeze view".split()
)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")


class Counting(TorchDispatchMode):
    """Counts what runs inside of it, by (stage, kernel).

    Attributes:
        stage: name under which kernels are counted.
        kernels: how many.
        bytes: read and written.
        operations: multiplications and additions.
        seconds: at the roofline.
        float32: those of kernels that read or write float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.float32 = 0.0

    def add(
        self,
        kernel: str,
        moved: float,
        operations: float = 0.0,
        peak: float = GPU.tflops * 1e12,
        float32: bool = False,
    ) -> None:
        """Count one kernel."""
        key = (self.stage, kernel)
        self.kernels[key] += 1
        self.bytes[key] += moved
        self.operations[key] += operations
        seconds = max(moved / GPU.bandwidth, operations / peak, SHORTEST)
        self.seconds[key] += seconds
        self.float32 += seconds * float32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in VIEWS:
            return out
        read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        moved = sum(map(size_of, [*read.values(), *written]))
        float32 = any(tensor.dtype == torch.float32 for tensor in [*read.values(), *written])
        if name in PRODUCTS:
            left, right = args[1:3] if "addmm" in name else args[:2]
            slow = left.dtype == torch.float32
            kernel = f"{name} {'float32' if slow else 'bfloat16'}"
            self.add(kernel, moved, 2 * left.numel() * right.shape[-1], FLOAT32 if slow else GPU.tflops * 1e12, float32)
        elif name == "convolution":
            self.add(name, moved, 2 * written[0].numel() * args[1][0].numel(), float32=float32)
        else:
            self.add(name, moved, float32=float32)
        return out


def size_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; what is expanded is read once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


class Attention(torch.autograd.Function):
    """A flash kernel forward, one backward with 2.5 times the operations."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, causal: bool, counting: Counting) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        ctx.counting = counting
        pairs = query.shape[-2] * key.shape[-2] * (0.5 if causal else 1.0)
        ctx.operations = 4 * query.shape[0] * query.shape[1] * query.shape[-1] * pairs
        counting.add("attention", 2 * size_of(query) + size_of(key) + size_of(value), ctx.operations)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        moved = 4 * size_of(query) + 2 * size_of(key) + 2 * size_of(value)
        ctx.counting.add("attention backward", moved, 2.5 * ctx.operations)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


class AsOnCuda(TorchFunctionMode):
    """Runs attention and dropout as single kernels, where the meta device would take them apart."""

    def __init__(self, counting: Counting):
        super().__init__()
        self.counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return Attention.apply(*args[:3], bool(kwargs.get("is_causal")), self.counting)
        if func is F.dropout:
            share, training = kwargs.get("p", 0.5), kwargs.get("training", True)
            return torch.native_dropout(args[0], share, True)[0] if training and share else args[0]
        return func(*args, **kwargs)


@contextmanager
def saved_bytes(network: torch.nn.Module) -> Any:
    """Yield a function that returns the bytes that autograd has kept for the backward pass, weights left out."""
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def build(adapters: str, dropout: float) -> Any:
    """Return InternVL3-8B with the paper's adapters (rank 8, both towers) on the meta device.

    Args:
        adapters: ``float32``, as training has them; ``peft``, PEFT's own layers; ``bfloat16``, the same with bfloat16
            matrices; ``none``.
        dropout: of the adapters' inputs, in [0, 1).
    """
    import transformers

    config = transformers.InternVLConfig(**KNOWN_CONFIGS[MODEL][1])
    with torch.device("meta"):
        network: Any = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        install(network)
        network.requires_grad_(False)
        settings = {"r": 8, "lora_alpha": 16, "lora_dropout": dropout}
        settings["target_modules"] = lora_targets(network, "both", False)
        if adapters == "float32":
            network = adapted(network, **settings)
        elif adapters != "none":
            peft = import_peft()
            network = peft.get_peft_model(network, peft.LoraConfig(**settings))
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16 if adapters == "bfloat16" else torch.float32)
            weight.grad = torch.zeros_like(weight)  # an earlier micro-batch's
    return network.train()


def count(adapters: str, micro_batch: int, dropout: float, classes: int, chain: int, name: int) -> tuple[Counting, int]:
    """Return the counts of a micro-batch's forward and backward pass, and the bytes kept between them.

    Args:
        adapters: see `build`.
        micro_batch: images.
        dropout: of the adapters' inputs, in [0, 1).
        classes: names in the prompt.
        chain: tokens of a chain.
        name: tokens of a class name.
    """
    network = build(adapters, dropout)
    model = network if adapters == "none" else network.base_model.model
    prefix = IMAGE + INSTRUCTION + 3 * classes
    branches = (prefix, TAIL + QUESTION_OF_CHAIN + chain, TAIL + name)
    meta: dict[str, Any] = {"device": "meta"}
    text = torch.empty(micro_batch, sum(branches) - IMAGE, model.config.text_config.hidden_size, **meta).bfloat16()
    positions = torch.cat([torch.arange(sum(branches[:2])), prefix + torch.arange(branches[2])])
    twig = torch.ones(1, 1, branches[2], prefix + branches[2], dtype=torch.bool, **meta)
    with Counting() as counting, AsOnCuda(counting), saved_bytes(network) as kept:
        counting.stage = "vision"
        pixels = torch.empty(micro_batch, 3, 448, 448, dtype=torch.bfloat16, **meta)
        pixels.requires_grad_(adapters == "none")  # so that all layers have a backward pass
        image = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        counting.stage = "language"
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([image, text], dim=1),
            position_ids=positions.to("meta").expand(micro_batch, -1),
            attention_mask=twig,
            branches=branches,
            use_cache=False,
        )[0]
        counting.stage = "head"
        by_chain, by_label = (_log_likelihoods(model, hidden, end, length) for end, length in _targets(branches, chain))
        loss = label_nll(*by_label).sum() + chain_nll(*by_chain).sum()
        saved = kept()
        counting.stage = "backward"
        loss.backward()
    return counting, saved


def _targets(branches: tuple[int, int, int], chain: int) -> list[tuple[int, int]]:
    """Return where each branch ends, and how many targets it has."""
    return [(branches[0] + branches[1], chain), (sum(branches), branches[2] - TAIL)]


def _log_likelihoods(model: Any, hidden: torch.Tensor, end: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model.lm_head(hidden[:, end - length : end].reshape(-1, hidden.shape[-1]))
    targets = torch.zeros(len(logits), dtype=torch.long, device="meta")
    values = token_log_likelihoods(logits, targets).view(len(hidden), length)
    return values, torch.ones_like(values, dtype=torch.bool)


def describe(counting: Counting, saved: int, micro_batch: int, bare: Counting) -> str:
    """Return the counts by image, in all, by stage, for the kernels that take longest, and beside their bars.

    Args:
        counting: of a micro-batch.
        saved: bytes kept for its backward pass.
        micro_batch: images.
        bare: of the same micro-batch without adapters.
    """
    seconds, operations = sum(counting.seconds.values()), sum(counting.operations.values())
    kernels, moved = sum(counting.kernels.values()), sum(counting.bytes.values())
    by_stage: Counter[str] = Counter()
    by_kernel: Counter[str] = Counter()
    for (stage, kernel), value in counting.seconds.items():
        by_stage[stage] += value
        by_kernel[kernel] += value
    each = 1e3 / micro_batch
    return "\n".join(
        [
            f"per image: {operations / micro_batch / 1e12:.2f} TFLOP, {moved / micro_batch / 1e9:.1f} GB moved, "
            f"{saved / micro_batch / 2**30:.2f} GiB kept for the backward pass",
            f"per micro-batch: {kernels:,} kernels",
            f"per image: roofline {seconds * each:.1f} ms, launch floor {kernels * LAUNCH * each:.1f} ms; "
            f"MFU at the roofline {operations / seconds / (GPU.tflops * 1e12):.0%}",
            "by stage (ms): " + ", ".join(f"{stage} {value * each:.1f}" for stage, value in by_stage.items()),
            "longest (ms): " + ", ".join(f"{name} {value * each:.1f}" for name, value in by_kernel.most_common(10)),
            f"adapters' float32 arithmetic and casts: {float32_share(counting, bare):.1%} (bar: {FLOAT32_BAR:.0%})",
            f"kept for the backward pass: {saved / micro_batch / 2**30:.2f} GiB an image (bar: {KEPT_BAR})",
        ]
    )


def float32_share(counting: Counting, bare: Counting) -> float:
    """Return the share of the roofline that the adapters' float32 arithmetic and casts take, in [0, 1].

    Args:
        counting: of a micro-batch.
        bare: of the same micro-batch without adapters, whose norms and losses have float32 too.
    """
    return max(0.0, counting.float32 - bare.float32) / sum(counting.seconds.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Count one micro-batch and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapters", choices=ADAPTERS, default="float32", help="how they are computed; float32 is as training does"
    )
    parser.add_argument("--micro-batch", type=int, default=4, help="images")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' inputs")
    parser.add_argument("--classes", type=int, default=7, help="class names in the prompt")
    parser.add_argument("--chain", type=int, default=250, help="tokens of a chain")
    parser.add_argument("--name", type=int, default=3, help="tokens of a class name")
    options = parser.parse_args(argv)
    settings = (options.micro_batch, options.dropout, options.classes, options.chain, options.name)
    counting, saved = count(options.adapters, *settings)
    bare, _ = count("none", *settings)
    print(
        f"MTCT step, {MODEL}, adapters {options.adapters}, micro-batch {options.micro_batch}, dropout {options.dropout}"
    )
    print(describe(counting, saved, options.micro_batch, bare))
    return 0


if __name__ == "__main__":
    sys.exit(main())
