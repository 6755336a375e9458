"""Train one algorithm on one dataset, and write its records and its model."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from domainbed import algorithms, announce, datasets, hparams_registry
from domainbed.lib import misc
from domainbed.lib.fast_data_loader import FastDataLoader, InfiniteDataLoader
from PIL import __version__ as pil_version

EVALUATION_BATCH = 64


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Train one algorithm (stand-in for DomainBed)")
    texts = {"data_dir": None, "dataset": "RotatedMNIST", "algorithm": "ERM", "output_dir": "train_output"}
    for flag, default in texts.items():
        parser.add_argument(f"--{flag}", default=default)
    tasks = ["domain_generalization", "domain_adaptation"]
    parser.add_argument("--task", choices=tasks, default=tasks[0])
    parser.add_argument("--hparams", help="JSON object that overrides single hyper-parameters")
    parser.add_argument("--hparams_seed", type=int, default=0, help="0 for the defaults, others draw at random")
    numbers = {"trial_seed": 0, "seed": 0, "steps": None, "checkpoint_freq": None}
    for flag, default in numbers.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--test_envs", type=int, nargs="+", default=[0])
    for flag, default in {"holdout_fraction": 0.2, "uda_holdout_fraction": 0}.items():
        parser.add_argument(f"--{flag}", type=float, default=default)
    for flag in ("skip_model_save", "save_model_every_checkpoint"):
        parser.add_argument(f"--{flag}", action="store_true")
    return parser


def print_head(args: argparse.Namespace, hparams: dict[str, Any]) -> None:
    """Print versions, arguments and hyper-parameters."""
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__, "NumPy": np.__version__}
    versions |= {"Torchvision": torchvision.__version__, "CUDA": torch.version.cuda, "PIL": pil_version}
    versions["CUDNN"] = torch.backends.cudnn.version()
    blocks = {
        "Environment": versions,
        "Args": dict(sorted(vars(args).items())),
        "HParams": dict(sorted(hparams.items())),
    }
    for title, values in blocks.items():
        print(f"{title}:", *(f"\t{name}: {value}" for name, value in values.items()), sep="\n")


def choose_hparams(args: argparse.Namespace) -> dict[str, Any]:
    """Return the hyper-parameters that the arguments ask for."""
    if args.hparams_seed == 0:
        hparams = hparams_registry.default_hparams(args.algorithm, args.dataset)
    else:
        seed = misc.seed_hash(args.hparams_seed, args.trial_seed)
        hparams = hparams_registry.random_hparams(args.algorithm, args.dataset, seed)
    return hparams | (json.loads(args.hparams) if args.hparams else {})


def split_environments(args: argparse.Namespace, dataset: Any) -> dict[str, list[tuple[int, Any]]]:
    """Return {"in", "out", "uda": [(environment, data), …]}; only test environments have unlabelled data."""
    splits: dict[str, list[tuple[int, Any]]] = {"in": [], "out": [], "uda": []}
    for number, environment in enumerate(dataset):
        seed = misc.seed_hash(args.trial_seed, number)
        held_out, rest = misc.split_dataset(environment, int(len(environment) * args.holdout_fraction), seed)
        if number in args.test_envs:
            unlabeled, rest = misc.split_dataset(rest, int(len(rest) * args.uda_holdout_fraction), seed)
            if len(unlabeled):
                splits["uda"].append((number, unlabeled))
        splits["in"].append((number, rest))
        splits["out"].append((number, held_out))
    if args.task == "domain_adaptation" and not splits["uda"]:
        raise ValueError("Domain adaptation needs unlabelled samples: raise --uda_holdout_fraction.")
    return splits


def training_batches(parts: list[Any], hparams: dict[str, Any], workers: int) -> Iterator[tuple]:
    """Yield one labelled minibatch an environment, without end."""
    weigh = misc.make_weights_for_balanced_classes if hparams["class_balanced"] else lambda part: None
    size = hparams["batch_size"]
    loaders = [InfiniteDataLoader(part, weights=weigh(part), batch_size=size, num_workers=workers) for part in parts]
    return zip(*loaders, strict=True)


def save_model(name: str, args: argparse.Namespace, dataset: Any, hparams: dict[str, Any], algorithm: Any) -> None:
    """Write arguments, hyper-parameters and weights to ``name`` in the output folder."""
    if args.skip_model_save:
        return
    content = {"args": vars(args), "model_hparams": hparams, "model_dict": algorithm.state_dict()}
    content |= {"model_input_shape": dataset.input_shape, "model_num_classes": dataset.num_classes}
    content["model_num_domains"] = len(dataset) - len(args.test_envs)
    torch.save(content, os.path.join(args.output_dir, name))


def run(args: argparse.Namespace, hparams: dict[str, Any]) -> None:
    """Train, evaluate and write."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.dataset not in vars(datasets):
        raise NotImplementedError(f"Dataset not found: {args.dataset}")
    dataset = vars(datasets)[args.dataset](args.data_dir, args.test_envs, hparams)
    splits = split_environments(args, dataset)
    sources = [part for number, part in splits["in"] if number not in args.test_envs]
    batches = training_batches(sources, hparams, dataset.N_WORKERS)
    unlabeled = None
    if args.task == "domain_adaptation":
        unlabeled = training_batches([part for _, part in splits["uda"]], hparams, dataset.N_WORKERS)
    weigh = misc.make_weights_for_balanced_classes if hparams["class_balanced"] else lambda part: None
    judges = [
        (f"env{number}_{split}_acc", FastDataLoader(part, EVALUATION_BATCH, dataset.N_WORKERS), weigh(part))
        for split, parts in splits.items()
        for number, part in parts
    ]
    kind = algorithms.get_algorithm_class(args.algorithm)
    algorithm = kind(dataset.input_shape, dataset.num_classes, len(dataset) - len(args.test_envs), hparams).to(device)
    epoch_length = min(len(part) / hparams["batch_size"] for _, part in splits["in"])
    n_steps = args.steps or dataset.N_STEPS
    frequency = args.checkpoint_freq or dataset.CHECKPOINT_FREQ
    since: dict[str, list[float]] = defaultdict(list)
    shown: list[str] = []
    for step in range(n_steps):
        started = time.time()
        minibatches = [(x.to(device), y.to(device)) for x, y in next(batches)]
        extra = None if unlabeled is None else [x.to(device) for x, _ in next(unlabeled)]
        values = algorithm.update(minibatches, extra)
        since["step_time"].append(time.time() - started)
        for name, value in values.items():
            since[name].append(value)
        if step % frequency and step != n_steps - 1:
            continue
        record: dict[str, Any] = {"step": step, "epoch": step / epoch_length}
        record |= {name: np.mean(column) for name, column in since.items()}
        record |= {name: misc.accuracy(algorithm, loader, weights, device) for name, loader, weights in judges}
        record["mem_gb"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        columns = sorted(record)
        if columns != shown:
            misc.print_row(columns, colwidth=12)
            shown = columns
        misc.print_row([record[name] for name in columns], colwidth=12)
        record |= {"hparams": hparams, "args": vars(args)}
        with open(os.path.join(args.output_dir, "results.jsonl"), "a") as file:
            file.write(f"{json.dumps(record, sort_keys=True)}\n")
        since.clear()
        if args.save_model_every_checkpoint:
            save_model(f"model_step{step}.pkl", args, dataset, hparams, algorithm)
    save_model("model.pkl", args, dataset, hparams, algorithm)
    pathlib.Path(args.output_dir, "done").write_text("done")


if __name__ == "__main__":
    announce("train")
    args = make_parser().parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    sys.stdout = misc.Tee(os.path.join(args.output_dir, "out.txt"))
    sys.stderr = misc.Tee(os.path.join(args.output_dir, "err.txt"))
    hparams = choose_hparams(args)
    print_head(args, hparams)
    run(args, hparams)
