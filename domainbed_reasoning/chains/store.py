"""Chain files: JSON Lines, append-only.

Each line has at least ``image`` (path below the dataset's folder, with ``/``) and ``chain`` (text). ``verdict`` is
``accepted`` (the default) or ``rejected``, with ``rule`` and ``reason``; further keys are provenance. Training reads
accepted chains only; annotation skips candidates that are already in the file. Writers add ``format_version``; lines
without it are as valid.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from domainbed_reasoning.chains.chain import ChainError, parse_chain
from domainbed_reasoning.chains.image_names import ImageLookup
from domainbed_reasoning.chains.locked import cut_torn_line, lock, open_locked
from domainbed_reasoning.chains.record import (
    ACCEPTED,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    REJECTED,
    VERSION,
    ChainFileError,
    Record,
    check_record,
    is_accepted,
    parse_json,
    take_version,
)
from domainbed_reasoning.chains.rules import Rules
from domainbed_reasoning.files import format_version
from domainbed_reasoning.files.atomic import name_beside, remove_stale, sync_folder
from domainbed_reasoning.files.locks import is_in_place
from domainbed_reasoning.files.open_files import save_copy
from domainbed_reasoning.files.plain import open_plain

__all__ = [
    "ACCEPTED",
    "MAX_LINE_BYTES",
    "REJECTED",
    "ChainFileError",
    "ChainWriter",
    "Record",
    "check_record",
    "is_accepted",
    "load_chains",
    "read_lines",
    "read_records",
    "write_records",
]

# A partial last line is read again this many times, this many seconds apart.
_RETRIES = 5
_RETRY_SECONDS = 0.02
# Bytes of an overlong line skipped to find the next one; sparse files may have terabytes.
_MAX_SKIPPED = 1 << 30


def load_chains(
    path: str | os.PathLike[str],
    known_images: Collection[str] | None = None,
    *,
    repair: bool = False,
    unverified: Rules | None = None,
) -> dict[str, str]:
    """Return the accepted chains by image path.

    Args:
        path: a chain file.
        known_images: paths on disk, below the dataset's folder, which become the keys; None skips this check.
        repair: ignore a partial last line, left by a killed writer, instead of raising.
        unverified: see `select_chains`.

    Raises:
        ChainFileError: the file is missing, or a line is incomplete, not JSON, too long, has missing or duplicate keys,
            a value of the wrong type, text that cannot be encoded, a path out of the folder or of an unknown image, an
            accepted chain without the five stages, or a second accepted chain of an image.
    """
    return select_chains(path, read_records(path, repair=repair), known_images, unverified)


def select_chains(
    path: str | os.PathLike[str],
    records: Iterable[tuple[int, Record]],
    known_images: Collection[str] | None = None,
    unverified: Rules | None = None,
) -> dict[str, str]:
    """Return the chains that training reads, by image path.

    Args:
        path: of the file that the records are from.
        records: its lines, numbered from 1.
        known_images: see `load_chains`.
        unverified: rules without a label. With them, a candidate that was rejected for concluding another class counts
            as accepted if it satisfies them; of several candidates the first counts, as if no label had been known.

    Raises:
        ChainFileError: see `load_chains`.
    """
    known = None if known_images is None else ImageLookup(known_images)
    chains: dict[str, str] = {}
    accepted: set[str] = set()
    for line, record in records:
        image = record["image"] if known is None else known.find(record["image"])
        if image is None:
            fix = (
                "Pass this dataset's chain file or correct the path; `domainbed-reasoning export NEW.jsonl --format "
                "jsonl --all --chains FILE` keeps the lines of its images alone"
            )
            raise ChainFileError(path, line, f"image {record['image']!r} is not in the dataset", fix)
        if not is_accepted(record):
            if unverified is not None and record.get("rule") == "label" and image not in chains:
                verdict = unverified.judge(record["chain"])
                if verdict.accepted:
                    chains[image] = verdict.chain or record["chain"]
            continue
        if image in accepted:
            raise ChainFileError(
                path,
                line,
                f"a second accepted chain of {image!r}",
                'Keep one: set "verdict": "rejected" in the other, or delete its line',
            )
        try:
            parse_chain(record["chain"])
        except ChainError as error:
            raise ChainFileError(
                path,
                line,
                f"the chain of {image!r} does not have the five stages: {error}",
                "Run `domainbed-reasoning annotate --rejudge` to normalize or reject it",
            ) from error
        accepted.add(image)
        chains.setdefault(image, record["chain"])
    return chains


def read_records(path: str | os.PathLike[str], *, repair: bool = False) -> Iterator[tuple[int, Record]]:
    """Yield (line number from 1, record) for every line that is not blank, accepted or not, checked by `check_record`.

    Raises:
        ChainFileError: see `load_chains`; stages are not checked.
    """
    for number, record in read_lines(path, repair=repair):
        if isinstance(record, ChainFileError):
            raise record
        yield number, record


def read_lines(path: str | os.PathLike[str], *, repair: bool = False) -> Iterator[tuple[int, Record | ChainFileError]]:
    """Yield (line number from 1, record or error) for every non-blank line.

    Args:
        path: a chain file.
        repair: ignore a partial last line.

    Raises:
        ChainFileError: if the file cannot be read.
    """
    try:
        file = open_plain(path)
    except OSError as error:
        fix = "Create it with `domainbed-reasoning annotate` or `import`"
        raise ChainFileError(path, None, f"cannot be read ({error.strerror})", fix) from error
    with file:
        yield from parse_lines(file, path, repair=repair)


def parse_lines(
    file: BinaryIO, path: str | os.PathLike[str], *, repair: bool = False
) -> Iterator[tuple[int, Record | ChainFileError]]:
    """Yield what `read_lines` yields, of an open file; ``path`` is for the messages.

    Raises:
        ChainFileError: if a line is too long to find its end.
    """
    fix = "Correct or delete this line; `domainbed-reasoning check` lists all such lines"
    number = place = retries = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            problem = f"longer than {MAX_LINE_BYTES:,} bytes"
            while raw and not raw.endswith(b"\n") and file.tell() - place <= _MAX_SKIPPED:
                raw = file.readline(MAX_LINE_BYTES)
            if raw and not raw.endswith(b"\n"):
                raise ChainFileError(path, number, problem, "Pass a file with one JSON object per line")
            yield number, ChainFileError(path, number, problem, "Pass a file with one JSON object per line")
            place = file.tell()
            continue
        if raw.isspace():
            place += len(raw)
            continue
        try:
            record = parse_json(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            if raw.endswith(b"\n"):
                yield number, ChainFileError(path, number, f"not valid JSON ({error})", fix)
            elif retries < _RETRIES:  # another process may still be writing it
                time.sleep(_RETRY_SECONDS)
                retries, number = retries + 1, number - 1
                file.seek(place)
                continue
            elif not repair:
                resume = "Rerun `domainbed-reasoning annotate`, which removes it and resumes, or delete the line"
                yield number, ChainFileError(path, number, "incomplete: its writer was interrupted", resume)
            place += len(raw)
            continue
        place += len(raw)
        walk = b"\\u" in raw or raw.count(b"[") + raw.count(b"{") > MAX_DEPTH
        invalid = check_record(record, walk)
        if not invalid and (newer := take_version(record)):
            yield number, ChainFileError(path, number, newer, format_version.UPGRADE)
            continue
        yield number, ChainFileError(path, number, invalid, fix) if invalid else record


class ChainWriter:
    """Appends records to a chain file, exclusively and crash-safe.

    When `append` returns, the record survives the end of this process, including `kill -9` (it is passed to the
    operating system in one write); when `sync` returns, it survives a power failure (fsync). `append` syncs every
    ``sync_records`` records or ``sync_seconds`` seconds. Opening removes a partial last line (`cut_bytes`). A full disk
    leaves no partial line. Only one writer can open a file at a time. If another program deletes or replaces the file,
    the records are saved to a new file next to it, and an error is raised.

    Args:
        path: the chain file; created with its folder if missing.
        leave_empty: keep a file that this writer created but appended nothing to.
        sync_records: records between two fsyncs at most.
        sync_seconds: seconds between two fsyncs at most, while records keep coming.

    Attributes:
        path: the file that records go to.
        cut_bytes: bytes of the partial last line that was removed on opening; 0 without one.

    Raises:
        ChainFileError: if another process has the file open for writing, or it is not a chain file.
        OSError: if the file cannot be created or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        leave_empty: bool = True,
        sync_records: int = 256,
        sync_seconds: float = 2.0,
    ):
        self.path = os.fspath(path)
        self._sync_records = sync_records
        self._sync_seconds = sync_seconds
        folder = os.path.dirname(os.path.abspath(self.path))
        os.makedirs(folder, exist_ok=True)
        is_new = not os.path.exists(self.path)
        self._is_temporary = is_new and not leave_empty
        self._file = open_locked(self.path)
        try:
            self.cut_bytes = cut_torn_line(self._file, self.path)
            if is_new:
                sync_folder(Path(folder))
        except BaseException:
            os.close(self._file)
            raise
        self._end = os.fstat(self._file).st_size
        self._unsynced = 0
        self._has_appended = False
        self._synced_at = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            ValueError: if the record is invalid (see `check_record`) or too long for a line.
            ChainFileError: if the file was deleted, replaced or cut short by another program; the record is kept, in
                the file that the message names.
            OSError: if it cannot be written; the file is unchanged.
        """
        if problem := check_record(record):
            raise ValueError(f"Cannot store the record: {problem}.")
        row = {**record, format_version.KEY: VERSION}
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise ValueError(f"The record of {record['image']!r} cannot be stored as JSON: {error}.") from error
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"The record of {record['image']!r} is longer than {MAX_LINE_BYTES:,} bytes.")
        size = os.fstat(self._file).st_size
        was_cut, self._end = size < self._end, size
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise OSError(error.errno, error.strerror, self.path) from error
        self._end += len(line)
        self._unsynced += 1
        self._has_appended = True
        self._check_place()
        if was_cut:
            fix = "Records appended before that are lost; rerun to resume with the remaining ones"
            raise ChainFileError(self.path, None, "another program truncated it while it was being written", fix)
        if self._unsynced >= self._sync_records or time.monotonic() - self._synced_at >= self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Block until all appended records are on disk.

        Raises:
            ChainFileError: see `append`.
            OSError: if writing to disk fails.
        """
        if self._has_appended:
            self._check_place()
        if self._unsynced:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from error
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync, release the lock and close the file."""
        if self._file >= 0:
            try:
                self.sync()
                if self._is_temporary and not self._end and is_in_place(self._file, self.path):
                    os.unlink(self.path)
            finally:
                os.close(self._file)
                self._file = -1

    def _check_place(self) -> None:
        """Continue in a new file, with all records, if the path no longer refers to the open file."""
        if is_in_place(self._file, self.path):
            return
        done = "replaced" if os.path.lexists(self.path) else "deleted"
        problem, at = f"another program {done} it while it was being written", self.path
        try:
            copy, place = save_copy(self._file, at)
        except OSError as error:
            fix = f"Its records are lost, as they cannot be saved elsewhere ({error})"
            raise ChainFileError(at, None, problem, fix) from error
        lock(copy, place)
        os.close(self._file)
        self._file, self.path, self._unsynced = copy, place, 0
        fix = (
            f"All records are saved in {place}. Move that file back and rerun, or add its chains to another file with "
            "`domainbed-reasoning import`"
        )
        raise ChainFileError(at, None, problem, fix)

    def __enter__(self) -> ChainWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_records(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> int:
    """Write a whole chain file atomically and return the number of records.

    Raises:
        ValueError: for an invalid record; an existing file is left unchanged.
        ChainFileError: if another process is writing to the existing file.
        OSError: if it cannot be written.
    """
    target = os.fspath(path)
    remove_stale(Path(target))
    partial = os.fspath(name_beside(Path(target)))
    count = 0
    existing = open_locked(target) if os.path.isfile(target) else None
    try:
        with ChainWriter(partial, sync_records=1 << 62, sync_seconds=float("inf")) as writer:
            for record in records:
                writer.append(record)
                count += 1
        os.replace(partial, target)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise
    finally:
        if existing is not None:
            os.close(existing)
    sync_folder(Path(target).absolute().parent)
    return count
