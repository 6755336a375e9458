"""Loads tensors and plain values that `torch.save` wrote from an untrusted file, in memory bounded by the file's size.

`torch.load` with ``weights_only`` runs no code, but it trusts sizes. Here one parser reads the archive, whose members
must be uncompressed and must not overlap, and no tensor may be larger than its member.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from domainbed_reasoning.files.plain import open_plain

# Adapters of rank 256 in float32 for a model of 8 billion weights are 2.6 GB.
MAX_BYTES = 4 << 30
_MAX_PICKLE_BYTES = 64 << 20

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def load_tensors(path: Path) -> Any:
    """Return the value that `torch.save` wrote to ``path``, its tensors on the CPU.

    Raises:
        OSError: it is not a regular file, or larger than `MAX_BYTES`.
        ValueError: it is not such an archive, damaged, compressed, or contains more than tensors and plain values.
    """
    with open_plain(path, MAX_BYTES) as file:
        size = file.seek(0, io.SEEK_END)
        try:
            with zipfile.ZipFile(file) as archive:
                return _load(archive, size)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # encrypted: RuntimeError
            raise ValueError(f"not an archive of torch.save: {error}") from error


def _load(archive: zipfile.ZipFile, size: int) -> Any:
    parts = {part.filename: part for part in archive.infolist()}
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts.values()):
        raise ValueError("it is compressed, unlike archives of torch.save")
    if len(parts) < len(archive.infolist()):
        raise ValueError("two of its members have the same name")
    if archive.comment or min((part.header_offset for part in parts.values()), default=0):
        raise ValueError("it contains more than one archive")
    if sum(part.file_size for part in parts.values()) > size:
        raise ValueError("its members are larger than the file")
    pickled = [name for name in parts if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickled) != 1:
        raise ValueError(f"not an archive of torch.save: expected one data.pkl, found {len(pickled)}")
    folder = pickled[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in parts and archive.read(order) != b"little":
        raise ValueError("it was saved on a big-endian machine")
    if parts[pickled[0]].file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"its data.pkl is larger than {_MAX_PICKLE_BYTES:,} bytes")
    storages: dict[str, torch.Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        if key not in storages:
            part = parts.get(f"{folder}data/{key}")
            if part is None or part.file_size != count * dtype.itemsize:
                raise ValueError(f"the storage {key:.40} of a tensor is missing or has the wrong size")
            values = bytearray(archive.read(part))
            storages[key] = torch.frombuffer(values, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        if storages[key].dtype != dtype:
            raise ValueError(f"the storage {key:.40} of a tensor has two types")
        return storages[key]

    try:
        return _Unpickler(io.BytesIO(archive.read(pickled[0])), storage).load()
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError, pickle.UnpicklingError) as error:
        raise ValueError(f"its values cannot be read ({type(error).__name__}: {str(error):.200})") from error


class _Unpickler(pickle._Unpickler):
    """The part of pickle that `torch.save` needs for tensors in dictionaries; anything else is an error."""

    def __init__(self, file: BinaryIO, storage: Callable[[str, torch.dtype, int], torch.Tensor]):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in known:
            raise ValueError(f"it contains more than tensors and plain values: {module:.80}.{name:.80}")
        return known[module, name]

    def persistent_load(self, saved: Any) -> torch.Tensor:
        kind, dtype, key, _, count = saved
        whole = isinstance(count, int) and isinstance(key, str) and isinstance(dtype, torch.dtype)
        if kind != "storage" or not whole:
            raise ValueError("it contains more than tensors and plain values")
        return self._storage(key, dtype, count)

    # Of pickle._Unpickler, which typeshed leaves out.
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    # What torch.save writes; other opcodes create objects, call other functions, or allocate memory for missing data.
    _ALLOWED = (
        "PROTO EMPTY_DICT EMPTY_LIST EMPTY_TUPLE MARK GLOBAL BINPERSID BINUNICODE BININT BININT1 BININT2 "
        "LONG1 BINFLOAT NONE NEWTRUE NEWFALSE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT BINGET LONG_BINGET REDUCE "
        "SETITEM SETITEMS APPEND APPENDS BUILD STOP"
    )
    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _ALLOWED.split())
    }

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if function not in (OrderedDict, torch.Size, _tensor) and getattr(function, "__module__", "") != __name__:
            raise ValueError("it contains more than tensors and plain values")
        if function is OrderedDict and arguments:
            raise ValueError("it contains more than tensors and plain values")
        self.stack[-1] = function(*arguments)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set(self, items: list[Any]) -> None:
        """Add to a dictionary; nested tuples as keys could take forever to hash."""
        if not all(isinstance(key, str | int | float | bool | None) for key in items[::2]):
            raise ValueError("a dictionary key is neither a string nor a number")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_build(self) -> None:
        """Drop the attributes of an OrderedDict: a state_dict's versions."""
        self.stack.pop()

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.SETITEMS[0]: load_setitems,
        pickle.SETITEM[0]: load_setitem,
        pickle.BUILD[0]: load_build,
    }


def _tensor(
    storage: torch.Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    """Return a view of a storage from ``offset`` on as a tensor, which must have no gaps and no repeated elements."""
    count = math.prod(shape)
    if min((offset, *shape)) < 0 or len(shape) != len(stride) or offset + count > len(storage):
        raise ValueError(f"a tensor of shape {tuple(shape)!s:.80} is larger than its storage")
    step = 1
    for have, length in sorted(zip(stride, shape, strict=True)) if count else ():
        if length > 1 and have != step:
            raise ValueError(f"a tensor of shape {tuple(shape)!s:.80} has gaps or repeated elements")
        step *= length
    return storage[offset : offset + count].as_strided(tuple(shape), tuple(stride))
