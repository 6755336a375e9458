"""The accepted chains of an image-folder dataset, from Python."""

from __future__ import annotations

import os
from pathlib import Path

from domainbed_reasoning.chains.store import load_chains
from domainbed_reasoning.images.catalog import CHAIN_FILE, scan
from domainbed_reasoning.images.user_datasets import find


def chains_of(
    dataset: str, data_dir: str | os.PathLike[str], chains: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Return the accepted chains of a dataset by image, its path below the dataset's folder.

    Training reads the same chains, without those of target domains. `Rules` judges one.

    Args:
        dataset: its name, with or without ``Reasoning``, as for ``domainbed-reasoning check``.
        data_dir: DomainBed's folder of datasets.
        chains: a chain file; None takes ``reasoning.jsonl`` in the dataset's folder.

    Raises:
        FileNotFoundError: the dataset's folder does not exist.
        ValueError: for an unknown dataset, or a chain file that is missing or damaged (`ChainFileError`).

    Example:
        >>> chains_of("PACS", "data")["art_painting/dog/pic_001.jpg"]   # doctest: +SKIP
        '<SUMMARY>...'
    """
    on_disk = scan(find(dataset), str(data_dir))
    file = Path(chains).expanduser() if chains is not None else on_disk.root / CHAIN_FILE
    return load_chains(file, [picture.path for picture in on_disk.pictures])
