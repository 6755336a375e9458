"""Check a job before training: target domains, sizes of splits, and hyper-parameters.

Stock DomainBed trains on all domains for a target that does not exist, and waits for ever for a batch that is larger
than a split. Where the algorithm or the dataset is one of ours, such a job is refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.bridge.train_args import recognized_arguments
from domainbed_reasoning.hparam_checks import check_values
from domainbed_reasoning.images import user_datasets as custom


def check_test_envs(dataset: str, environments: Sequence[str], test_envs: Collection[Any]) -> None:
    """Reject target domains that do not exist, are repeated, or leave no source domain.

    Args:
        dataset: its name.
        environments: names of its domains.
        test_envs: numbers of the target domains; empty makes all of them sources.

    Raises:
        ValueError: naming the target and the domains there are.
    """
    try:
        targets = list(test_envs)
    except TypeError:
        targets = [test_envs]
    option = f"--test_envs {' '.join(map(str, targets))}"
    known = range(len(environments))
    for env in targets:
        if isinstance(env, bool) or not hasattr(env, "__index__") or env not in known:
            domains = ", ".join(f"{number} ({name})" for number, name in enumerate(environments))
            raise ValueError(f"{option}: {dataset} has no domain {env!r:.40}. Its domains are {domains}.")
        if targets.count(env) > 1:
            raise ValueError(f"{option} names domain {env} of {dataset} twice. Name each target domain once.")
    if len(targets) == len(environments):
        raise ValueError(
            f"{option} leaves {dataset} no source domain to train on. Name at most {len(known) - 1} targets."
        )


def check_splits(
    dataset: str,
    domains: Sequence[tuple[str, int]],
    test_envs: Collection[int],
    hparams: Mapping[str, Any],
    workers: int,
) -> None:
    """Reject a job that would wait forever for a batch or evaluate an empty split.

    DomainBed draws batches of ``batch_size`` from each source domain's training split and, where there is one, each
    target domain's uda split. Without ``class_balanced`` a split smaller than that never gives one. Outside of a job
    nothing is known of splits, and nothing is checked.

    Args:
        dataset: its name.
        domains: name and number of images of each.
        test_envs: the target domains.
        hparams: of the job.
        workers: loader processes a split; with any, uda batches are drawn even where no algorithm sees them.

    Raises:
        ValueError: naming domain, split, its size, and what to change.
    """
    args = recognized_arguments()
    if args is None:
        return
    holdout, uda_share = args.holdout_fraction, getattr(args, "uda_holdout_fraction", 0)
    for flag, share in (("--holdout_fraction", holdout), ("--uda_holdout_fraction", uda_share)):
        if not 0 <= share < 1:
            raise ValueError(f"{flag} must be in [0, 1); got {share}.")
    adapts = getattr(args, "task", None) == "domain_adaptation"
    drawn = []
    for env, (name, size) in enumerate(domains):
        of_out = int(size * holdout)
        of_uda = int((size - of_out) * uda_share) if env in test_envs else 0
        of_in = size - of_out - of_uda
        for split, count in (("in", of_in), ("out", of_out)):
            if count == 0:
                raise ValueError(
                    f"{dataset}: the {split} split of domain {env} ({name}) is empty, and DomainBed evaluates on it: "
                    f"the domain has {size} images, and --holdout_fraction is {holdout}. Change the fraction, or add "
                    "images."
                )
        if env not in test_envs:
            drawn.append((of_in, "training", env, name))
        elif of_uda and (adapts or workers):
            drawn.append((of_uda, "uda", env, name))
        elif adapts:
            raise ValueError(
                f"{dataset}: the uda split of target domain {env} ({name}) is empty at --uda_holdout_fraction "
                f"{uda_share}, and --task domain_adaptation draws batches from it. Raise the fraction."
            )
    size, split, env, name = min(drawn)
    if hparams["batch_size"] > size and not hparams.get("class_balanced"):
        raise ValueError(
            f"{dataset}: the {split} split of domain {env} ({name}) has {size} images, fewer than batch_size "
            f"{hparams['batch_size']}, and DomainBed would wait forever for a full batch. The largest batch_size that "
            f"works is {size}: --hparams '{{\"batch_size\": {size}}}'."
        )


def check_stock_dataset(name: str) -> None:
    """Reject a stock dataset with a reasoning counterpart for an algorithm of this package.

    Raises:
        ValueError: naming the twin.
    """
    twin = next((ours for ours, stock in registry.TWINS.items() if stock == name and ours in registry.DATASETS), None)
    if twin is not None and not name.startswith("Debug"):
        raise ValueError(f"{name} provides neither class names nor image paths: use --dataset {twin}.")


def check_job(algorithm: str, dataset: str, ranges: Mapping[str, tuple[Any, Any]]) -> None:
    """Check the job of this process when its hyper-parameters are requested, before its dataset is built.

    Args:
        algorithm: whose hyper-parameters are asked for; another's than the job's is not checked.
        dataset: its.
        ranges: default and drawn value of the algorithm's hyper-parameters.

    Raises:
        ValueError: for target domains, hyper-parameters or splits that cannot be used.
    """
    args = recognized_arguments()
    ours = algorithm in registry.ALGORITHMS
    if args is None or (args.algorithm, args.dataset) != (algorithm, dataset) or not (ours or is_ours(dataset)):
        return
    from domainbed import datasets

    hparams = parse_hparams(args)
    _check_hparams(algorithm, hparams, ranges)
    cls: Any = vars(datasets).get(dataset)
    if getattr(cls, "ENVIRONMENTS", None):
        check_test_envs(dataset, cls.ENVIRONMENTS, args.test_envs)
    if ours:
        check_stock_dataset(dataset)
    if isinstance(cls, type) and issubclass(cls, datasets.Debug):  # its splits are not checked elsewhere
        import torch

        drawn = bool(getattr(args, "hparams_seed", 0))
        chosen = {name: pair[drawn] for name, pair in ranges.items()} | hparams
        with torch.random.fork_rng(devices=[]):
            made = cls(None, args.test_envs, chosen)
        domains = list(zip(made.ENVIRONMENTS, map(len, made), strict=True))
        check_splits(dataset, domains, args.test_envs, chosen, made.N_WORKERS)


def is_ours(dataset: str) -> bool:
    """Return whether a dataset is one of this package or described by the user."""
    return dataset in registry.DATASETS or dataset in custom.targets(custom.custom_datasets())


def parse_hparams(args: argparse.Namespace) -> dict[str, Any]:
    """Return ``--hparams``; {} if a fork passes them in another form than DomainBed's JSON.

    Raises:
        ValueError: it is JSON that is broken, or no object.
    """
    hparams = getattr(args, "hparams", None)
    if not isinstance(hparams, str) or not hparams:
        return {}
    try:
        value = json.loads(hparams)
    except (ValueError, RecursionError) as error:
        if hparams.lstrip().startswith("{"):
            raise ValueError(f"--hparams is not valid JSON ({error}): write '{{\"batch_size\": 8}}'.") from error
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"--hparams must be a JSON object such as '{{\"batch_size\": 8}}'; got {hparams:.80}.")
    return value


def _check_hparams(algorithm: str, hparams: Mapping[str, Any], ranges: Mapping[str, Any]) -> None:
    from domainbed.algorithms import get_algorithm_class

    from domainbed_reasoning.bridge.hparam_names import check_names

    other = hparams.get("algorithm", algorithm)
    bases = [base.__name__ for base in get_algorithm_class(algorithm).__mro__]
    if other not in bases:
        raise ValueError(f"hparam algorithm must be {algorithm!r}, which --algorithm chooses; got {other!r:.80}.")
    check_names(hparams, algorithm)
    if algorithm in registry.ALGORITHMS:
        rows = registry.rows_of(algorithm)
    else:  # its own hyper-parameters are not checked, unless a dataset or DomainBed's code reads them
        rows = {name: row for name, row in registry.rows_of().items() if name not in ranges}
        rows |= registry.OF_ANY_DATASET
    check_values(hparams, rows)
