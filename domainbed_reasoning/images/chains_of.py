"""The accepted chains of an image-folder dataset, from Python."""

from __future__ import annotations

import os

from domainbed_reasoning.chains.training_chains import load_training_chains
from domainbed_reasoning.images.catalog import CHAIN_FILE, scan
from domainbed_reasoning.images.user_datasets import find


def chains_of(
    dataset: str, data_dir: str | os.PathLike[str], chains: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Return the accepted chains of a dataset by image, its path below the dataset's folder.

    Training reads the same chains, without those of target domains and without those that conclude another class than
    the image's. `Rules` judges one.

    Args:
        dataset: its name, with or without ``Reasoning``, as for ``domainbed-reasoning check``.
        data_dir: DomainBed's folder of datasets.
        chains: as the hparam: None takes ``reasoning.jsonl`` in the dataset's folder and the dataset's bundle;
            ``bundled`` the bundle alone; otherwise a chain file.

    Raises:
        FileNotFoundError: the dataset's folder does not exist.
        ValueError: for an unknown dataset, or a chain file that is missing or damaged (`ChainFileError`).

    Example:
        >>> chains_of("PACS", "data")["art_painting/dog/pic_001.jpg"]   # doctest: +SKIP
        '<SUMMARY>...'
    """
    found = find(dataset)
    on_disk = scan(found, str(data_dir))
    choice = None if chains is None else os.fspath(chains)
    images = [picture.path for picture in on_disk.pictures]
    own = on_disk.root / CHAIN_FILE
    return load_training_chains(choice, own, found.bundle, images, by_folder=found.table is None).texts
