"""Carry what DomainBed's loaders do not: the identity of samples, class names, and chains.

DomainBed's batches hold ``(x, y)`` alone. `SampleTensor` lets ``x`` remember where its images come from, through the
loaders' workers, collation and moves to a device; `Task` says what the dataset is about. DomainBed tells an algorithm
nothing of the dataset that was built with the same hyper-parameters before it: by them the algorithm finds its `Task`.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch.utils.data._utils import collate as _collate

from domainbed_reasoning.bridge.train_args import values_of_callers
from domainbed_reasoning.method.ranks import Ranks
from domainbed_reasoning.method.task import SampleId, Task

# Operations that keep row i as sample i; all others return a plain tensor.
_KEEP = {
    "to",
    "cuda",
    "cpu",
    "float",
    "half",
    "bfloat16",
    "double",
    "clone",
    "detach",
    "contiguous",
    "pin_memory",
    "requires_grad_",
    "share_memory_",
}


class SampleTensor(torch.Tensor):
    """A batch of images with the ids of its samples.

    Attributes:
        sample_ids: long tensor on the CPU, ``(2,)`` for one image and ``(n, 2)`` for a batch of n: environment, index.
    """

    sample_ids: torch.Tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on plain tensors; keep the ids if rows remain samples."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(out, torch.Tensor):
            return _ids_after(name, args, kwargs or {}, out)
        return _plain(out)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle as a plain tensor and its ids (loaders' workers, checkpoints)."""
        return with_ids, (self.as_subclass(torch.Tensor), self.sample_ids)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override] # torch's stub has another signature
        """Show the plain tensor and the ids."""
        return f"SampleTensor({self.as_subclass(torch.Tensor)!r}, sample_ids={ids_of(self)!r})"


def with_ids(x: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Return ``x`` as a `SampleTensor` with these ids; a plain tensor for None."""
    plain = x.as_subclass(torch.Tensor)
    if ids is None:
        return plain
    tensor = plain.as_subclass(SampleTensor)
    tensor.sample_ids = ids
    return tensor


def ids_of(x: torch.Tensor) -> torch.Tensor | None:
    """Return the sample ids of ``x``, ``(n, 2)`` or ``(2,)``; None for a plain tensor."""
    return x.__dict__.get("sample_ids") if isinstance(x, SampleTensor) else None


def environment_of(task: Task, ids: torch.Tensor | None) -> int | None:
    """Return the environment whose questions are asked about samples; None if all have the same, or it is unknown.

    Args:
        task: of the samples.
        ids: of the samples, ``(n, 2)``; None if unknown.

    Raises:
        ValueError: the samples are of several environments with different questions.
    """
    if not task.offered or ids is None:
        return None
    envs = sorted(set(ids[:, 0].tolist()))
    if len(envs) > 1:
        names = ", ".join(task.environments[env] for env in envs)
        raise ValueError(
            f"{task.dataset}: images of several environments ({names}) in one batch, but each environment's questions "
            "offer other classes. Answer the images of each environment separately, as DomainBed does."
        )
    return int(envs[0])


def images_of(task: Task, ranks: Ranks) -> Iterator[tuple[int | None, Iterator[torch.Tensor]]]:
    """Yield this rank's images of a task's dataset, ``(3, H, W)`` bytes, with the environment whose questions they get.

    All images come together, domain by domain, with None for the environment, unless environments have different
    questions. Nothing is yielded if the dataset is gone. With a GPU, worker processes load the images.

    Args:
        task: with its dataset.
        ranks: share the images.
    """
    dataset = task.loaded_from()
    if dataset is None:
        return
    workers = dataset.N_WORKERS if torch.cuda.is_available() else 0
    together: Any = torch.utils.data.ConcatDataset(dataset.datasets)
    parts = enumerate(dataset.datasets) if task.offered else [(None, together)]
    for env, images in parts:
        if ranks.world > 1:
            images = torch.utils.data.Subset(images, ranks.share(range(len(images))))
        loader: Any = torch.utils.data.DataLoader(images, batch_size=64, num_workers=workers)
        yield env, (image for x, _ in loader for image in _plain(x))


def _plain(out: Any) -> Any:
    if isinstance(out, SampleTensor):
        return out.as_subclass(torch.Tensor)
    if isinstance(out, (tuple, list)) and not hasattr(out, "_fields"):
        return type(out)(_plain(item) for item in out)
    return out


def _ids_after(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: torch.Tensor) -> torch.Tensor:
    """Return ``out`` with the ids that are still valid after the operation ``name``, or a plain tensor."""
    ids = None
    if name in _KEEP:
        ids = ids_of(args[0])
    elif name in ("stack", "cat") and args:
        parts = [part_ids for part in args[0] if (part_ids := ids_of(part)) is not None]
        along = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if len(parts) == len(args[0]) and along == 0:
            ids = torch.stack(parts) if name == "stack" else torch.cat(parts)
    elif name == "__getitem__" and (known := ids_of(args[0])) is not None and known.dim() == 2:
        index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        if isinstance(index, (int, slice, list, torch.Tensor)) and not isinstance(index, bool):
            index = index.cpu() if isinstance(index, torch.Tensor) else index
            ids = known[index]
    return with_ids(out, ids)


def _collate_samples(batch: Sequence[SampleTensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    plain = [item.as_subclass(torch.Tensor) for item in batch]
    stacked = _collate.collate_tensor_fn(plain, collate_fn_map=collate_fn_map)
    return with_ids(stacked, torch.stack([item.sample_ids for item in batch]))


_collate.default_collate_fn_map[SampleTensor] = _collate_samples


@dataclass(frozen=True)
class Batch:
    """The minibatches of all domains, together.

    Attributes:
        images: ``(n, 3, H, W)`` bytes.
        labels: n classes.
        ids: n sample ids; None where the dataset carries none.
    """

    images: torch.Tensor
    labels: list[int]
    ids: list[SampleId] | None

    @classmethod
    def gather(
        cls,
        minibatches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        pixels: Callable[[torch.Tensor], torch.Tensor],
        labels: Sequence[Sequence[int]] = (),
    ) -> Batch:
        """Return the domains' minibatches as one batch.

        Args:
            minibatches: images and labels, wherever DomainBed has moved them.
            pixels: prepares a domain's images.
            labels: per environment the label of every index, which spares reading them from a GPU; none if unknown.
        """
        images = torch.cat([pixels(x) for x, _ in minibatches])
        parts = [ids_of(x) for x, _ in minibatches]
        ids = [(int(env), int(index)) for part in parts if part is not None for env, index in part.tolist()]
        if any(part is None for part in parts) or not labels:
            read = torch.cat([y for _, y in minibatches]).tolist()
            return cls(images, [int(label) for label in read], None if any(part is None for part in parts) else ids)
        return cls(images, [int(labels[env][index]) for env, index in ids], ids)


# The hyper-parameters that tasks were registered with: the dictionary, and its content at that time. A task lives as
# long as its dataset, one of the dataset's environments (which loaders reference), or an algorithm.
_LEFT: weakref.WeakKeyDictionary[Task, tuple[Mapping[str, Any], str]] = weakref.WeakKeyDictionary()


def attach_task(hparams: Mapping[str, Any], task: Task) -> None:
    """Register ``task`` for the algorithm that is built with these hyper-parameters; the caller owns the task."""
    _LEFT.pop(task, None)
    _LEFT[task] = (hparams, _content(hparams))


def task_of(hparams: Mapping[str, Any], domains: int | None = None) -> Task | None:
    """Return the task of the dataset that was built with these hyper-parameters; None for stock datasets.

    The dictionary itself counts first, then one of equal content, as a copy has. Where several datasets were built with
    it, the last one counts, if it is the only one of them that the innermost caller knowing any can name.

    Args:
        hparams: of the algorithm.
        domains: how many it trains on, which may tell several tasks apart.

    Raises:
        ValueError: several tasks would do.
    """
    left = list(_LEFT.items())
    found = [task for task, (own, _) in left if own is hparams]
    if not found:
        content = _content(hparams)
        found = [task for task, (_, then) in left if then == content]
    found = [task for task in found if len(task.labels) - len(task.test_envs) == domains] or found
    if len(found) > 1 and _named_by_callers(found) != [found[-1]]:
        raise ValueError(
            f"{len(found)} datasets in this process were built with these hyper-parameters, so the algorithm's dataset "
            "is ambiguous. Use a separate dictionary (`dict(hparams)`) for each dataset and its algorithm, or delete "
            "the other datasets first."
        )
    return found[-1] if found else None


def _content(hparams: Mapping[str, Any]) -> str:
    return json.dumps(dict(hparams), sort_keys=True, default=repr)


def _named_by_callers(tasks: Sequence[Task]) -> list[Task]:
    """Return those of ``tasks`` whose dataset is a variable of the innermost caller that has any."""
    for values in values_of_callers():
        attributes = [getattr(value, "__dict__", None) for value in values if not isinstance(value, torch.nn.Module)]
        named = [own["task"] for own in attributes if isinstance(own, dict) and isinstance(own.get("task"), Task)]
        if known := [task for task in tasks if any(task is other for other in named)]:
            return known
    return []
