"""Copy small tensors between host and GPU through pinned memory, without waiting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

_Record = TypeVar("_Record")
_PINS = {"cuda"}  # device types whose copies from pinned memory are asynchronous


def moved(record: _Record, device: torch.device) -> _Record:
    """Return a record with its tensors on ``device``, through one copy.

    Args:
        record: a dataclass, or a tuple, of integer and boolean tensors, of more of these, and of other values.
        device: where they go.
    """
    tensors = _tensors(record)
    if all(tensor.device == device for tensor in tensors):
        return record
    flat = torch.cat([tensor.reshape(-1).long() for tensor in tensors])
    there = (flat.pin_memory() if device.type in _PINS else flat).to(device, non_blocking=True)
    parts = iter(there.split([tensor.numel() for tensor in tensors]))
    result: _Record = _replaced(record, iter([next(parts).view(each.shape).to(each.dtype) for each in tensors]))
    return result


def take(values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows of a tensor; a list as its index would be copied to the GPU while the host waits."""
    return torch.stack([values[row] for row in rows])


def is_asynchronous(device: torch.device) -> bool:
    """Return whether ``device`` computes and copies asynchronously to the host."""
    return device.type in _PINS


def read_later(values: torch.Tensor) -> Callable[[], list[Any]]:
    """Start copying values to the host; return a function that waits for this copy alone and returns the values.

    Args:
        values: on any device; may be overwritten afterwards.
    """
    if not is_asynchronous(values.device):
        return values.clone().tolist
    there = torch.empty(values.shape, dtype=values.dtype).pin_memory()
    there.copy_(values, non_blocking=True)
    copied = torch.cuda.Event() if values.device.type == "cuda" else None
    if copied is not None:
        copied.record()

    def read() -> list[Any]:
        if copied is not None:
            copied.synchronize()
        return list(there.tolist())

    return read


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in _parts(value) for tensor in _tensors(part)]


def _parts(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value) if isinstance(value, tuple) else []


def _replaced(value: Any, tensors: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    parts = [_replaced(part, tensors) for part in _parts(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **dict(zip(names, parts, strict=True)))
    return tuple(parts) if isinstance(value, tuple) else value
