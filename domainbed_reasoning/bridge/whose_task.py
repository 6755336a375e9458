"""Whether the task that an algorithm found is what it is trained on, and what it cannot know outside of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.preflight import is_ours
from domainbed_reasoning.bridge.samples import ids_of
from domainbed_reasoning.bridge.train_args import DEFAULT_HOLDOUT, job_arguments
from domainbed_reasoning.method.schedule import Schedule
from domainbed_reasoning.method.task import Task
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)

_SAME_HPARAMS = "Build the algorithm while its dataset lives, with the dataset's hyper-parameters or an equal copy."
_NOT_FOUND = (
    f"cannot find its dataset's class names and chains: no dataset was built with equal hparams. {_SAME_HPARAMS}"
)


def check_task(task: Task | None, hparams: Mapping[str, Any], algorithm: type) -> None:
    """Refuse a task that cannot be the algorithm's, or none where a dataset of ours must have left one.

    Raises:
        ValueError: naming what does not fit.
    """
    args = job_arguments()
    chosen = hparams.get("algorithm", algorithm.__name__)
    if chosen not in [base.__name__ for base in algorithm.__mro__]:
        raise ValueError(
            f"hparam algorithm must be {algorithm.__name__!r}, the algorithm that runs; got {chosen!r:.80}."
        )
    if task is None:
        if _made_for_a_dataset(hparams) if args is None else is_ours(args.dataset):
            raise ValueError(f"{algorithm.__name__} {_NOT_FOUND}")
    elif args is not None and task.labels:
        requested, built = (args.dataset, sorted(args.test_envs)), (task.dataset, sorted(task.test_envs))
        if requested != built:
            raise ValueError(
                f"The train script's arguments are --dataset {requested[0]} --test_envs "
                f"{' '.join(map(str, requested[1]))}, but the dataset is {built[0]} with the target domains "
                f"{' '.join(map(str, built[1]))}. Make them the same."
            )


def check_batch(task: Task, images: Sequence[torch.Tensor]) -> None:
    """Reject minibatches of another dataset than the task's, whose chains would be missing or wrong.

    Raises:
        ValueError: the minibatches are not from the task's dataset.
    """
    ids = [ids_of(x) for x in images]
    known = [part for part in ids if part is not None]
    if known and not task.labels:
        raise ValueError(f"The algorithm {_NOT_FOUND}")
    if task.chains and len(known) < len(ids):
        raise ValueError(
            f"The images do not say which of {task.dataset}'s they are (they have no sample ids), so their chains "
            "cannot be found: they are from another dataset or were changed after loading. Pass the loader's tensors."
        )
    envs = {env for part in known for env in part[:, 0].tolist()}
    if targets := sorted(envs & set(task.test_envs)):
        raise ValueError(
            f"A minibatch contains images of domain {targets[0]}, a target of the task that this algorithm found: it "
            f"was built for another dataset. {_SAME_HPARAMS}"
        )


def warn_outside_job(name: str, task: Task, hparams: Mapping[str, Any], schedule: Schedule) -> None:
    """Print what an algorithm of this name does outside of a job, where nothing tells its steps and its folder."""
    _log.info(
        f"{name}: found no arguments of a running train script in this process, as in a notebook. Default schedule of "
        f"{schedule.n_steps} steps, whatever --steps says; no records, no resume."
    )
    sizes = [len(labels) for env, labels in enumerate(task.labels) if env not in task.test_envs]
    smallest = min((size - int(size * DEFAULT_HOLDOUT) for size in sizes), default=None)
    if smallest is not None and hparams["batch_size"] > smallest and not hparams.get("class_balanced"):
        _log.warning(
            f"{task.dataset}: batch_size {hparams['batch_size']} is larger than a source domain's training split, of "
            f"{smallest} images at a holdout of {DEFAULT_HOLDOUT}: DomainBed's loader would wait forever for a batch."
        )


def _made_for_a_dataset(hparams: Mapping[str, Any]) -> bool:
    """Return whether all hyper-parameters of a dataset of ours are here, as DomainBed's registry gives them for it."""
    tables = [registry.load(target).HPARAMS.keys() for target in registry.DATASETS.values()]
    return any(table and table <= hparams.keys() for table in tables)
