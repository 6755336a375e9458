"""Bundles: chains that come with a dataset class, compressed, with their digest.

A bundle is a chain file (see `store`) compressed with LZMA, ``NAME.jsonl.xz``. Its digest, in the format of
``sha256sum``, is in ``NAME.jsonl.xz.sha256`` and verified at every read. A dataset class names its bundle in the
attribute ``BUNDLE``: the name of one in this package (``"PACS"``) or the path of a ``.jsonl.xz`` file. `build_bundle`
creates a bundle from a chain file.
"""

from __future__ import annotations

import hashlib
import io
import lzma
from dataclasses import dataclass
from pathlib import Path

from domainbed_reasoning.chains.record import ChainFileError, Record
from domainbed_reasoning.chains.store import parse_lines
from domainbed_reasoning.files.plain import read_plain, read_plain_text

# Accepted in place of a chain file by the hparam `chains` and by --chains.
BUNDLED = "bundled"

ENDING = ".jsonl.xz"
FOLDER = Path(__file__).parent / "bundles"

# 100,000 chains with their provenance take about 100 MB, a sixth of that when compressed.
_MAX_BYTES = 256 << 20
_MAX_MEMORY = 512 << 20


@dataclass(frozen=True)
class Bundle:
    """The contents of a bundle.

    Attributes:
        path: of the compressed file.
        sha256: of the compressed file, in hexadecimal.
        lines: (line number from 1, record), in order.
    """

    path: Path
    sha256: str
    lines: tuple[tuple[int, Record], ...]

    def __str__(self) -> str:
        """Return name and digest, shortened, for messages."""
        return f"{self.path.name} (SHA-256 {self.sha256[:12]})"


def bundle_path(name: str) -> Path:
    """Return the path of a bundle, specified by its path or, for bundles of this package, by its name."""
    return Path(name).expanduser() if name.endswith(ENDING) else FOLDER / f"{name}{ENDING}"


def digest_path(path: Path) -> Path:
    """Return the path of the file with a bundle's digest."""
    return path.with_name(f"{path.name}.sha256")


def read_bundle(name: str) -> Bundle:
    """Return a bundle after verifying its digest and all of its records.

    Args:
        name: name of a bundle in this package, or the path of a ``.jsonl.xz`` file.

    Raises:
        ChainFileError: if the bundle or its digest cannot be read, they do not match, or a line is invalid.
    """
    path = bundle_path(name)
    fix = "Reinstall the package, or rebuild the bundle with `python -m domainbed_reasoning.chains.build_bundle`"
    try:
        packed = read_plain(path, _MAX_BYTES)
        expected = read_plain_text(digest_path(path)).split()
    except (OSError, UnicodeDecodeError) as error:
        raise ChainFileError(path, None, f"the bundle or its .sha256 file cannot be read ({error})", fix) from error
    sha256 = hashlib.sha256(packed).hexdigest()
    if expected[:1] != [sha256]:
        stated = expected[0][:12] if expected else "nothing"
        problem = f"its SHA-256 is {sha256[:12]}…, but {digest_path(path).name} says {stated}…"
        raise ChainFileError(path, None, problem, fix)
    lines = []
    for line, record in parse_lines(io.BytesIO(_unpacked(path, packed)), path):
        if isinstance(record, ChainFileError):
            raise record
        lines.append((line, record))
    return Bundle(path, sha256, tuple(lines))


def _unpacked(path: Path, packed: bytes) -> bytes:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_MEMORY)
    try:
        text = unpacker.decompress(packed, _MAX_BYTES + 1)
    except lzma.LZMAError as error:
        raise ChainFileError(path, None, f"cannot be decompressed ({error})", "Rebuild the bundle") from error
    if not unpacker.eof or unpacker.unused_data:
        problem = f"truncated, larger than {_MAX_BYTES:,} bytes, or followed by other data"
        raise ChainFileError(path, None, problem, "Rebuild the bundle")
    return text
