"""The teacher chains of an image-folder dataset, for algorithms that train on them."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from domainbed_reasoning import registry
from domainbed_reasoning.chains.bundled import BUNDLED
from domainbed_reasoning.chains.rules import Rules
from domainbed_reasoning.chains.store import ChainFileError
from domainbed_reasoning.chains.training_chains import NONE, load_training_chains
from domainbed_reasoning.datasets.base import source_chains
from domainbed_reasoning.images.catalog import CHAIN_FILE
from domainbed_reasoning.method.task import SampleId
from domainbed_reasoning.terminal import get_logger, printable

NEEDS_NO_DATA = "The dataset ShapesReasoning requires no data and includes chains."

_log = get_logger(__name__)


def teacher_chains(
    dataset: str,
    bundle: str | None,
    folder: pathlib.Path,
    images: Sequence[Sequence[str]],
    class_names: tuple[str, ...],
    test_envs: Sequence[int],
    hparams: Mapping[str, Any],
    by_folder: bool = True,
) -> tuple[dict[SampleId, str], str]:
    """Return the chains of source domains, and name and SHA-256 of the bundle used; "" without one.

    Logs the source of the chains if a bundle was used, and irregularities of its images.

    Args:
        dataset: name of the dataset class.
        bundle: the dataset's bundle; None without one.
        folder: the dataset's folder.
        images: per environment, the path of every index, below ``folder``.
        class_names: class names in the prompts, in label order.
        test_envs: the target domains.
        hparams: the algorithm's hyper-parameters.
        by_folder: whether paths name the classes, see `match_images`.

    Raises:
        ChainFileError: if the chain file or bundle is missing, invalid, or has no chain of a source domain.
        ValueError: if ``chains`` is 'bundled' without a bundle, or 'none' for an algorithm that requires chains.
    """
    if hparams.get("mtct_epochs") == 0:
        return {}, ""  # no stage trains on teacher chains
    choice, algorithm = hparams["chains"], hparams["algorithm"]
    fix = (
        "Create chains with `domainbed-reasoning annotate` or `import`, or set the hparam 'chains' to another file. "
        f"LabelSFT and MLLMZeroShot need no chains. {NEEDS_NO_DATA}"
    )
    if choice == NONE and (algorithm in registry.CHAINS_ALONE or hparams.get("label_weight") == 0):
        raise ValueError(f"hparam chains is 'none', but {algorithm} trains on chains only. {fix}")
    default = folder / CHAIN_FILE
    path = default if choice in (None, BUNDLED, NONE) else pathlib.Path(choice).expanduser()
    missing = f"file not found, but {algorithm} trains on chains"
    is_needed = bundle is None if choice is None else choice not in (BUNDLED, NONE)
    if is_needed and not path.exists():
        raise ChainFileError(path, None, missing, fix)
    rules = Rules(class_names, min_words=0, max_words=sys.maxsize, verified=False)
    unverified = rules if hparams["chain_verification"] == "unverified" else None
    every = [name for names in images for name in names]
    loaded = load_training_chains(choice, default, bundle, every, unverified, by_folder)
    if loaded.summary:
        _log.info(printable(f"{dataset}: {loaded.summary}", sys.stdout))
    for warning in loaded.warnings:
        _log.warning(printable(f"WARNING: {warning}", sys.stdout))
    if choice is None and not loaded.texts and not path.exists():
        missing += f", and the bundle {loaded.path.name} has none of these images, by path or by SHA-256"
        raise ChainFileError(path, None, missing, fix)
    chains = source_chains(loaded.texts, images, test_envs)
    if not chains and choice != NONE:
        problem = f"it has no accepted chain of a source domain, but {algorithm} trains on such chains"
        raise ChainFileError(loaded.path, None, problem, fix)
    return chains, loaded.bundle
