"""Dataset and algorithm as the train script builds them, with one hparams dictionary for both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from domainbed import algorithms, datasets, hparams_registry

from domainbed_reasoning.jobs.answers import write_task


def build_dataset(
    algorithm: str,
    dataset_name: str = "ShapesReasoning",
    test_envs: Sequence[int] = (3,),
    data_dir: object = None,
    **changes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Return the dataset and its hparams: the registry's defaults with ``changes``."""
    hparams = hparams_registry.default_hparams(algorithm, dataset_name) | changes
    return vars(datasets)[dataset_name](data_dir and str(data_dir), list(test_envs), hparams), hparams


def build(algorithm: str, *arguments: Any, test_envs: Sequence[int] = (3,), **changes: Any) -> tuple[Any, Any]:
    """Return dataset and algorithm, seeded; other arguments as of `build_dataset`."""
    torch.manual_seed(0)
    dataset, hparams = build_dataset(algorithm, *arguments, test_envs=test_envs, **changes)
    return dataset, build_algorithm(algorithm, dataset, hparams, test_envs)


def build_algorithm(name: str, dataset: Any, hparams: dict[str, Any], test_envs: Sequence[int] = (3,)) -> Any:
    """Return the algorithm on the dataset's source domains."""
    sources = len(dataset) - len(test_envs)
    return algorithms.get_algorithm_class(name)(dataset.input_shape, dataset.num_classes, sources, hparams)


def minibatches(dataset: Any, test_envs: Sequence[int] = (3,), size: int = 4, start: int = 0) -> list[Any]:
    """Return ``size`` images of each source domain from ``start`` on."""
    collate = torch.utils.data.default_collate
    envs = [env for env in range(len(dataset)) if env not in test_envs]
    return [tuple(collate([dataset[env][start + i] for i in range(size)])) for env in envs]


def write_trained_job(algorithm: Any, folder: Path, test_envs: Sequence[int] = (2,)) -> Path:
    """Leave what DomainBed's train script leaves: checkpoint, records and our task.json."""
    folder.mkdir(parents=True)
    name = type(algorithm).__name__
    args = argparse.Namespace(
        algorithm=name, dataset="PACSReasoning", test_envs=list(test_envs), output_dir=str(folder)
    )
    write_task(algorithm.task, algorithm.hparams, args)
    checkpoint = {
        "args": vars(args),
        "model_input_shape": (3, 40, 40),
        "model_num_classes": 4,
        "model_num_domains": 2,
        "model_hparams": algorithm.hparams,
        "model_dict": algorithm.state_dict(),
    }
    torch.save(checkpoint, folder / "model.pkl")
    record = {"step": 51, **{f"env{env}_{part}_acc": 0.5 + 0.1 * env for env in range(3) for part in ("in", "out")}}
    (folder / "results.jsonl").write_text(json.dumps(record) + "\n" + '{"step": 5')  # killed while it wrote
    return folder
