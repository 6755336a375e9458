"""Whether the embedded model computes on a GPU what it computes on the CPU, and with which attention kernels."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from domainbed_reasoning.chains.prompts import q_cls, q_reason
from domainbed_reasoning.images import shapes
from domainbed_reasoning.mllm import MLLM, LoraSettings, load_mllm

Row = dict[str, Any]
LORA = LoraSettings(8, 16)
NAMES = shapes.CLASS_NAMES
QUESTIONS = (q_cls(NAMES, "creature"), q_reason(NAMES, "creature"))
COUNT = 4  # images
LOSS_BAR, COSINE_BAR, SCORES_BAR = 1e-4, 0.999, 1e-3  # relative; of gradients in bfloat16; nats


def pictures() -> torch.Tensor:
    """Return images of the embedded dataset, ``(n, 3, H, W)`` bytes."""
    import numpy as np

    drawn = [np.array(shapes.render(0, index, misleading=False)) for index in range(COUNT)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def embedded(device: torch.device, dtype: str = "float32") -> MLLM:
    """Return the embedded model with random adapters, the same on every device."""
    mllm = load_mllm("tiny", lora=LORA, dtype=dtype, device=device)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in mllm.adapters().values():
            weight.copy_(0.02 * torch.randn(weight.shape, generator=chance))
    return mllm.eval()


def loss_of(mllm: MLLM) -> torch.Tensor:
    """Return the mean negative log-likelihood of names and chains, both in one row."""
    names = [NAMES[shapes.label(0, index)] for index in range(COUNT)]
    chains = [shapes.chain(0, index) for index in range(COUNT)]
    pairs = mllm.two_path_log_likelihoods(pictures(), QUESTIONS, (names, chains))
    return -sum((values.sum() / mask.sum() for values, mask in pairs), torch.zeros((), device=mllm.device))


def gradient_of(mllm: MLLM) -> torch.Tensor:
    """Return the gradient of `loss_of` with respect to all adapters, float32, on the CPU."""
    mllm.zero_grad()
    loss_of(mllm).backward()
    return torch.cat([weight.grad.float().flatten().cpu() for weight in mllm.adapters().values()])  # type: ignore[union-attr]


def checks(device: torch.device) -> Iterator[Row]:
    """Yield what was compared: ``what``, ``value``, ``passed``; see `LOSS_BAR` and the others."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        rows = list(_numbers(device))
    yield from rows
    for path, kernels in attention_kernels(embedded(device, "bfloat16")).items():
        fast = bool(kernels) and not any("math" in name for name in kernels)
        yield {"what": f"attention of {path}", "value": "fast" if fast else "math", "passed": fast, "kernels": kernels}


def _numbers(device: torch.device) -> Iterator[Row]:
    reference, there = embedded(torch.device("cpu")), embedded(device)
    with torch.no_grad():
        expected, found = float(loss_of(reference)), float(loss_of(there))
    gap = abs(found - expected) / abs(expected)
    yield {"what": "loss, float32, against the CPU", "value": gap, "passed": gap <= LOSS_BAR}
    chains = [mllm.generate(pictures(), QUESTIONS[1], 112) for mllm in (reference, there)]
    equal = sum(a == b for a, b in zip(*chains, strict=True))
    yield {"what": "greedy chains equal to the CPU's", "value": f"{equal}/{COUNT}", "passed": equal == COUNT}
    low = embedded(device, "bfloat16")
    cosine = float(torch.cosine_similarity(gradient_of(reference), gradient_of(low), dim=0))
    yield {"what": "gradient in bfloat16, cosine with float32", "value": cosine, "passed": cosine >= COSINE_BAR}
    with torch.no_grad():
        scores = [
            mllm.class_scores(pictures(), QUESTIONS[0], NAMES) for mllm in (there, there.copy_for_inference().eval())
        ]
    gap = float((scores[0] - scores[1]).abs().max())
    yield {"what": "class scores, merged against unmerged", "value": gap, "unit": "nats", "passed": gap <= SCORES_BAR}


def attention_kernels(mllm: MLLM) -> dict[str, list[str]]:
    """Return the names of the attention operations that each path of the model uses."""
    images = pictures()
    names, chains = [NAMES[0]] * COUNT, [shapes.chain(0, 0)] * COUNT
    with torch.no_grad():
        encoded = mllm.encode(images)
    paths: dict[str, Callable[[], object]] = {
        "the image encoder": lambda: mllm.encode(images),
        "single-path rows": lambda: mllm.log_likelihoods(encoded, QUESTIONS[1], chains),
        "two-path rows": lambda: mllm.two_path_log_likelihoods(images, QUESTIONS, (names, chains)),
        "class names": lambda: mllm.class_scores(images, QUESTIONS[0], NAMES),
        "generation": lambda: mllm.generate(images, QUESTIONS[1], 4),
    }
    found = {}
    for path, call in paths.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        events = {event.key.removeprefix("aten::") for event in profile.key_averages()}
        found[path] = sorted(name for name in events if re.match(r"_scaled_dot_product_.*attention", name))
    return found


def kernels_of(call: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """Return name, seconds and calls of every kernel of a call, longest first; on the CPU those of its operations."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in profiled.key_averages():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # its kernels are events of their own
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((event.key, took / 1e6, event.count))
    return sorted(found, key=lambda each: -each[1])


def counted_syncs(call: Callable[[], object]) -> int:
    """Return how often a call waits for CUDA, as PyTorch detects it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def images_encoded() -> Iterator[list[int]]:
    """Yield a list that gets the number of images of every call of the image encoder."""
    counts: list[int] = []
    plain = MLLM.encode

    def encode(self: MLLM, images: torch.Tensor) -> dict[str, Any]:
        counts.append(len(images))
        return plain(self, images)

    with mock.patch.object(MLLM, "encode", encode):
        yield counts
