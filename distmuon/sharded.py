"""Shard state <-> boxes of whole tensors, in the files of torch.distributed.checkpoint (DCP).

Decides what is saved under which key, and how a flat segment is cut into boxes. A segment is a contiguous range of its
flattened parameter; as part of the n-dimensional tensor it is a few boxes (`boxes`), and boxes are what DCP calls
chunks. So a file says nothing of dp_size, packing or buckets, and whoever wants any other part of the tensor can have
it: another cut of ours, or another reader of DCP.

    model.<fqn>                      every parameter and module buffer, in its own dtype
    optimizer.state.<fqn>.<key>      master (float32, where the parameter is not), momentum_buffer;
                                     exp_avg, exp_avg_sq, step

[Note: which part of DCP] Its file format and `FileSystemReader.read_data`, `FileSystemWriter.finish`, the metadata
classes and `create_read_items_for_chunk_list`, all public. Not `dcp.save` and `dcp.load`: they call collectives of
their own, unpickle `.metadata`, and hold every tensor of a file in memory until it is written. One private name is
needed, `_StorageInfo`, which stands in every `.metadata` that DCP ever wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from distmuon import snapshot
from distmuon.boxes import Box, boxes, make_up
from distmuon.buffers import BucketBuffers, Buffers, ShardPiece
from distmuon.manifest import FileSum, Manifest, SummedFile, count, damaged, not_understood, sum_of, table_file

Others = Mapping[str, Tensor]


# ------------------------------------------------------------------------- the two doors to a piece's state


def keys_of(bucket: BucketBuffers, piece: ShardPiece) -> tuple[str, ...]:
    """What is saved of a piece beside the parameter itself."""
    kept = [key for key in piece.state if key != "momentum_scale"]
    return ("master", *kept) if bucket.has_master else tuple(kept)


def read_value(bucket: BucketBuffers, piece: ShardPiece, key: str) -> Tensor:
    """The logical value of `key`, (length,) or for "step" 0-d, in the dtype in which it is saved. May be a view."""
    if key == "param":
        return piece.cut(bucket.param_shard)
    if key == "momentum_buffer":
        return piece.momentum()
    return bucket.master_of(piece) if key == "master" else piece.state[key]


def write_value(bucket: BucketBuffers, piece: ShardPiece, key: str, value: Tensor) -> None:
    """Take over the logical value of `key`, of the shape that `read_value` gives, any dtype and device.

    "master" is always given; the parameter follows, on other ranks when the bucket is gathered.
    """
    if key == "master":
        bucket.write_master(piece, value)
        return
    encoded = {key: value}
    if key == "momentum_buffer":
        encoded = piece.encoded(value.to(piece.state[key].device, torch.float32))
    for name, stored in encoded.items():
        piece.state[name].copy_(stored)


def _views(flat: Tensor, shape: Sequence[int], start: int) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of a flat segment, each with its elements as a view."""
    done = 0
    for box in boxes(shape, start, flat.numel()):
        size = prod(box[1])
        yield box, flat[done : done + size].view(box[1])
        done += size


# ------------------------------------------------------------------------------------------------ saving


@dataclass(frozen=True, slots=True)
class Part:
    """A flat range of a tensor that this rank saves. `read` is asked when it is written, not before."""

    name: tuple[str, ...]  # ("model", fqn) or ("optimizer", "state", fqn, key)
    shape: tuple[int, ...]
    start: int
    read: Callable[[], Tensor]


def parts_of(buffers: Buffers, others: Others, dp_size: int) -> Iterator[Part]:
    """What this rank saves: its pieces of the trainable parameters and their state, and its share of `others`."""
    for bucket in buffers.buckets:
        for piece in bucket.muon + bucket.adamw:
            spec, start = buffers.layout.specs[piece.segment.param], piece.segment.param_offset
            yield Part(("model", spec.fqn), spec.shape, start, _reader(bucket, piece, "param"))
            for key in keys_of(bucket, piece):
                name = ("optimizer", "state", spec.fqn, key)
                if key != "step":
                    yield Part(name, spec.shape, start, _reader(bucket, piece, key))
                elif start == 0:
                    yield Part(name, (), 0, _reader(bucket, piece, key))
    for number, (fqn, tensor) in enumerate(others.items()):
        if number % dp_size == buffers.dp_rank:
            yield Part(("model", fqn), tuple(tensor.shape), 0, tensor.detach)


def _reader(bucket: BucketBuffers, piece: ShardPiece, key: str) -> Callable[[], Tensor]:
    return lambda: read_value(bucket, piece, key)


def copied(parts: Iterable[Part]) -> list[Part]:
    """The same parts, read now, on the CPU: what is trained afterwards cannot alter them."""
    copies = [(part, part.read().to("cpu", copy=True)) for part in parts]
    return [Part(part.name, part.shape, part.start, copy.detach) for part, copy in copies]


def write_parts(path: Path, parts: Iterable[Part]) -> tuple[FileSum, dict[str, Any]]:
    """One rank's file, a box at a time: its sum, and the table that says where in it which box lies."""
    tensors: dict[str, Any] = {}
    with SummedFile(path) as file:
        for part in parts:
            snapshot.reached("in data")
            value = part.read().reshape(-1)
            entry = {"name": part.name, "shape": part.shape, "dtype": str(value.dtype), "boxes": []}
            entry = tensors.setdefault(".".join(part.name), entry)
            for (offsets, sizes), elements in _views(value, part.shape, part.start):
                at = file.size
                torch.save(
                    elements.to("cpu", copy=True), cast(IO[bytes], file)
                )  # of a view, the whole storage is written
                entry["boxes"].append([offsets, sizes, at, file.size - at])
            del value
    return file.sum, {"file": path.name, "tensors": tensors}


def write_metadata(folder: Path, tables: Sequence[Mapping[str, Any]]) -> FileSum:
    """`.metadata`, for other readers of DCP. Raises unless the boxes of all ranks make up every tensor exactly once."""
    metadata, results = metadata_of(tables)
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        assert _is_whole(entry), f"{name}: {entry.chunks}"
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(True)
    writer.finish(metadata, results)
    return sum_of(folder / ".metadata")


def _is_whole(entry: TensorStorageMetadata) -> bool:
    return make_up(tuple(entry.size), [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks])


def metadata_of(tables: Sequence[Mapping[str, Any]]) -> tuple[Metadata, list[list[WriteResult]]]:
    """The ranks' tables in DCP's own classes."""
    found: dict[str, TensorStorageMetadata] = {}
    names: dict[str, tuple[str, ...]] = {}
    results: list[WriteResult] = []
    for table in tables:
        for name, entry in table["tensors"].items():
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"].removeprefix("torch.")))
            tensor = found.setdefault(name, TensorStorageMetadata(properties, torch.Size(entry["shape"]), []))
            names[name] = tuple(entry["name"])
            for offsets, sizes, at, size in entry["boxes"]:
                tensor.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                place = _StorageInfo(table["file"], at, size)
                results.append(WriteResult(MetadataIndex(name, offsets), size, place))
    return Metadata({**found}, planner_data=names), [results]


# ----------------------------------------------------------------------------------------------- loading


class _Into(DefaultLoadPlanner):
    """Hands DCP the memory that each box is read into."""

    def __init__(self, targets: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._targets[read_item.dest_index]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            target = target.narrow(dim, offset, length)
        return target


class Reader:
    """The tensors of a complete checkpoint, by name; any flat range of each. Executes nothing that stands in it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        tables = [_table(path / table_file(rank), manifest) for rank in range(manifest.dp_size)]
        metadata, results = metadata_of(tables)
        metadata.storage_data = {result.index: result.storage_data for result in results[0]}
        self.tensors: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata  # type: ignore[assignment]
        for name, tensor in self.tensors.items():
            if not _is_whole(tensor):
                raise damaged(path, f"{name}: the boxes in its tables do not make it up exactly once")
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)

    def read(self, wanted: Mapping[tuple[str, int], tuple[Sequence[int], Tensor]]) -> None:
        """Fill flat CPU tensors: {(name, start in the flattened tensor): (its shape, memory)}."""
        targets: dict[MetadataIndex, Tensor] = {}
        items: dict[str, list[ReadItem]] = {}  # by file
        for (name, start), (shape, flat) in wanted.items():
            views = {MetadataIndex(name, box[0]): view for box, view in _views(flat, shape, start)}
            chunks = [ChunkStorageMetadata(index.offset or torch.Size(()), v.size()) for index, v in views.items()]
            targets.update(views)
            for item in create_read_items_for_chunk_list(name, self.tensors[name], chunks):
                items.setdefault(self._reader.storage_data[item.storage_index].relative_path, []).append(item)
        for file, of_file in items.items():
            try:
                self._reader.read_data(LoadPlan(of_file), _Into(targets)).wait()
            except Exception as error:  # a torch.load of what is no tensor, a box of another size
                found = f"its tensors cannot be read ({type(error).__name__}: {error})"
                raise damaged(self.path / file, found) from error

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None for what is not in the checkpoint."""
        return tuple(self.tensors[name].size) if name in self.tensors else None

    def master(self, fqn: str) -> str:
        """Where the most precise value of a parameter stands: its master, or itself if it has none."""
        name = f"optimizer.state.{fqn}.master"
        return name if name in self.tensors else f"model.{fqn}"

    def empty(self, name: str, length: int) -> Tensor:
        """Memory for `length` elements of `name`, as saved."""
        return torch.empty(length, dtype=self.tensors[name].properties.dtype)


def _table(path: Path, manifest: Manifest) -> dict[str, Any]:
    """One rank's table. Whatever is wrong with it, a `ValueError` that names the file."""
    try:
        raw = json.loads(path.read_bytes())
        size = manifest.files[raw["file"]].size
        for name, entry in raw["tensors"].items():
            dtype, numbers = getattr(torch, entry["dtype"].removeprefix("torch.")), [*entry["shape"]]
            whole = isinstance(dtype, torch.dtype) and name == ".".join(entry["name"])
            for offsets, sizes, at, length in entry["boxes"]:
                numbers += [*offsets, *sizes, at, length]
                whole &= len(offsets) == len(sizes) == len(entry["shape"]) and at + length <= size
            if not whole or not all(count(number) == number for number in numbers):
                raise TypeError(f"{name} has boxes of another shape or outside of its file")
        return dict(raw)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise not_understood(path, error) from error


def missing_from(reader: Reader, buffers: Buffers, fresh: set[str], others: Others) -> list[str]:
    """What loading would need and not find: "name: what was found", one line a tensor. Reads no data."""
    needed = {f"model.{fqn}": tuple(tensor.shape) for fqn, tensor in others.items()}
    for bucket in buffers.buckets:
        for piece in bucket.muon + bucket.adamw:
            spec = buffers.layout.specs[piece.segment.param]
            needed[reader.master(spec.fqn)] = spec.shape
            for key in keys_of(bucket, piece):
                if key != "master" and spec.fqn not in fresh:
                    needed[f"optimizer.state.{spec.fqn}.{key}"] = () if key == "step" else spec.shape
    found = [(name, reader.shape(name), shape) for name, shape in needed.items()]
    return [f"{name} has shape {theirs}, not {ours}" for name, theirs, ours in found if theirs != ours]


def read_bucket(
    reader: Reader, buffers: Buffers, bucket: BucketBuffers, fresh: set[str]
) -> list[tuple[ShardPiece, str, Tensor]]:
    """What `write_value` shall write: masters and state of this rank's pieces, zeros for state of the `fresh`."""
    wanted: dict[tuple[str, int], tuple[Sequence[int], Tensor]] = {}
    values: list[tuple[ShardPiece, str, Tensor]] = []
    for piece in bucket.muon + bucket.adamw:
        spec, start = buffers.layout.specs[piece.segment.param], piece.segment.param_offset
        for key in dict.fromkeys(("master", *keys_of(bucket, piece))):
            if key != "master" and spec.fqn in fresh:
                values.append((piece, key, torch.zeros_like(read_value(bucket, piece, key))))
                continue
            name = reader.master(spec.fqn) if key == "master" else f"optimizer.state.{spec.fqn}.{key}"
            at, length, shape = (0, 1, ()) if key == "step" else (start, piece.segment.length, spec.shape)
            _, memory = wanted.setdefault((name, at), (shape, reader.empty(name, length)))
            values.append((piece, key, memory.view(()) if key == "step" else memory))
    reader.read(wanted)
    return values


def read_other(reader: Reader, fqn: str, tensor: Tensor) -> Tensor:
    """A frozen parameter or module buffer: what `tensor` shall be, on the CPU."""
    name = f"model.{fqn}"
    value = reader.empty(name, tensor.numel())
    reader.read({(name, 0): (tensor.shape, value)})
    return value.view(tensor.shape)
