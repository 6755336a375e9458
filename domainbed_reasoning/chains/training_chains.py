"""The chains used for training on a dataset: from a chain file, a bundle, both, or none.

=================  ===================================================================================
hparam ``chains``  chains
=================  ===================================================================================
null               ``reasoning.jsonl`` in the dataset's folder, then the bundle for images without one
a path             this chain file only
``bundled``        the bundle only
``none``           none
=================  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_reasoning.chains.bundled import BUNDLED, read_bundle
from domainbed_reasoning.chains.matching import match_images
from domainbed_reasoning.chains.rules import Rules
from domainbed_reasoning.chains.store import load_chains, select_chains

NONE = "none"


@dataclass(frozen=True)
class TrainingChains:
    """The chains of a dataset's images, target domains included.

    Attributes:
        texts: by image, its path on disk below the dataset's folder.
        path: of the chain file or, without one, of the bundle.
        summary: log message with their number and source; "" if all are from a chain file.
        warnings: irregularities of the bundle's images, one sentence each.
        bundle: name and SHA-256 of the bundle; "" without one.
    """

    texts: dict[str, str]
    path: Path
    summary: str = ""
    warnings: tuple[str, ...] = ()
    bundle: str = ""


def load_training_chains(
    choice: str | None,
    default: Path,
    bundle: str | None,
    images: Sequence[str],
    unverified: Rules | None = None,
    by_folder: bool = True,
) -> TrainingChains:
    """Return the chains of a dataset's images.

    Args:
        choice: value of the hparam ``chains``.
        default: the chain file in the dataset's folder, which may be missing.
        bundle: the dataset's bundle, see `bundled`; None without one.
        images: paths on disk, below the dataset's folder.
        unverified: rules without a label, see `store.select_chains`; None for verified chains only.
        by_folder: whether paths name the classes, see `match_images`.

    Raises:
        ChainFileError: for a chain file or bundle that cannot be used.
        ValueError: if the bundle is requested but the dataset has none.
    """
    if choice == NONE:
        return TrainingChains({}, default, "no teacher chains (hparam chains is 'none').")
    if choice == BUNDLED and bundle is None:
        raise ValueError("hparam chains is 'bundled', but this dataset has no bundle. Set it to a chain file.")
    file = default if choice in (None, BUNDLED) else Path(str(choice)).expanduser()
    own: dict[str, str] = {}
    if choice != BUNDLED and (choice is not None or bundle is None or file.exists()):
        own = load_chains(file, images, unverified=unverified)
    if bundle is None or choice not in (None, BUNDLED):
        return TrainingChains(own, file)
    packed = read_bundle(bundle)
    matches = match_images(packed.lines, images, default.parent, by_folder)
    bundled = select_chains(packed.path, matches.lines(packed.lines), None, unverified)
    texts = bundled | own
    from_bundle = f"{len(texts) - len(own):,} from the bundle {packed}"
    if by_digest := sum(image in matches.by_digest and image not in own for image in bundled):
        from_bundle += f", {by_digest:,} of them matched by SHA-256"
    parts = [from_bundle]
    if own:
        replaced = len(own.keys() & bundled.keys())
        instead = f" ({replaced:,} in place of the bundle's)" if replaced else ""
        parts.insert(0, f"{len(own):,} from {file}{instead}")
    share = len(texts) / len(images) if images else 0.0
    summary = f"{len(texts):,} of {len(images):,} images have a chain ({share:.1%}): {', '.join(parts)}."
    named = f"{packed.path.name} {packed.sha256}"
    has_file = choice is None and file.exists()
    return TrainingChains(texts, file if has_file else packed.path, summary, tuple(matches.notes()), named)
