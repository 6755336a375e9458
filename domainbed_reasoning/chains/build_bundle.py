"""``python -m domainbed_reasoning.chains.build_bundle CHAINS.jsonl NAME.jsonl.xz``: build a bundle.

Lines are sorted by image and reduced to the keys in `KEPT`, without costs and request times. The output is
deterministic and does not depend on the name of the input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

from domainbed_reasoning.chains.bundled import ENDING, digest_path
from domainbed_reasoning.chains.store import read_records
from domainbed_reasoning.files.atomic import replacing

KEPT = (
    "image",
    "verdict",
    "rule",
    "reason",
    "teacher",
    "model",
    "prompt_version",
    "label_conditioned",
    "verified",
    "sha256",
    "chain",
)
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}]


def pack(source: Path) -> bytes:
    """Return the bytes of a bundle with the chains of a chain file.

    Raises:
        ChainFileError: for an invalid line.
    """
    records = sorted((record for _, record in read_records(source)), key=lambda record: str(record["image"]))
    kept = [{key: record[key] for key in KEPT if key in record} for record in records]
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in kept]
    return lzma.compress("".join(lines).encode(), lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=_FILTERS)


def write_bundle(source: Path, target: Path) -> str:
    """Write a bundle and its digest, and return the digest.

    Args:
        source: a chain file.
        target: path of the bundle; ends in ``.jsonl.xz``.

    Raises:
        ChainFileError: for an invalid line of the chain file; nothing is written.
        ValueError: for a different suffix.
        OSError: if the bundle cannot be written.
    """
    if not target.name.endswith(ENDING):
        raise ValueError(f"The name of a bundle must end in {ENDING}; got {target.name!r}.")
    packed = pack(source)
    sha256 = hashlib.sha256(packed).hexdigest()
    for path, data in ((target, packed), (digest_path(target), f"{sha256}  {target.name}\n".encode())):
        with replacing(path) as file:
            file.write(data)
    return sha256


def main(argv: Sequence[str] | None = None) -> int:
    """Build a bundle."""
    parser = argparse.ArgumentParser(description="Make a bundle from a chain file.")
    parser.add_argument("source", type=Path, help="a chain file")
    parser.add_argument("target", type=Path, help=f"path of the bundle, ending in {ENDING}")
    args = parser.parse_args(argv)
    print(f"{write_bundle(args.source, args.target)}  {args.target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
