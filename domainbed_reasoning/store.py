"""Chains on disk: one JSON object a line, appended, never rewritten.

A line holds at least ``image`` (path below the dataset's folder, with ``/``) and ``chain`` (text). ``verdict`` says
``accepted`` (so does its absence) or ``rejected``, ``rule`` and ``reason`` say why; further keys are provenance.
Training reads the accepted chains alone, annotation goes on from all of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from domainbed_reasoning.chains import ChainError, parse_chain

ACCEPTED = "accepted"
REJECTED = "rejected"

# A chain has some hundred tokens; a line this long is another kind of file.
MAX_LINE_BYTES = 1 << 20

Record = dict[str, Any]


class ChainFileError(ValueError):
    """A chain file that cannot be used as it is; the message names file, line, fault and cure."""

    def __init__(self, path: str | os.PathLike[str], line: int | None, fault: str, cure: str):
        place = f"{os.fspath(path)}, line {line}" if line else os.fspath(path)
        super().__init__(f"{place}: {fault}. {cure}")
        self.path = os.fspath(path)
        self.line = line


def load_chains(
    path: str | os.PathLike[str], known_images: Collection[str] | None = None, *, repair: bool = False
) -> dict[str, str]:
    """Return the accepted chains by image path.

    Args:
        path: a chain file.
        known_images: the paths that exist, below the dataset's folder; None leaves this unchecked.
        repair: leave out a torn last line, as a killed writer may leave it, instead of raising.

    Raises:
        ChainFileError: for a file that is missing, or a line that is torn, not JSON, over-long, lacks a key, has a
            value of the wrong type, text that no file can hold, a path out of the folder or of an unknown image, an
            accepted chain that has not its five stages, or a second accepted chain of an image.
    """
    known = None if known_images is None else frozenset(known_images)
    chains: dict[str, str] = {}
    for line, record in read_records(path, repair=repair):
        image = record["image"]
        if known is not None and image not in known:
            cure = "Give this dataset's own chain file, or mend the path"
            raise ChainFileError(path, line, f"no image {image!r} is in the dataset", cure)
        if record.get("verdict", ACCEPTED) != ACCEPTED:
            continue
        if image in chains:
            raise ChainFileError(
                path,
                line,
                f"a second accepted chain of {image!r}",
                'Keep one: mark the other with "verdict": "rejected", or delete its line',
            )
        try:
            parse_chain(record["chain"])
        except ChainError as error:
            raise ChainFileError(
                path, line, f"the chain of {image!r} is not five stages: {error}", "Mend it, or mark it as rejected"
            ) from error
        chains[image] = record["chain"]
    return chains


def read_records(path: str | os.PathLike[str], *, repair: bool = False) -> Iterator[tuple[int, Record]]:
    """Yield (line number from 1, record) for every line that is not blank, accepted or not, checked by `check_record`.

    Raises:
        ChainFileError: see `load_chains`; a chain's stages are not looked at.
    """
    for number, record in read_lines(path, repair=repair):
        if isinstance(record, ChainFileError):
            raise record
        yield number, record


def read_lines(path: str | os.PathLike[str], *, repair: bool = False) -> Iterator[tuple[int, Record | ChainFileError]]:
    """Yield (line number from 1, record or what is wrong with the line) for every line that is not blank.

    Args:
        path: a chain file.
        repair: leave out a torn last line.

    Raises:
        ChainFileError: the file cannot be read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the generator's own with-block follows
    except OSError as error:
        cure = "Make it with `domainbed-reasoning annotate` or `import`"
        raise ChainFileError(path, None, f"cannot be read ({error.strerror})", cure) from error
    cure = "Mend or delete this line; `domainbed-reasoning check` lists every such line"
    with file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                fault = f"longer than {MAX_LINE_BYTES} bytes"
                yield number, ChainFileError(path, number, fault, "Give a file with one JSON object a line")
                continue
            if raw.isspace():
                continue
            try:
                record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                if raw.endswith(b"\n"):
                    yield number, ChainFileError(path, number, f"not JSON ({error})", cure)
                elif not repair:
                    go_on = "Run `domainbed-reasoning annotate` again, which cuts it off and goes on, or delete it"
                    yield number, ChainFileError(path, number, "torn: its writer was stopped half-way", go_on)
                continue
            fault_or_none = check_record(record, escaped=b"\\u" in raw)
            yield number, ChainFileError(path, number, fault_or_none, cure) if fault_or_none else record


def check_record(record: Any, escaped: bool = True) -> str | None:
    r"""Return what is wrong with a line's value, None if nothing is.

    Args:
        record: what the line says.
        escaped: whether it may hold NULs or lone surrogates, which only a ``\u`` escape can bring into JSON.
    """
    if not isinstance(record, dict):
        return f"a JSON object is wanted, not {type(record).__name__}"
    for key in ("image", "chain"):
        if key not in record:
            return f"the key {key!r} is missing"
        if not isinstance(record[key], str):
            return f"{key!r} must be a string, not {type(record[key]).__name__}"
    verdict = record.get("verdict", ACCEPTED)
    if verdict not in (ACCEPTED, REJECTED):
        return f"'verdict' must be {ACCEPTED!r} or {REJECTED!r}, not {verdict!r}"
    if escaped and not _is_storable(record):
        return "it holds a NUL or half of a surrogate pair, which is no text"
    return check_image_path(record["image"])


def check_image_path(image: str) -> str | None:
    """Return why ``image`` is no path below a dataset's folder, None if it is one."""
    parts = image.split("/")
    if image.startswith("/") or "\\" in image or parts[0].endswith(":"):
        return f"the image path {image!r} must be below the dataset's folder and use '/'"
    if "" in parts or "." in parts or ".." in parts:
        return f"the image path {image!r} must not climb or have empty steps"
    return None


def _is_storable(value: Any) -> bool:
    """Return whether every text in a JSON value is free of NULs and lone surrogates."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return all(_is_storable(key) and _is_storable(item) for key, item in value.items())
    return all(map(_is_storable, value)) if isinstance(value, list) else True


class ChainWriter:
    """Appends records to a chain file, alone and crash-safe.

    What is promised: when `append` returns, the record survives the death of this process, `kill -9` too (it is handed
    to the operating system whole, in one write); when `sync` returns, it survives a power cut (fsync), and `append`
    syncs by itself every ``sync_records`` records or ``sync_seconds`` seconds. At opening, a line that a power cut tore
    is cut off (`cut_bytes`). A full disk leaves no half line. A second writer is refused while this one is open.

    Args:
        path: the chain file; made if missing, its folder too.
        sync_records: records between two fsyncs at most.
        sync_seconds: seconds between two fsyncs at most, while records keep coming.

    Attributes:
        cut_bytes: length of the torn last line that opening cut off, 0 if there was none.

    Raises:
        ChainFileError: if another process writes to the file.
        OSError: if the file cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync_records: int = 256, sync_seconds: float = 2.0):
        self.path = os.fspath(path)
        self._sync_records = sync_records
        self._sync_seconds = sync_seconds
        folder = os.path.dirname(os.path.abspath(self.path))
        os.makedirs(folder, exist_ok=True)
        is_new = not os.path.exists(self.path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(self._file, self.path)
            self.cut_bytes = _cut_torn_line(self._file)
            if is_new:
                _sync_folder(folder)
        except BaseException:
            os.close(self._file)
            raise
        self._end = os.fstat(self._file).st_size
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            ValueError: if the record is none (see `check_record`) or too long for a line.
            OSError: if it could not be written; the file is as before.
        """
        fault = check_record(record)
        if fault:
            raise ValueError(f"This record cannot be stored: {fault}.")
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"The record of {record['image']!r} is longer than {MAX_LINE_BYTES} bytes.")
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self._unsynced += 1
        if self._unsynced >= self._sync_records or time.monotonic() - self._synced_at >= self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Return when everything appended is on the disk."""
        if self._unsynced:
            os.fsync(self._file)
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync, give up the lock and close the file."""
        if self._file >= 0:
            try:
                self.sync()
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> ChainWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_records(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> int:
    """Write a whole chain file, at once or not at all, and return the number of records.

    Raises:
        ValueError: for a value that is no record; an existing file stays as it was.
        OSError: if it cannot be written.
    """
    target = os.fspath(path)
    partial = f"{target}.{os.getpid()}.part"
    count = 0
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
    _sync_folder(os.path.dirname(os.path.abspath(target)))
    return count


def _cut_torn_line(file: int) -> int:
    """Cut off a torn last line, end a whole one that lacks its newline, and return the number of bytes cut."""
    size = os.fstat(file).st_size
    tail = b""
    start = size
    while start and b"\n" not in tail:
        step = min(1 << 16, start)
        start -= step
        tail = os.pread(file, step, start) + tail
    _, _, last = tail.rpartition(b"\n")
    if not last:
        return 0
    try:
        whole = isinstance(json.loads(last), dict)
    except ValueError:
        whole = False
    if whole:
        os.write(file, b"\n")
        return 0
    os.ftruncate(file, size - len(last))
    os.fsync(file)
    return len(last)


def _lock(file: int, path: str) -> None:
    """Take the file for this process until it is closed or the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows: no such lock; two writers are the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _lock_holder(os.fstat(file).st_ino)
        cure = "Wait until it ends, or give another file with --output"
        raise ChainFileError(path, None, f"another process{holder} is writing to it", cure) from error


def _lock_holder(inode: int) -> str:
    """Return `` (process 123)`` for the holder of the inode's lock where Linux tells, else nothing."""
    try:
        with open("/proc/locks") as locks:
            for line in locks:
                fields = line.split()
                if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
                    return f" (process {fields[4]})"
    except (OSError, IndexError):
        pass
    return ""


def _sync_folder(folder: str) -> None:
    """Put the folder's list of names on the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
