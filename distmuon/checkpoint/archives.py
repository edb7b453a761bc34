"""Inspection of `torch.save` archives before they are trusted: where their bytes lie, and how much memory they need.

This module decides which archives are opened at all. `torch.save` writes a zip file without compression, so an archive
with a compressed member, or a member with more bytes than the file has, has another origin and is refused. The module
knows no checkpoint; its callers name the file in the error.
"""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from typing import IO, Any

MAX_NESTING = 100  # depth of containers in small state
MAX_ITEMS = 1 << 26  # items of small state, counted at each reference
# Bytes of zip's records.
_ENTRY = 30
_END = 22
_END_64 = 56
_LOCATOR = 20


class Slice(io.RawIOBase):
    """`length` bytes of an open file from `start` on, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"byte {base + offset} of an archive")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._file
        data.seek(self._start + self._at)
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        count: int = data.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return count


def stored_members(file: Any, size: int) -> dict[str, tuple[int, int]]:
    """{name: (first byte, bytes)} of the zip archive `file` of `size` bytes. Raises `ValueError` for a bad archive.

    The end record is checked too: two readers that found different end records would see different members.
    """
    _check_end(file, size)
    members: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename!r:.80} is compressed, {info.compress_size} to {info.file_size} bytes")
        if info.filename in members:
            raise ValueError(f"it holds {info.filename!r:.80} twice")
        file.seek(info.header_offset)
        head = file.read(_ENTRY)
        if len(head) < _ENTRY or head[:4] != b"PK\3\4":
            raise ValueError(f"{info.filename!r:.80} has no header")
        first = info.header_offset + _ENTRY + int.from_bytes(head[26:28], "little")
        first += int.from_bytes(head[28:30], "little")
        if first + info.file_size > size:
            raise ValueError(f"{info.filename!r:.80} claims {info.file_size} bytes, more than the file has")
        members[info.filename] = first, info.file_size
    if (total := sum(length for _, length in members.values())) > size:
        raise ValueError(f"its members have {total} bytes in all, the file has {size}")
    return members


def _check_end(file: Any, size: int) -> None:
    """Raise unless the list of members ends where the end records begin, and these end with the file."""
    tail_at = max(0, size - _END - _LOCATOR - _END_64)
    file.seek(tail_at)
    tail = file.read(size - tail_at)
    end = tail[-_END:]
    if len(end) < _END or end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise ValueError("it is no zip archive, or data follows its end")
    length, first = (int.from_bytes(end[at : at + 4], "little") for at in (12, 16))
    ends_at = size - _END
    locator = tail[-_END - _LOCATOR : -_END]
    if locator[:4] == b"PK\6\7":
        ends_at -= _LOCATOR + _END_64
        end_64 = tail[:_END_64]
        if int.from_bytes(locator[8:16], "little") != ends_at or end_64[:4] != b"PK\6\6":
            raise ValueError("its end records contradict each other")
        length, first = (int.from_bytes(end_64[at : at + 8], "little") for at in (40, 48))
    if first + length != ends_at:
        raise ValueError("its list of members does not end where its end records begin")


def tensor_in(file: Any, size: int) -> tuple[int, int]:
    """(first byte, bytes) of the elements of an archive's only tensor, in row-major order."""
    members = stored_members(file, size)
    data = [place for name, place in members.items() if name.endswith("/data/0")]
    if len(data) != 1:
        raise ValueError(f"it holds {len(data)} tensors")
    order = next((place for name, place in members.items() if name.endswith("/byteorder")), None)
    if order is not None:
        file.seek(order[0])
        if file.read(order[1]) != sys.byteorder.encode():
            raise ValueError("it was written on a machine of another byte order")
    return data[0]


def check_small(file: IO[bytes]) -> None:
    """Raise unless `torch.load(file, weights_only=True)` needs little more memory than the file has bytes.

    The pickle is read into inert objects first, so nothing in it is executed or allocated.
    """
    members = stored_members(file, file.seek(0, io.SEEK_END))
    pickles = [place for name, place in members.items() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} pickles")
    first, length = pickles[0]
    file.seek(first)
    _check_extent(_Rehearsal(io.BytesIO(file.read(length))).load())
    file.seek(0)


class _Inert:
    """Stand-in for any object that a pickle names; it does nothing."""

    __slots__ = ("arguments",)
    arguments: tuple[Any, ...]
    sized_by_numbers = False

    def __new__(cls, *arguments: Any) -> _Inert:
        if cls.sized_by_numbers and any(isinstance(argument, int) for argument in arguments):
            raise ValueError(f"memory is asked for by number: {arguments!r:.80}")
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...
    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...
    def add(self, item: object) -> None: ...


class _Sized(_Inert):
    """Stand-in for types that allocate memory of a given length: `bytearray`, a bare tensor or storage."""

    __slots__ = ()
    sized_by_numbers = True


class _Rehearsal(pickle.Unpickler):
    """Unpickler that replaces every name by a stand-in, so that it can execute nothing."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        sized = name in ("bytearray", "Tensor", "Parameter") or name.endswith("Storage")
        return _Sized if sized else _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert(pid)


def _check_extent(value: Any) -> None:
    """Raise if `value` is nested too deeply, or refers to its parts so often that printing it would never end."""
    known: dict[int, tuple[int, int]] = {}  # (height, items) by id

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if isinstance(value, dict):
            inner = [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = list(value)
        elif isinstance(value, _Inert):
            inner = list(value.arguments)
        else:
            return 0, 1
        if id(value) not in known:
            if depth > MAX_NESTING:
                raise ValueError(f"its state is nested more than {MAX_NESTING} deep")
            measured = [measure(part, depth + 1) for part in inner]
            height = 1 + max((height for height, _ in measured), default=0)
            known[id(value)] = height, 1 + sum(items for _, items in measured)
        height, items = known[id(value)]
        if height > MAX_NESTING or items > MAX_ITEMS:
            raise ValueError(f"its state is nested more than {MAX_NESTING} deep, or has more than {MAX_ITEMS} items")
        return height, items

    measure(value, 0)
