"""Where the host waits: reads from the GPU, copies from memory that is not pinned, kernels; counted without a GPU.

    python -m benchmarks.stalls [--samples 43] [--micro-batch 4]      # the last lines are values and their bars
    python -m benchmarks.bench stalls                                 # the kernels alone, as rows of `make bench`

A job's own update, and the engine that writes its answers, run with the embedded model on the meta device, which stands
for the GPU: its tensors hold nothing, so whatever reads one back (`_local_scalar_dense`, `nonzero`, a copy to the CPU)
is seen, counted, and answered with a made-up value. A copy to pinned memory for which the host does not wait is counted
apart. Images come from the CPU, as DomainBed's loaders leave them, and are moved as its train script does.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import CHECKOUT, REPEATS, BenchmarkRow, use_domainbed
from benchmarks.roofline import VIEWS, AsOnCuda
from domainbed_reasoning.mllm import transfer

SYNCS_BAR = 1  # an update
TOKEN_BAR, STEP_KERNELS_BAR = 0, 150  # syncs a decoded token, kernels a decoding step of the embedded model
MICRO_BATCH_KERNELS_BAR = 1200  # of the embedded model, forward and backward pass of both paths
STEPS, SLOTS = 10, 8  # decoded tokens and answers at a time, of which kernels are counted
DEVICE = torch.device("meta")
DOMAINS = 3  # that a job on PACS trains on


class Stalls(TorchDispatchMode):
    """Counts what the host waits for, by operation and the line of ours that asked.

    Attributes:
        syncs: reads of the device's values.
        later: copies of the device's values that the host does not wait for.
        copies: from the host's memory that is not pinned.
        kernels: launched on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.later: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.kernels = 0
        self.pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.device == DEVICE for tensor in tensors)
        if name == "_pin_memory":
            self.pinned.add(args[0].untyped_storage().data_ptr())
            return args[0]
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if on_device and name in ("_local_scalar_dense", "item", "equal"):
            self.syncs[f"{name} {place()}"] += 1
            return torch.ones((), dtype=args[0].dtype).item()
        if on_device and name in ("nonzero", "masked_select", "masked_scatter_backward", "unique2"):
            self.syncs[f"{name} {place()}"] += 1
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=DEVICE)
        if name in ("index", "index_put", "index_put_") and on_device:
            args = (args[0], self._counted(args[1]), *args[2:])
        if name in ("_to_copy", "copy_"):
            target = torch.device(kwargs.get("device") or args[0].device)
            source = args[1] if name == "copy_" else args[0]
            if (
                source.device == DEVICE != target
                and name == "copy_"
                and self._is_pinned(args[0])
                and args[2:] == (True,)
            ):
                self.later[place()] += 1
                return args[0].fill_(1)
            if source.device == DEVICE != target:
                self.syncs[f"{name} to the host {place()}"] += 1
                made = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype, device=target)
                return args[0].copy_(made) if name == "copy_" else made
            if source.device != DEVICE == target and source.dim():
                pinned = self._is_pinned(source) and bool(kwargs.get("non_blocking"))
                self.copies[f"{place()}"] += not pinned
        out = func(*args, **kwargs)
        if name not in VIEWS and (on_device or any(t.device == DEVICE for t in tree_leaves(out) if torch.is_tensor(t))):
            self.kernels += 1
        return out

    @contextlib.contextmanager
    def counted(self) -> Iterator[Stalls]:
        """Count what runs inside, with the meta device as one that pins, and tensors made of lists as copies."""
        with mock.patch.object(transfer, "_PINS", {DEVICE.type}), _Lists(self), self:
            yield self

    def add(self, *kernel: Any) -> None:
        """Count a kernel that `roofline.AsOnCuda` computes in one."""
        self.kernels += 1

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def _counted(self, indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the indices with masks, whose true entries have to be read, as if all of them were true."""
        found: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                self.syncs[f"mask as index {place()}"] += 1
                found += [torch.empty(index.numel(), dtype=torch.long, device=DEVICE)] * index.dim()
            else:
                found.append(index)
        return found


class _Lists(TorchFunctionMode):
    """Counts values of the host that PyTorch copies to the device by itself: new tensors, and lists as indices."""

    def __init__(self, stalls: Stalls):
        super().__init__()
        self.stalls = stalls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_lists = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if of_lists and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            self.stalls.copies[place()] += 1
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == DEVICE:
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = [key for key in keys if torch.is_tensor(key) and key.dim() and key.device != DEVICE]
            self.stalls.copies[place()] += len(tensors) + sum(isinstance(key, list) for key in keys)
        return func(*args, **kwargs)


def place() -> str:
    """Return the innermost line of this package on the stack, and what it called."""
    stack = traceback.extract_stack()
    ours = [index for index, frame in enumerate(stack) if "/benchmarks/" not in frame.filename]
    inner = [i for i in ours if str(CHECKOUT) in stack[i].filename and "site-packages" not in stack[i].filename]
    if not inner:
        return "elsewhere"
    frame, last = stack[inner[-1]], stack[ours[-1]]
    beyond = "" if ours[-1] == inner[-1] else f" > {last.filename.rpartition('/')[2]}:{last.lineno}"
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}{beyond}"


def build(name: str, samples: int, micro_batch: int) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return an algorithm on the embedded dataset whose model is on the meta device, and a batch on the CPU.

    Args:
        name: of the algorithm.
        samples: of a domain in a batch.
        micro_batch: images a forward and backward pass.
    """
    from domainbed_reasoning import registry
    from domainbed_reasoning.bridge.samples import attach_task, with_ids
    from domainbed_reasoning.images import shapes
    from domainbed_reasoning.method.schedule import Schedule, Stage
    from domainbed_reasoning.method.task import Task
    from domainbed_reasoning.mllm.adapters import LoraSettings, add_lora
    from domainbed_reasoning.mllm.model import MLLM

    cls: Any = registry.load(registry.ALGORITHMS[name])
    hparams = {key: hparam.default for key, hparam in cls.HPARAMS.items()}
    hparams |= {"model": "tiny", "dtype": "bfloat16", "micro_batch": micro_batch, "batch_size": samples}
    size = 2 * samples  # of a domain: a batch has to fit into its training split
    labels = [[shapes.label(env, index) for index in range(size)] for env in range(DOMAINS)]
    task = Task(
        dataset="ShapesReasoning",
        class_names=tuple(shapes.CLASS_NAMES),
        environments=tuple("abc"),
        labels=labels,
        images=[[f"{index}.png" for index in range(size)]] * DOMAINS,
        chains={(env, i): shapes.chain(env, i) for env in range(DOMAINS) for i in range(size)},
        subject="creature",
        schedule=Schedule((Stage(0, 0, 99),), 100, 100),
    )
    attach_task(hparams, task)
    with contextlib.redirect_stdout(sys.stderr):
        algorithm = cls((3, 48, 48), len(task.class_names), DOMAINS, hparams)
    network = algorithm.mllm.merge().network.to(DEVICE)
    network = add_lora(network, LoraSettings.of(hparams))
    algorithm.mllm = MLLM(network, algorithm.mllm.processor, algorithm.mllm.family)
    algorithm.snapshots.mllm = algorithm.mllm
    algorithm.train()
    pixels = torch.zeros(samples, 3, 48, 48, dtype=torch.uint8)
    batch = []
    for env in range(DOMAINS):
        ids = torch.tensor([[env, index] for index in range(samples)])
        batch.append((with_ids(pixels, ids), torch.tensor(labels[env][:samples])))
    return algorithm, batch


def count(name: str = "MTCT", samples: int = 43, micro_batch: int = 4) -> Stalls:
    """Return what one update of an algorithm does, its second: the first one fills what is remembered.

    Args:
        name: of the algorithm.
        samples: of each of three domains in a batch.
        micro_batch: images a forward and backward pass.
    """
    algorithm, batch = build(name, samples, micro_batch)
    moved = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batch]  # as the train script does
    for _ in range(2):
        with Stalls().counted() as stalls:
            algorithm.update(moved)
    return stalls


def kernels_of_micro_batch(name: str = "MTCT", micro_batch: int = 4) -> float:
    """Return the kernels that one more micro-batch adds to an update, attention counted as one kernel, as on CUDA.

    Args:
        name: of the algorithm.
        micro_batch: images a forward and backward pass.
    """
    algorithm, batch = build(name, micro_batch, micro_batch)
    moved = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batch]
    kernels = []
    for domains in (DOMAINS, DOMAINS, 1):  # a micro-batch each; the first update fills what is remembered
        with Stalls().counted() as stalls, AsOnCuda(stalls):
            algorithm.update(moved[:domains])
        kernels.append(stalls.kernels)
    return (kernels[1] - kernels[2]) / (DOMAINS - 1)


class _Eager:
    """Stands for CUDA graphs: computes each step as a graph would be captured."""

    def run(self, shape: tuple[int, int], step: Callable[[], None]) -> None:
        step()


@torch.no_grad()
def count_steps(steps: int = STEPS, slots: int = SLOTS) -> Stalls:
    """Return what so many decoding steps do, and the loop around them, as on CUDA; filling the slots is left out.

    Args:
        steps: tokens that each slot decodes after its first.
        slots: answers at a time.
    """
    from domainbed_reasoning.mllm.decoding import Decoder

    algorithm, _ = build("MTCT", 2, 1)
    mllm = algorithm.mllm.merge().eval()
    pixels = torch.zeros(slots, 3, 48, 48, dtype=torch.uint8, device=DEVICE)
    counts = []
    for most in (1, 1, 1 + steps):  # the first one fills what is remembered
        with Stalls().counted() as stalls, AsOnCuda(stalls):
            decoder = Decoder(mllm.generator, algorithm.q_reason, most, slots)
            decoder.graphs = _Eager()
            written = dict(decoder.write(pixels))
        assert [len(written[row]) for row in range(slots)] == [most] * slots
        counts.append(stalls)
    _, filling, found = counts
    for name in ("syncs", "later", "copies"):
        getattr(found, name).subtract(getattr(filling, name))
    found.kernels -= filling.kernels
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Count one update and a few decoding steps, and print; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="MTCT")
    parser.add_argument("--samples", type=int, default=43, help="a domain's, of three")
    parser.add_argument("--micro-batch", type=int, default=4, help="images")
    options = parser.parse_args(argv)
    use_domainbed()
    stalls = count(options.algorithm, options.samples, options.micro_batch)
    for what, counter in (("syncs", stalls.syncs), ("unpinned copies", stalls.copies)):
        for where, times in counter.most_common(20):
            if times:
                print(f"{what}: {times:5} {where}")
    print(f"kernels an update: {stalls.kernels:,}")
    print(f"unpinned copies an update: {sum(stalls.copies.values())} (bar: 0)")
    print(f"host syncs an update: {sum(stalls.syncs.values())} (bar: {SYNCS_BAR})")
    training = kernels_of_micro_batch(options.algorithm, options.micro_batch)
    print(f"kernels a training micro-batch: {training:.1f} (bar: {MICRO_BATCH_KERNELS_BAR})")
    decoding = count_steps()
    reads, kernels = sum(decoding.syncs.values()) / (STEPS * SLOTS), decoding.kernels / STEPS
    print(f"kernels a decoding step: {kernels:.1f} (bar: {STEP_KERNELS_BAR})")
    print(f"copies to pinned memory a decoding step, not waited for: {sum(decoding.later.values()) / STEPS:.1f}")
    print(f"host syncs a decoded token: {reads:.1f} (bar: {TOKEN_BAR})")
    missed = sum(stalls.syncs.values()) > SYNCS_BAR or sum(stalls.copies.values()) > 0
    return int(missed or reads > TOKEN_BAR or kernels > STEP_KERNELS_BAR or training > MICRO_BATCH_KERNELS_BAR)


def run(work: pathlib.Path, repeats: int = REPEATS) -> list[BenchmarkRow]:
    """Return the rows of kernels, counted once; their bars are upper bounds, which a test holds too."""
    use_domainbed()
    found = (
        ("kernels of a training micro-batch, MTCT", kernels_of_micro_batch(), MICRO_BATCH_KERNELS_BAR),
        ("kernels of a decoding step", count_steps().kernels / STEPS, STEP_KERNELS_BAR),
    )
    return [
        BenchmarkRow(
            what,
            "upper bound",
            kernels,
            bound,
            "kernels",
            float("nan"),
            f"at most {bound}",
            kernels <= bound,
            "counted",
        )
        for what, kernels, bound in found
    ]


if __name__ == "__main__":
    sys.exit(main())
