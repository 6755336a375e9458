"""Divide DomainBed's steps and evaluations among the stages of an algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from domainbed_reasoning.bridge import stock
from domainbed_reasoning.bridge.preflight import check_stock_dataset
from domainbed_reasoning.bridge.train_args import DEFAULT_HOLDOUT, job_arguments
from domainbed_reasoning.method.schedule import Epoch, Schedule, plan_stages
from domainbed_reasoning.method.task import Task
from domainbed_reasoning.terminal import get_logger

_log = get_logger(__name__)


def lay_out_steps(task: Task, epochs: Sequence[int], hparams: Mapping[str, Any]) -> Schedule:
    """Return the stages of training on a task; DomainBed takes their steps and evaluates at their ends.

    In a job, what an epoch is and how often each domain is passed over are printed (`Epoch`). DomainBed reads its
    dataset's N_STEPS and CHECKPOINT_FREQ after it has built the algorithm. A stock dataset's own steps are shared.

    Args:
        task: with its dataset, where that is ours.
        epochs: of each stage.
        hparams: of the job.
    """
    if task.schedule is not None:
        return task.schedule
    args = job_arguments()
    steps = args.steps if args else None
    if not task.labels:
        stock_dataset = vars(stock.datasets())[args.dataset] if args else stock.datasets().MultipleDomainDataset
        return plan_stages(epochs, 1, steps or stock_dataset.N_STEPS)
    epoch = epoch_of(task, hparams["batch_size"])
    schedule = plan_stages(epochs, epoch.steps, steps, every_epoch=bool(hparams.get("average_adapters")))
    if args is not None and any(epochs):
        for line in (*epoch.about(), *epoch.exposure(schedule.stages)):
            _log.info(f"{args.algorithm}: {line}")
    dataset = task.loaded_from()
    if dataset is not None:
        dataset.N_STEPS, dataset.CHECKPOINT_FREQ = schedule.n_steps, schedule.checkpoint_freq
    return schedule


def epoch_of(task: Task, batch_size: int) -> Epoch:
    """Return an epoch on the training splits of a task's source domains.

    Args:
        task: with labels.
        batch_size: per source domain.
    """
    args = job_arguments()
    holdout = args.holdout_fraction if args else DEFAULT_HOLDOUT
    sizes = {env: len(labels) for env, labels in enumerate(task.labels) if env not in task.test_envs}
    names = dict(enumerate(task.environments))
    return Epoch({names.get(env, str(env)): size - int(size * holdout) for env, size in sizes.items()}, batch_size)


def task_without_names(num_classes: int) -> Task:
    """Return the task of a stock dataset, without class names and chains.

    Raises:
        ValueError: for a stock dataset that has a reasoning twin.
    """
    args = job_arguments()
    name = args.dataset if args else "Debug28"
    check_stock_dataset(name)
    return Task(name, tuple(f"class {index}" for index in range(num_classes)))
