"""Small files that expand, and things that are not files: rejected by name, in bounded memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from builders.files import HPARAMS, TASK, torch_bytes, write_job
from builders.processes import run_python
from domainbed_reasoning.analysis.checkpoints import records_of
from domainbed_reasoning.chains.formats import ExchangeError, import_records
from domainbed_reasoning.chains.parquet import ParquetError, read_parquet
from domainbed_reasoning.chains.store import ChainFileError, ChainWriter, load_chains, read_lines
from domainbed_reasoning.files.plain import open_plain, plain_lines, read_plain
from domainbed_reasoning.images.decode import ImageFileError, check_header, image_size, read_rgb
from domainbed_reasoning.images.user_datasets import DatasetFileError, read_dataset
from domainbed_reasoning.jobs.trained import JobError, read_job
from domainbed_reasoning.results.job_folders import read_job as read_sweep_job

CHECKOUT = Path(__file__).resolve().parents[2]
NAME = "base_model.model.model.layers.0.lora_A.default.weight"


# Nobody writes to the pipe: whoever opens it as a file waits for ever.
KINDS = ("a named pipe", "a socket", "a folder", "a device")


@pytest.fixture(params=KINDS)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Something that is no regular file, and what it is called."""
    path = tmp_path / "odd"
    listening = None
    if request.param == "a named pipe":
        os.mkfifo(path)
    elif request.param == "a folder":
        path.mkdir()
    elif request.param == "a device":
        path.symlink_to("/dev/zero")
    else:
        listening = socket.socket(socket.AF_UNIX)
        before = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket may have 107 bytes only
        try:
            listening.bind("odd")
        finally:
            os.chdir(before)
    yield path, request.param
    if listening is not None:
        listening.close()


def job_of(path: Path) -> Any:
    folder = path.parent / "job"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(TASK))
    (folder / "model.pkl").symlink_to(path)
    return read_job(folder)


def task_of(path: Path) -> Any:
    folder = path.parent / "job"
    folder.mkdir()
    (folder / "task.json").symlink_to(path)
    return read_job(folder)


READERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "a plain file": (lambda path: read_plain(path, 100), OSError),
    "lines": (lambda path: list(plain_lines(path, 100)), OSError),
    "chains": (load_chains, ChainFileError),
    "lines of chains": (lambda path: list(read_lines(path)), ChainFileError),
    "an import": (lambda path: list(import_records(path)), ExchangeError),
    "Parquet": (lambda path: list(read_parquet(path)), ParquetError),
    "an image": (read_rgb, ImageFileError),
    "an image's size": (image_size, ImageFileError),
    "an image's header": (check_header, ImageFileError),
    "a dataset's description": (read_dataset, DatasetFileError),
    "a checkpoint": (job_of, JobError),
    "a task": (task_of, JobError),
}


@pytest.mark.parametrize("reader", READERS)
def test_irregular_files_are_rejected_immediately(odd: tuple[Path, str], reader: str) -> None:
    path, kind = odd
    read, error = READERS[reader]
    with pytest.raises(error, match=f"(?s){kind}"):
        read(path)


def test_chains_are_not_added_to_a_pipe_or_a_device(odd: tuple[Path, str]) -> None:
    with pytest.raises((ChainFileError, OSError)):
        ChainWriter(odd[0])


@pytest.mark.parametrize("reader", READERS)
def test_a_sparse_file_of_a_terabyte_is_refused(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "odd"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    read, error = READERS[reader]
    with pytest.raises(error):
        read(path)


def test_jobs_with_irregular_record_files_are_reported_and_the_others_counted(odd: tuple[Path, str]) -> None:
    folder = odd[0].parent / "job"
    folder.mkdir()
    for name in ("results.jsonl", "out.txt", "err.txt", "answers.json", "task.json", "versions.json"):
        (folder / name).symlink_to(odd[0])
    job = read_sweep_job(folder)
    assert job.records == () and job.answers is None and job.task is None and job.last_error == ""
    assert "results.jsonl is not a regular file in this folder" in job.damage[0]
    assert records_of(folder) == []


def test_records_and_logs_of_a_terabyte_are_not_read_whole(tmp_path: Path) -> None:
    for name in ("results.jsonl", "out.txt", "err.txt", "answers.json", "task.json", "versions.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
    job = read_sweep_job(tmp_path)
    assert job.records == () and job.answers is None
    assert "results.jsonl is larger than" in job.damage[0]


def test_file_without_a_size_is_read_up_to_the_limit() -> None:
    """`/proc` has regular files of size 0 with more content."""
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_plain("/proc/self/status", 10)
    with open_plain("/proc/self/status", 10) as file:
        assert len(file.read(20)) == 20


def test_endless_line_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 1000 + b"\nlast\n")
    assert list(plain_lines(tmp_path / "log", 10)) == ["x" * 10, "last\n"]


# ---- checkpoints ----


def task(rank: int) -> dict[str, Any]:
    return TASK | {"hparams": HPARAMS | {"lora_rank": rank}}


def test_checkpoint_with_two_central_directories_is_rejected(tmp_path: Path) -> None:
    """One says that the parts are stored, the other, found by parsers that trust its offset, that they are packed."""
    sound = torch_bytes({"model_dict": {NAME: torch.ones(2, 3)}})
    packed_path = tmp_path / "packed"
    old = zipfile.ZipFile(io.BytesIO(sound))
    with zipfile.ZipFile(packed_path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in old.namelist():
            archive.writestr(name, bytes(4 << 20) if name.endswith("/data/0") else old.read(name))
    packed = packed_path.read_bytes()
    # The packed archive stands first, its directory where the end of the whole file points to; the sound one follows.
    end = bytearray(sound[-22:])
    start, length = struct.unpack("<L", packed[-22 + 16 : -22 + 20])[0], struct.unpack("<L", packed[-10:-6])[0]
    assert end[:4] == b"PK\5\6" and length > 0
    end[16:20] = struct.pack("<L", start)
    with pytest.raises(JobError, match="cannot be read"):
        read_job(write_job(tmp_path / "job", TASK, packed + sound[:-22] + bytes(end)))


def test_overlapping_archive_members_are_rejected(tmp_path: Path) -> None:
    """A hundred names for one megabyte."""
    whole = torch_bytes({"model_dict": {f"{NAME}{n}": torch.zeros(2, 1 << 17) for n in range(3)}})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {part.filename: part.header_offset for part in archive.infolist()}
    first, second = (offset for name, offset in sorted(parts.items()) if name.endswith(("/data/0", "/data/1")))
    data = bytearray(whole)
    directory = whole.rindex(b"PK\1\2", 0, whole.rindex(b"/data/1"))
    assert struct.unpack_from("<L", data, directory + 42)[0] == second
    struct.pack_into("<L", data, directory + 42, first)
    with pytest.raises(JobError, match="cannot be read"):
        read_job(write_job(tmp_path / "job", TASK, bytes(data)))


class Calls:
    """Pickled, a call of what `torch.load` allows, with arguments that ask for terabytes."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "value",
    [Calls(torch.FloatTensor, 1 << 40), Calls(torch.FloatStorage, 1 << 40), Calls(bytearray, 1 << 40)],
    ids=["a tensor", "a storage", "bytes"],
)
def test_a_checkpoint_that_asks_for_a_terabyte_is_refused_before_it_is_made(tmp_path: Path, value: Any) -> None:
    with pytest.raises(JobError, match="cannot be read"):
        read_job(write_job(tmp_path / "job", TASK, {"model_dict": {NAME: value}}))


def test_keys_that_take_forever_to_hash_are_rejected(tmp_path: Path) -> None:
    """A pair of a pair of a pair …: 2**60 values for whoever hashes it."""
    program = pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.NONE
    program += (pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2) * 60 + pickle.NONE + pickle.SETITEM
    path = tmp_path / "whole"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program + pickle.STOP)
    with pytest.raises(JobError, match="a dictionary key is neither a string nor a number"):
        read_job(write_job(tmp_path / "job", TASK, path.read_bytes()))


def test_rank_not_matching_the_file_builds_no_adapters(tmp_path: Path) -> None:
    """The file holds one adapter of that rank; of the model's 100 each would have as much."""
    folder = write_job(tmp_path / "job", task(1 << 16), {"model_dict": {NAME: torch.zeros(1 << 16, 1)}})
    job = read_job(folder)
    made: list[int] = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            made.extend([result.numel()] if isinstance(result, torch.Tensor) else [])
            return result

    with Watched(), pytest.raises(ValueError, match="do not match this model: only one of them has "):
        job.load()
    assert made and max(made) < 1 << 20


# ---- Parquet ----


def _parquet(path: Path, kind: str) -> Path:
    import pyarrow
    import pyarrow.parquet

    if kind == "one long text for every row":
        text = pyarrow.array(["x" * (1 << 20)])
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4000, pyarrow.int32()), text)
    elif kind == "a text of a gigabyte":
        column = pyarrow.array(["x" * (1 << 29)])
    elif kind == "rows of nothing":
        column = pyarrow.nulls(1_000_000, pyarrow.string())
    else:
        column = pyarrow.ListArray.from_arrays([0, 40_000_000], pyarrow.nulls(40_000_000))
    pyarrow.parquet.write_table(pyarrow.table({"chain": column}), path, compression="zstd")
    return path


PARQUET = ("one long text for every row", "a text of a gigabyte", "rows of nothing", "a list of nothing")
_READ = """
import resource, sys
from pathlib import Path
from domainbed_reasoning.chains.parquet import ParquetError, read_parquet
import pyarrow.parquet
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for row in read_parquet(Path(sys.argv[1])):
        pass
except ParquetError as error:
    print(error)
own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print((own - base) >> 10, child >> 10)
"""


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet_bomb_is_rejected(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("pyarrow")
    path = _parquet(tmp_path / "rows.parquet", kind)
    assert path.stat().st_size < 100_000
    done = run_python("-c", _READ, path)
    *printed, numbers = done.stdout.splitlines()
    own, child = map(int, numbers.split())
    assert "expands to far more data than its size suggests" in "".join(printed), done.stdout + done.stderr
    assert own < 256 and child < 2560  # MiB


def test_a_reader_that_stops_early_leaves_no_process(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"chain": ["x"] * 100_000}), path)
    rows = read_parquet(path)
    assert next(rows) == {"chain": "x"}
    rows.close()  # type: ignore[attr-defined]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# ---- images ----


def test_oversized_image_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageFileError, match="larger than"):
        read_rgb(path)
