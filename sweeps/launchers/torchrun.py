"""Jobs on several GPUs: the sweep's train commands, started by torchrun.

A sweep may contain baselines as well, which run on one GPU: their commands are left as they are.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.train_args import TRAIN_SCRIPT
from domainbed_reasoning.sweeps.launchers.jobs import Job

GPUS = "DOMAINBED_REASONING_GPUS_PER_JOB"
_TRAIN = f"python -m {TRAIN_SCRIPT} "
# One torchrun per node; they meet at a port of the first node that no other job of it uses.
_SRUN = "srun --overlap --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 {python} -m torch.distributed.run"
_MEETING = (
    '--rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint '
    '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"'
)


def on_gpus(job: Job, gpus: int, nodes: int = 1) -> Job:
    """Return the job as torchrun starts it; unchanged for a single GPU and for algorithms that run on one.

    Args:
        job: of the sweep.
        gpus: per node.
        nodes: of a Slurm allocation.

    Raises:
        ValueError: its command is not DomainBed's train script.
    """
    if gpus * nodes == 1 or not _shares_work(" ".join(job.options.get("algorithm", ()))):
        return job
    return dataclasses.replace(job, command=torchrun_command(job.command, gpus, nodes))


def torchrun_command(command: str, gpus: int, nodes: int = 1) -> str:
    """Return a train command for a shell, started by torchrun on the GPUs of each node.

    Args:
        command: ``python -m domainbed.scripts.train …``.
        gpus: per node.
        nodes: of a Slurm allocation; 1 needs no Slurm.

    Raises:
        ValueError: it is another command.
    """
    if not command.startswith(_TRAIN):
        raise ValueError(f"Only `{_TRAIN.strip()}` runs on several GPUs; got {command!r:.200}. Unset {GPUS}.")
    train = command.removeprefix("python ")
    if nodes == 1:
        return f"python -m torch.distributed.run --standalone --nproc-per-node {gpus} {train}"
    srun = _SRUN.format(nodes=nodes, python=shlex.quote(sys.executable))
    return f"{srun} --nnodes {nodes} --nproc-per-node {gpus} {_MEETING} {train}"


def gpus_of(job: Job) -> int:
    """Return the GPUs per node that a job uses, read from its command."""
    return int(job.options.get("nproc-per-node", ("1",))[0])


def _shares_work(algorithm: str) -> bool:
    target = registry.ALGORITHMS.get(algorithm)
    return target is not None and bool(getattr(registry.load(target), "SHARES_WORK", False))
