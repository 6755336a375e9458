"""What an MLLM algorithm makes of a stock dataset, which knows neither class names nor chains nor stages."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_reasoning.bridge.preflight import check_stock_dataset
from domainbed_reasoning.bridge.train_args import job_arguments
from domainbed_reasoning.method.schedule import Schedule, plan_stages
from domainbed_reasoning.method.task import Task


def task_without_names(num_classes: int) -> Task:
    """Return the task of a stock dataset, which knows no class names and no chains.

    Raises:
        ValueError: for a stock dataset that has a reasoning twin.
    """
    args = job_arguments()
    name = args.dataset if args else "Debug28"
    check_stock_dataset(name)
    return Task(name, tuple(f"class {index}" for index in range(num_classes)))


def schedule_of_stock_dataset(epochs: Sequence[int]) -> Schedule:
    """Share the steps that DomainBed takes on a stock dataset among the stages."""
    from domainbed import datasets

    args = job_arguments()
    dataset = vars(datasets)[args.dataset] if args else datasets.MultipleDomainDataset
    return plan_stages(epochs, 1, (args.steps if args else None) or dataset.N_STEPS)
