"""A checkpoint's manifest: the list of its files with sizes and sums, and reading and writing of summed files.

This module decides when a file or a list counts as damaged, and the error names it. It knows no tensor, no
communication and no order of writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from distmuon.errors import problem

FORMAT = 1
MANIFEST, MARKER = "manifest.json", "COMPLETE"
INTACT = "free space or choose another folder; checkpoints saved before are intact"
JSON_BYTES = 1 << 28  # a million boxes take 2**27 bytes
JSON_DEPTH = 16  # the lists here are 6 deep
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}"]', re.DOTALL)


def rank_file(rank: int) -> str:
    """Name of the file with `rank`'s small state."""
    return f"rank-{rank:05d}.pt"


def table_file(rank: int) -> str:
    """Name of the file that says where in `rank`'s data each box lies."""
    return f"rank-{rank:05d}.json"


@dataclass(frozen=True, slots=True)
class FileSum:
    """The size and sum that a file must have."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of `manifest.json`. `parameters`: {fqn: {"shape", "dtype", "rule"}} of the trainable parameters."""

    format: int
    dp_size: int
    versions: dict[str, str]
    options: str
    parameters: dict[str, dict[str, Any]]
    files: dict[str, FileSum]


class SummedFile:
    """A new file, summed while it is written and synced to the disk when it is closed. Its errors name it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._error: OSError | None = None

    def __enter__(self) -> SummedFile:
        try:
            self._file = self.path.open("xb")
        except OSError as error:
            raise self._problem(error) from error
        return self

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self._error = error  # torch.save hides it behind a message about its format
            raise
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: torch.save calls this, but `__exit__` flushes."""

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error_at_flush:
            self._error = self._error or error_at_flush
        try:
            self._file.close()
        except OSError as error_at_close:  # closing flushes again
            self._error = self._error or error_at_close
        if self._error is not None:
            raise self._problem(self._error) from self._error

    def _problem(self, error: OSError) -> ValueError:
        return unwritten(self.path, error)

    @property
    def sum(self) -> FileSum:
        return FileSum(self.size, self._sha256.hexdigest())


def unwritten(path: Path, error: OSError, what: str = "written") -> ValueError:
    """Make the error for an operation on `path` that the file system refused."""
    found = f"it could not be {what} ({reason_of(error)})"
    return problem(str(path), found=found, needed="space and permission to write are needed", cure=INTACT)


def reason_of(error: OSError) -> str:
    """Text of `error`, also where the file system gives no message."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def naming(path: Path, what: str = "written") -> Iterator[None]:
    """Raise an `OSError` from the block as a `ValueError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error, what) from error


def write_file(path: Path, data: bytes) -> FileSum:
    """Write a small file; it is synced to the disk when this returns."""
    with SummedFile(path) as file:
        file.write(data)
    return file.sum


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a complete checkpoint of a known format. Raises `ValueError` naming the file otherwise."""
    text, marker = read_small(path / MANIFEST), read_small(path / MARKER, most=1024)
    found = hashlib.sha256(text).hexdigest()
    if marker.decode("ascii", "replace") != found:
        raise damaged(path / MANIFEST, f"its sha256 is {found[:12]}..., {MARKER} says {marker[:12]!r}")
    return parse_manifest(path / MANIFEST, text)


def parse_manifest(where: Path, text: bytes) -> Manifest:
    """Parse the manifest in `text`. Raises a `ValueError` that names `where` for any fault."""
    try:
        raw = parse_json(text)
        version = raw["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise not_understood(where, error) from error
    if type(version) is not int or version != FORMAT:
        raise problem(
            str(where),
            found=f"the checkpoint has format {version!r}",
            needed=f"format {FORMAT} is read here",
            cure="load it with the version of distmuon that wrote it, or a later version",
        )
    try:
        files = {
            _plain(name): FileSum(count(entry["size"]), str(entry["sha256"])) for name, entry in raw["files"].items()
        }
        parameters = {
            str(fqn): {"shape": [count(n) for n in p["shape"]], "dtype": str(p["dtype"]), "rule": str(p["rule"])}
            for fqn, p in raw["parameters"].items()
        }
        versions = {str(name): str(value) for name, value in raw["versions"].items()}
        dp_size = count(raw["dp_size"])
        needed = (name for rank in range(dp_size) for name in (rank_file(rank), table_file(rank)))
        unsummed = next((name for name in chain(["shared.pt"], needed) if name not in files), None)
        if unsummed is not None:
            raise TypeError(f"no sum of {unsummed}")
        return Manifest(FORMAT, dp_size, versions, str(raw["options"]), parameters, files)
    except (KeyError, TypeError, AttributeError) as error:
        raise not_understood(where, error) from error


def check_files(path: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Compare the sums of every `parts`-th file from `part` on. Raises `ValueError` naming the file that differs."""
    for name in sorted(manifest.files)[part::parts]:
        check_size(path, manifest, name)
        try:
            found = sum_of(path / name)
        except OSError as error:
            raise damaged(path / name, f"it cannot be read ({reason_of(error)})") from error
        if found != manifest.files[name]:
            raise damaged(path / name, "its sha256 differs from the manifest's")


def parse_json(text: bytes) -> Any:
    """Parse JSON. Raises `ValueError` before parsing if `text` is nested more deeply than any list of a checkpoint."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text):
        first = token[0][:1]
        if first in b"[{":
            depth += 1
        elif first in b"]}":
            depth -= 1
        elif len(token[0]) == 1:
            raise ValueError("a string in it never ends")
        if depth > JSON_DEPTH:
            raise ValueError(f"it is nested more than {JSON_DEPTH} deep")
    return json.loads(text.decode())  # only UTF-8: in another encoding the scan above would not see the brackets


def sum_of(path: Path) -> FileSum:
    """Sum a file by reading it whole."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
            size += len(block)
    return FileSum(size, sha256.hexdigest())


def check_size(path: Path, manifest: Manifest, name: str) -> None:
    """Raise `ValueError` unless file `name` exists with its size."""
    try:
        size = _regular(path / name).stat().st_size
    except OSError as error:
        raise damaged(path / name, f"it cannot be read ({reason_of(error)})") from error
    if size != manifest.files[name].size:
        raise damaged(path / name, f"it has {size} of {manifest.files[name].size} bytes")


def read_small(path: Path, most: int = JSON_BYTES) -> bytes:
    """Read a small file. Raises `ValueError` naming it, also if it is longer than `most` bytes."""
    try:
        if _regular(path).stat().st_size <= most:
            return path.read_bytes()
    except OSError as error:
        raise damaged(path, f"it cannot be read ({reason_of(error)})") from error
    raise damaged(path, f"it has more than {most} bytes")


def _regular(path: Path) -> Path:
    """Raise `OSError` unless `path` is a regular file: reading a pipe or a device might never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(None, "it is not a regular file")
    return path


def _plain(name: str) -> str:
    """Return `name` if it names a file directly in the folder: a manifest must not refer to files elsewhere."""
    if name != Path(name).name or name in ("", ".", "..") or not name.isprintable():
        raise TypeError(f"file name {name!r}")
    return name


def count(value: object) -> int:
    """Return `value` if it is a count; raise a `TypeError` otherwise."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{str(value)[:80]} where a count is needed")
    return value


def not_understood(path: Path, error: Exception) -> ValueError:
    """Make the error for a file whose content distmuon does not write."""
    return damaged(path, f"it cannot be understood ({type(error).__name__}: {error})")


def damaged(path: Path, found: str) -> ValueError:
    """Make the error for a file that does not match its manifest, or for a bad manifest."""
    return problem(str(path), found=found, needed="a complete checkpoint is needed", cure="load an earlier checkpoint")


def merge_sums(tables: Sequence[Mapping[str, Any]]) -> dict[str, FileSum]:
    """Merge the sums of files from the ranks' tables."""
    return {name: FileSum(**entry) for table in tables for name, entry in table["files"].items()}
