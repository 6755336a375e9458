"""The device that models run on, and what PyTorch knows about its memory and random state.

It is PyTorch's current accelerator: CUDA, as which ROCm appears, XPU or MPS; else the CPU. DomainBed's train script
puts models and batches on CUDA or the CPU, so that its jobs use no other accelerator; `predict`, `doctor` and
`load_mllm` do.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch

from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_MEASURED = ("cuda", "xpu")  # device types whose modules report allocated and free memory in CUDA's terms


def default_device() -> torch.device:
    """Return PyTorch's current accelerator, the CPU without one; logs once that it is one never tried."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    if device.type != "cuda" or torch.version.hip:
        _note_untested("ROCm" if torch.version.hip else device.type.upper())
    return torch.device(device.type)


def job_device() -> torch.device:
    """Return the device of a training job, which is the one that DomainBed's train script uses: CUDA or the CPU."""
    device = default_device()
    if device.type not in ("cuda", "cpu"):
        _note_unused(device.type.upper())
        return torch.device("cpu")
    return device


def visible_gpus() -> list[str]:
    """Return the GPUs that are visible to this process, by their names in CUDA_VISIBLE_DEVICES.

    Invalid names, such as "-1" and Slurm's "NoDevFiles", hide all that follow them, so torch determines the count.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and not named.strip():
        return []
    if named is not None and named.startswith("MIG-"):
        return named.split(",")  # a process can use only one slice, so CUDA counts one
    count = torch.cuda.device_count()
    return [str(index) for index in range(count)] if named is None else named.split(",")[:count]


@functools.cache
def _note_untested(name: str) -> None:
    _log.warning(
        "%s: this package has never been run on it. Check a small job's results against the CPU's, and report what "
        "you find.",
        name,
    )


@functools.cache
def _note_unused(name: str) -> None:
    _log.warning("%s is not used: DomainBed's train script runs on CUDA or the CPU, so this job runs on the CPU.", name)


def memory_is_measured(device: torch.device) -> bool:
    """Return whether PyTorch reports what is allocated on a device at its peak."""
    return device.type in _MEASURED


def free_memory(device: torch.device) -> int | None:
    """Return the bytes available on a device: free memory, and what PyTorch has reserved but not allocated.

    Returns:
        For the CPU, the host's available memory; None where PyTorch does not report it.
    """
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    if not memory_is_measured(device):
        return None
    module: Any = torch.get_device_module(device.type)
    unused = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0] + unused)


def allocated_memory(device: torch.device) -> int:
    """Return the bytes of tensors on a device; 0 where PyTorch does not report it."""
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    return _reported(device, "memory_allocated")


def peak_memory(device: torch.device) -> int:
    """Return the bytes of tensors on a device at their peak; 0 where PyTorch does not report it."""
    return _reported(device, "max_memory_allocated")


def _reported(device: torch.device, what: str) -> int:
    if not memory_is_measured(device):
        return 0
    return int(getattr(torch.get_device_module(device.type), what)(device))


def kept_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context after which the random states of the CPU and of a device are what they were before."""
    if memory_is_measured(device):
        return torch.random.fork_rng([device], device_type=device.type)
    return torch.random.fork_rng([])
