"""The list of a checkpoint's files with their sizes and sums, and the files it sums.

Decides what makes a file or a list damaged, and says so by name. Knows no tensor, no rank, and no order of writing.
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
JSON_BYTES, JSON_DEPTH = 1 << 28, 16  # the lists here are 6 deep; a million boxes take 2**27 bytes
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}"]', re.DOTALL)


def own_file(rank: int) -> str:
    """What differs by rank beside tensors."""
    return f"rank-{rank:05d}.pt"


def table_file(rank: int) -> str:
    """Where in that rank's data which box lies."""
    return f"rank-{rank:05d}.json"


@dataclass(frozen=True, slots=True)
class FileSum:
    """What a file must be."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json`. `parameters`: {fqn: {"shape", "dtype", "rule"}} of the trainable ones."""

    format: int
    dp_size: int
    versions: dict[str, str]
    options: str
    parameters: dict[str, dict[str, Any]]
    files: dict[str, FileSum]


class SummedFile:
    """A new file, summed while it is written, on the disk when it is left. Its errors name it."""

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
            self._error = error  # torch.save turns it into a message about its own format
            raise
        self._sha256.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """torch.save asks for it; leaving the file does it."""

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as full:
            self._error = self._error or full
        try:
            self._file.close()
        except OSError as full:  # it flushes again
            self._error = self._error or full
        if self._error is not None:
            raise self._problem(self._error) from self._error

    def _problem(self, error: OSError) -> ValueError:
        return unwritten(self.path, error)

    @property
    def sum(self) -> FileSum:
        return FileSum(self.size, self._sha256.hexdigest())


def unwritten(path: Path, error: OSError, what: str = "written") -> ValueError:
    """The error for what the file system did not let happen to `path`."""
    found = f"it could not be {what} ({reason_of(error)})"
    return problem(str(path), found=found, needed="space and the right to write are needed", cure=INTACT)


def reason_of(error: OSError) -> str:
    """In words; some file systems give none."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def naming(path: Path, what: str = "written") -> Iterator[None]:
    """An `OSError` inside is raised as a `ValueError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error, what) from error


def write_file(path: Path, data: bytes) -> FileSum:
    """A whole small file, on the disk when this returns."""
    with SummedFile(path) as file:
        file.write(data)
    return file.sum


def read_manifest(path: Path) -> Manifest:
    """Raises `ValueError` naming the file, unless `path` is a checkpoint that was completed, of a format known here."""
    text, marker = read_small(path / MANIFEST), read_small(path / MARKER, most=1024)
    found = hashlib.sha256(text).hexdigest()
    if marker.decode("ascii", "replace") != found:
        raise damaged(path / MANIFEST, f"its sha256 is {found[:12]}..., {MARKER} says {marker[:12]!r}")
    return parse_manifest(path / MANIFEST, text)


def parse_manifest(where: Path, text: bytes) -> Manifest:
    """The manifest in `text`. Whatever is wrong with it, a `ValueError` that names `where`."""
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
            cure="load it with the version of distmuon that wrote it, or a later one",
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
        needed = (name for rank in range(dp_size) for name in (own_file(rank), table_file(rank)))
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
            raise damaged(path / name, "its sha256 is not the one of the manifest")


def parse_json(text: bytes) -> Any:
    """What `text` says. Raises `ValueError` for what is nested more deeply than anything here, before it is parsed."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text):
        first = token[0][:1]
        if first in b"[{":
            depth += 1
        elif first in b"]}":
            depth -= 1
        elif len(token[0]) == 1:
            raise ValueError("a text in it never ends")
        if depth > JSON_DEPTH:
            raise ValueError(f"it is nested more than {JSON_DEPTH} deep")
    return json.loads(text.decode())  # as UTF-8 only: in another encoding its brackets would look different


def sum_of(path: Path) -> FileSum:
    """Reads the whole file."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
            size += len(block)
    return FileSum(size, sha256.hexdigest())


def check_size(path: Path, manifest: Manifest, name: str) -> None:
    """Raise `ValueError` unless file `name` is there with its size."""
    try:
        size = _regular(path / name).stat().st_size
    except OSError as error:
        raise damaged(path / name, f"it cannot be read ({reason_of(error)})") from error
    if size != manifest.files[name].size:
        raise damaged(path / name, f"it has {size} bytes of {manifest.files[name].size}")


def read_small(path: Path, most: int = JSON_BYTES) -> bytes:
    """A whole list. Raises `ValueError` naming the file, also for one that is longer than any list here."""
    try:
        if _regular(path).stat().st_size <= most:
            return path.read_bytes()
    except OSError as error:
        raise damaged(path, f"it cannot be read ({reason_of(error)})") from error
    raise damaged(path, f"it has more than {most} bytes")


def _regular(path: Path) -> Path:
    """Reading a pipe or a device might never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(None, "it is not a regular file")
    return path


def _plain(name: str) -> str:
    """A file of the folder itself: a manifest must not lead anywhere else."""
    if name != Path(name).name or name in ("", ".", "..") or not name.isprintable():
        raise TypeError(f"file name {name!r}")
    return name


def count(value: object) -> int:
    """`value`, or a `TypeError`."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{str(value)[:80]} where a count is needed")
    return value


def not_understood(path: Path, error: Exception) -> ValueError:
    """The error for a file whose content is not what is written here."""
    return damaged(path, f"it cannot be understood ({type(error).__name__}: {error})")


def damaged(path: Path, found: str) -> ValueError:
    """The error for a file that is not what the manifest says, or a manifest that says nothing."""
    return problem(str(path), found=found, needed="a complete checkpoint is needed", cure="load an earlier checkpoint")


def merge_sums(tables: Sequence[Mapping[str, Any]]) -> dict[str, FileSum]:
    """The sums that the ranks' tables hold of their own files."""
    return {name: FileSum(**entry) for table in tables for name, entry in table["files"].items()}
