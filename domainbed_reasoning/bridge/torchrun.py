"""One job on several GPUs: `torchrun --nproc-per-node N -m domainbed.scripts.train …`, from an unmodified DomainBed.

The import hook calls `join` in each process of torchrun before DomainBed is imported, while the train script has not
yet read its arguments. All ranks then run the same script with the same seeds. What differs between them is decided
here: the GPU, the folder (rank 0 alone writes to ``--output_dir``; others get a temporary one), and what is printed
(rank 0's output, and one report of a failure, from whichever rank had it).
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from domainbed_reasoning import __version__, registry
from domainbed_reasoning.bridge.train_args import TRAIN_SCRIPT
from domainbed_reasoning.bridge.versions import LIBRARIES, installed, source_digests
from domainbed_reasoning.method.ranks import RankLost, Ranks
from domainbed_reasoning.mllm.devices import visible_gpus

_JOIN = timedelta(minutes=10)
_EXCHANGE = timedelta(days=7)  # an exchange waits for the slowest rank; torchrun notices dead ones
_FIRST_SECONDS, _REPORT_SECONDS = 5.0, 15.0  # that a rank waits for rank 0 to report a failure, and for the report
_SHOWN = 120  # characters of the arguments in an error

_ranks = Ranks()
_output_dir: str | None = None  # of the ranks above 0


def ranks() -> Ranks:
    """Return the ranks that share this process's job; a single one without torchrun."""
    return _ranks


def join() -> None:
    """Join the other ranks, if torchrun has started this process and it runs DomainBed's train script.

    Raises:
        SystemExit: the ranks do not fit together; rank 0 prints why.
    """
    global _ranks, _output_dir
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or _ranks.world > 1 or not _is_train_script():
        return
    _end_with_agent()
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    about = _describe_rank()
    store, _, _ = next(rendezvous("env://", timeout=_JOIN))
    own = PrefixStore("domainbed-reasoning", store)
    own.set(f"rank {rank}", json.dumps(about))
    if rank == 0:
        problem = _problem([json.loads(own.get(f"rank {other}")) for other in range(world)])
        if problem:
            print(f"domainbed-reasoning: {problem}", file=sys.stderr, flush=True)
        own.set("problem", problem)
    if own.get("problem"):
        raise SystemExit(1)
    if rank > 0:
        _output_dir = tempfile.mkdtemp(prefix=f"domainbed-reasoning-rank{rank}-")
        atexit.register(shutil.rmtree, _output_dir, ignore_errors=True)
        sys.argv += ["--output_dir", _output_dir, "--skip_model_save"]
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    before = sys.excepthook
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_EXCHANGE)
    sys.excepthook = _Reporter(own, rank, before)
    atexit.register(_leave)
    _ranks = Ranks(rank, world)


def check_job(algorithm: str, args: argparse.Namespace | None) -> None:
    """Check that several ranks can run this process's job.

    Args:
        algorithm: whose hyper-parameters the train script requests first.
        args: the train script's; None if they are unknown.

    Raises:
        ValueError: the algorithm does not share its work, the script is another one or has read its arguments before
            it imported DomainBed, or ``--output_dir`` contains records of another job.
    """
    if _ranks.world == 1:
        _check_script(algorithm, args)
        return
    cls = registry.load(registry.ALGORITHMS[algorithm]) if algorithm in registry.ALGORITHMS else None
    if not getattr(cls, "SHARES_WORK", False):
        raise ValueError(
            f"{algorithm} runs on one GPU: {_ranks.world} ranks would train {_ranks.world} separate models, as only "
            "this package's MLLM algorithms share an update between ranks. Start it without torchrun."
        )
    if args is None:
        return
    if _output_dir not in (None, args.output_dir):
        raise ValueError(
            "This train script reads its arguments before it imports domainbed, so that all ranks write to the same "
            "--output_dir. Import domainbed first."
        )
    if other := _job_in(Path(args.output_dir), vars(args)):
        raise ValueError(
            f"--output_dir {args.output_dir} contains records of another job ({other}). Choose another folder."
        )


def _check_script(algorithm: str, args: argparse.Namespace | None) -> None:
    """Check that no script other than DomainBed's runs a job of ours in each process of torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or args is None or algorithm not in registry.ALGORITHMS:
        return
    if multiprocessing.parent_process() is None:
        raise ValueError(
            "torchrun has started several processes of this script, each of which would run the whole job. Only "
            f"`-m {TRAIN_SCRIPT}` runs one job on several ranks; start other scripts without torchrun."
        )


def _is_train_script() -> bool:
    """Return whether this process runs a train script of DomainBed, and is none of its children."""
    main = vars(sys.modules["__main__"])
    name = getattr(main.get("__spec__"), "name", None)
    path = Path(str(main.get("__file__", ""))).parts[-3:]
    is_script = name == TRAIN_SCRIPT or path == ("domainbed", "scripts", "train.py")
    return is_script and multiprocessing.parent_process() is None


def _end_with_agent() -> None:
    """Have Linux end this process when torchrun is killed: in a session of its own, it would collide with a restart."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _describe_rank() -> dict[str, Any]:
    """Return what must be the same for all ranks, and take a GPU."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus, problem = visible_gpus(), ""
    if gpus and here > len(gpus):
        problem = f"{here} ranks on {platform.node()}, which has {len(gpus)} GPUs. Use --nproc-per-node {len(gpus)}."
    elif gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]
    versions = {"domainbed-reasoning": __version__, "Python": platform.python_version()}
    versions |= {name: installed(name) or "not installed" for name in LIBRARIES}
    digests = {f"source files of {name}": digest[:12] for name, digest in source_digests().items()}
    device = "GPU" if gpus else "CPU"
    return {"arguments": sys.argv[1:], "versions": {**versions, **digests, "device": device}, "problem": problem}


def _problem(described: Sequence[Mapping[str, Any]]) -> str:
    """Return why ranks cannot work together; empty if they can."""
    first = described[0]
    for rank, other in enumerate(described):
        if other["problem"]:
            return str(other["problem"])
        if other["arguments"] != first["arguments"]:
            return (
                f"rank {rank} has other arguments than rank 0: {_unlike(other['arguments'], first['arguments'])} "
                f"instead of {_unlike(first['arguments'], other['arguments'])}. Start all ranks with the same command."
            )
        differing = [name for name, value in first["versions"].items() if other["versions"].get(name) != value]
        if differing:
            changes = ", ".join(
                f"{name} {other['versions'].get(name)} instead of {first['versions'][name]}" for name in differing
            )
            return f"rank {rank} has other versions than rank 0: {changes}. Install the same on all nodes."
    return ""


def _unlike(arguments: Sequence[str], others: Sequence[str]) -> str:
    """Return the arguments from the first that differs, shortened, from the option that it belongs to."""
    equal = next((at for at, pair in enumerate(zip(arguments, others, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(arguments), len(others)) if equal is None else equal
    if 0 < start <= len(arguments) and not (arguments[start : start + 1] or ["--"])[0].startswith("--"):
        start -= 1
    shown = shlex.join(arguments[start:])
    return (shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…") or "nothing more"


def _job_in(folder: Path, args: Mapping[str, Any]) -> str:
    """Return the arguments of another job that has records in a folder, where they differ; empty without one."""
    try:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    for line in lines:
        try:
            other = json.loads(line)["args"]
            differing = [f"--{name} {other[name]}" for name in other if args.get(name) != other[name]]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if differing:
            return ", ".join(differing)[:_SHOWN]
    return ""


class _Reporter:
    """The excepthook of a rank: one of the ranks that fail prints the reason, rank 0 if it fails as well.

    Args:
        store: of all ranks; torchrun keeps it.
        rank: of this process.
        before: the previous excepthook.
    """

    def __init__(self, store: Any, rank: int, before: Any):
        self.store, self.rank, self.before = store, rank, before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print the error, or wait until another rank has printed its own."""
        if issubclass(kind, KeyboardInterrupt):  # of all ranks
            if self.rank == 0:
                self.before(kind, error, trace)
        elif self._may_report():
            try:
                self._print(kind, error, trace)
            finally:
                self._set("reported")

    def _print(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self.rank == 0 and not isinstance(error, RankLost):
            self.before(kind, error, trace)
            return
        out = sys.stderr if self.rank == 0 else sys.__stderr__  # rank 0's is also DomainBed's err.txt
        if isinstance(error, RankLost):
            cause = error.__cause__
            why = f" ({type(cause).__name__}: {cause})" if cause is not None else ""
            print(f"domainbed-reasoning: {error}{why}", file=out, flush=True)
        else:
            print(f"Rank {self.rank}:", file=out)
            traceback.print_exception(kind, error, trace, file=out)

    def _may_report(self) -> bool:
        try:
            if self.rank > 0:
                self._wait_for("failed", _FIRST_SECONDS)
            if self.store.add("failed", 1) == 1:
                return True
            self._wait_for("reported", _REPORT_SECONDS)
        except Exception:  # torchrun has ended, and the store with it
            return self.rank == 0
        return False

    def _wait_for(self, key: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _set(self, key: str) -> None:
        try:
            self.store.set(key, "")
        except Exception:  # as above
            return


def _leave() -> None:
    """End the group at the end of a job; a rank that fails leaves it open, as others may wait in an exchange."""
    import torch.distributed as dist

    if not getattr(sys, "last_value", None) and dist.is_initialized():
        dist.destroy_process_group()
