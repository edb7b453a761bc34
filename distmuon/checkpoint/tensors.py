"""Shard state <-> boxes of whole tensors, in the files of torch.distributed.checkpoint (DCP).

This module decides which values are saved under which key, and how a segment is cut into boxes. It knows no folder
and no order of saving. A segment is a contiguous range of its flattened parameter, or columns of it; as part of the
n-dimensional tensor it is a few boxes (`layout.boxes`), which DCP calls chunks. So a file does not depend on dp_size,
packing or buckets, and any reader can ask for any part of a tensor: distmuon with another layout, or another reader of
DCP.

    model.<fqn>                      every parameter and module buffer, in its own dtype; rank 0's where ranks differ
    rank.<r>.<fqn>                   the value of rank r instead, for a load at the same number of ranks
    optimizer.state.<fqn>.<key>      master (float32, where the parameter is not), momentum_buffer (and step, where
                                     that has fewer than 32 bits); exp_avg, exp_avg_sq, step; with NorMuon
                                     row_exp_avg_sq, (rows,)

[Note: which part of DCP] distmuon uses DCP's file format, in which every box is an archive of `torch.save`, and for
`.metadata` the metadata classes and `FileSystemWriter.finish`, all public. It does not use `dcp.save` and `dcp.load`:
they call collectives, unpickle `.metadata`, and hold every tensor of a file in memory until it is written. One private
name is needed, `_StorageInfo`, which is in every `.metadata` that DCP ever wrote.

[Note: reading a box] The tables give the dtype and shape of a box, and its elements are one stored member of its
archive. So only the needed elements are read, as bytes, and no pickle is opened.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from distmuon.checkpoint import folder
from distmuon.checkpoint.archives import Slice, tensor_in
from distmuon.checkpoint.manifest import (
    FileSum,
    Manifest,
    SummedFile,
    count,
    damaged,
    naming,
    not_understood,
    parse_json,
    read_small,
    sum_of,
    table_file,
)
from distmuon.layout.boxes import MAX_DIMS, Box, Runs, boxes_of_runs, runs_of, tiles_exactly
from distmuon.layout.routing import ParamSpec
from distmuon.step.dtensors import box_of, local_of
from distmuon.step.storage import ROW_MOMENT, BucketStorage, ShardPiece, Storage

UntrainedTensors = Mapping[str, Tensor]


# ------------------------------------------------------------------------------ access to a piece's state


def keys_of(bucket: BucketStorage, piece: ShardPiece) -> tuple[str, ...]:
    """The keys under which a piece's state is saved, beside the parameter itself."""
    kept = [key for key in piece.state if key != "momentum_scale"]
    return ("master", *kept) if bucket.has_master else tuple(kept)


def read_value(bucket: BucketStorage, piece: ShardPiece, key: str) -> Tensor:
    """The logical value of `key`, (length,) or for "step" 0-d, in the dtype in which it is saved. May be a view."""
    if key == "param":
        return bucket.param_of(piece)
    if key == "momentum_buffer":
        return bucket.momentum.decode(piece.state)
    return bucket.master_of(piece) if key == "master" else piece.state[key]


def write_value(bucket: BucketStorage, piece: ShardPiece, key: str, value: Tensor) -> None:
    """Write the logical value of `key`, with the shape that `read_value` gives, of any dtype and device.

    The caller always writes "master"; the parameter follows from it, on other ranks when the bucket is gathered.
    """
    if key == "master":
        bucket.write_master(piece, value)
        return
    encoded = {key: value}
    if key == "momentum_buffer":
        encoded = bucket.momentum.encode(value.to(piece.state[key].device, torch.float32))
    for name, stored in encoded.items():
        piece.state[name].copy_(stored)


def _views(flat: Tensor, part: Part) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of a part, each with its elements as a view of `flat`."""
    done = 0
    for box in boxes_of_runs(part.shape, part.start, flat.numel(), *part.runs):
        size = prod(box[1])
        yield box, flat[done : done + size].view(box[1])
        done += size


# ------------------------------------------------------------------------------------------------ saving


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of a tensor that this rank saves, from `start` on. `read` is called only when they are written."""

    name: tuple[str, ...]  # ("model", fqn), ("rank", number, fqn) or ("optimizer", "state", fqn, key)
    shape: tuple[int, ...]
    start: int
    read: Callable[[], Tensor]
    runs: Runs = (0, 0)


def parts_of(
    storage: Storage,
    untrained: UntrainedTensors,
    cut: UntrainedTensors,
    dp_size: int,
    shared: Sequence[str],
    alike: Collection[str],
) -> Iterator[Part]:
    """The parts that this rank saves: its pieces of the trained parameters and their state, and `untrained` tensors.

    Of replicas the first rank saves. `cut`: DTensors that are not trained, of which this rank saves its box.

    Of the untrained tensors that are `alike` on all ranks it saves its share, and all of those that are not. `shared`:
    the names that all ranks hold, alike or not, in the same order everywhere. If a shared tensor differs by rank, rank
    0's value has the plain name, which loads at any number of ranks.
    """
    for bucket in storage.buckets:
        for piece in bucket.muon + bucket.adamw:
            segment = piece.segment
            if segment.replica:
                continue
            spec, start = storage.layout.specs[segment.param], segment.param_offset
            runs = (segment.run, segment.stride)
            yield Part(("model", spec.fqn), spec.shape, start, _reader(bucket, piece, "param"), runs)
            for key in keys_of(bucket, piece):
                name = ("optimizer", "state", spec.fqn, key)
                if key != "step":
                    yield Part(name, spec.shape, start, _reader(bucket, piece, key), runs)
                elif start == 0:
                    yield Part(name, (), 0, _reader(bucket, piece, key))
    yield from _row_moments(storage)
    for fqn, tensor in cut.items():
        for start, elements, runs in _own_box(tensor):
            yield Part(("model", fqn), tuple(tensor.shape), start, _resolver(elements), runs)
    dealt = [fqn for fqn in shared if fqn in alike][storage.dp_rank :: dp_size]
    for fqn, tensor in untrained.items():
        if fqn in dealt or (storage.dp_rank == 0 and fqn in shared and fqn not in alike):
            yield Part(("model", fqn), tuple(tensor.shape), 0, _resolver(tensor))
        elif fqn not in alike:
            yield Part(("rank", str(storage.dp_rank), fqn), tuple(tensor.shape), 0, _resolver(tensor))


def _row_moments(storage: Storage) -> Iterator[Part]:
    """NorMuon's moments: all ranks have them, and the first saves them."""
    for index, moment in storage.row_moments.items() if storage.dp_rank == 0 else ():
        name = ("optimizer", "state", storage.layout.specs[index].fqn, ROW_MOMENT)
        yield Part(name, tuple(moment.shape), 0, moment.detach)


def _own_box(tensor: Tensor) -> Iterator[tuple[int, Tensor, Runs]]:
    """Yield (first element, elements, runs) of this rank's part of a DTensor; the elements are views."""
    box, local = box_of(tensor), local_of(tensor).detach().view(-1)
    done = 0
    for start, length, run, stride in runs_of(tensor.shape, box) if box is not None and local.numel() else ():
        yield start, local[done : done + length], (run, stride)
        done += length


def read_cut(reader: Reader, cut: UntrainedTensors) -> list[tuple[Tensor, Tensor]]:
    """(this rank's elements, what they shall be) of DTensors that are not trained."""
    found = []
    for fqn, tensor in cut.items():
        for start, elements, runs in _own_box(tensor):
            found.append((elements, reader.read(f"model.{fqn}", start, elements.numel(), runs)))
    return found


def _resolver(tensor: Tensor) -> Callable[[], Tensor]:
    """Make a function that returns the tensor without lazy conjugation and negation, which a file cannot express."""
    return lambda: tensor.detach().resolve_conj().resolve_neg()


def _reader(bucket: BucketStorage, piece: ShardPiece, key: str) -> Callable[[], Tensor]:
    return lambda: read_value(bucket, piece, key)


def copied(parts: Iterable[Part]) -> list[Part]:
    """Read the parts now, to the CPU, so that later training cannot alter them."""
    copies = [(part, part.read().reshape(-1).to("cpu", copy=True)) for part in parts]
    return [Part(part.name, part.shape, part.start, copy.detach, part.runs) for part, copy in copies]


def write_parts(path: Path, parts: Iterable[Part]) -> tuple[FileSum, dict[str, Any]]:
    """Write a rank's file, a box at a time; return its sum, and the table of where in the file each box lies."""
    tensors: dict[str, Any] = {}
    with SummedFile(path) as file:
        for part in parts:
            folder.fault_point("in data")
            value = part.read().reshape(-1)
            entry = {"name": part.name, "shape": part.shape, "dtype": str(value.dtype), "boxes": []}
            entry = tensors.setdefault(".".join(part.name), entry)
            for (offsets, sizes), elements in _views(value, part):
                at = file.size
                # Without the copy torch.save would write the whole storage of a view.
                torch.save(elements.to("cpu", copy=True), cast(IO[bytes], file))
                entry["boxes"].append([offsets, sizes, at, file.size - at])
            del value
    return file.sum, {"file": path.name, "tensors": tensors}


def write_metadata(path: Path, tables: Sequence[Mapping[str, Any]]) -> FileSum:
    """Write `.metadata`, for other readers of DCP. Asserts that all ranks' boxes cover every tensor exactly once."""
    metadata, results = metadata_of(tables)
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        assert _is_whole(entry), f"{name}: {entry.chunks}"
    with naming(path / ".metadata"):
        writer = FileSystemWriter(path)
        writer.set_up_storage_writer(True)
        writer.finish(metadata, results)
        return sum_of(path / ".metadata")


def _is_whole(entry: TensorStorageMetadata) -> bool:
    return tiles_exactly(tuple(entry.size), [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks])


def metadata_of(tables: Sequence[Mapping[str, Any]]) -> tuple[Metadata, list[list[WriteResult]]]:
    """Convert the ranks' tables to DCP's classes."""
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


@dataclass(frozen=True, slots=True)
class _Stored:
    """Elements of a flattened tensor from `start` on, and the place of the archive that has them after `skipped`.

    `end`: the end of a contiguous range; of columns, whose `runs` are not (0, 0), that of their last run.
    """

    start: int
    end: int
    file: str
    at: int
    length: int
    num_stored: int  # elements in the archive
    skipped: int = 0
    runs: Runs = (0, 0)


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor of a checkpoint: its boxes as ranges, in order, and as columns."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: list[Box]
    ranges: list[_Stored]
    columns: list[_Stored]


class Reader:
    """Access to any flat range of the tensors of a complete checkpoint. Executes nothing in its files."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.tensors: dict[str, Saved] = {}
        for rank in range(manifest.dp_size):
            table = _table(path / table_file(rank), manifest)
            for name, entry in table["tensors"].items():
                shape, dtype = tuple(entry["shape"]), _dtype(entry["dtype"])
                saved = self.tensors.setdefault(name, Saved(shape, dtype, [], [], []))
                if (saved.shape, saved.dtype) != (shape, dtype):
                    raise self._not_tiled(name)
                for offsets, sizes, at, length in entry["boxes"]:
                    box = (tuple(offsets), tuple(sizes))
                    if not _is_inside(shape, box):
                        raise self._not_tiled(name)
                    saved.boxes.append(box)
                    for stored in _stored_of(shape, box, table["file"], at, length):
                        (saved.columns if any(stored.runs) else saved.ranges).append(stored)
        for name, saved in self.tensors.items():
            saved.ranges.sort(key=lambda stored: stored.start)
            if not saved.columns:
                whole = [*(s.start for s in saved.ranges), prod(saved.shape)] == [0, *(s.end for s in saved.ranges)]
            else:
                whole = tiles_exactly(saved.shape, saved.boxes)
            if not whole:
                raise self._not_tiled(name)

    def _not_tiled(self, name: str) -> ValueError:
        return damaged(self.path, f"{name}: the boxes in its tables do not cover it exactly once")

    def read(self, name: str, start: int, length: int, runs: Runs = (0, 0)) -> Tensor:
        """`length` elements of the flattened tensor from `start` on, in the dtype of the save, on the CPU."""
        run, stride = runs
        if run:  # whole rows, of which the columns are taken
            rows = length // run
            span = self.read(name, start, (rows - 1) * stride + run)
            return span.as_strided((rows, run), (stride, 1)).reshape(-1)
        saved = self.tensors[name]
        size = saved.dtype.itemsize
        memory = bytearray(length * size)
        stop = start + length
        first = bisect_right(saved.ranges, start, key=lambda stored: stored.end)
        in_range = takewhile(lambda stored: stored.start < stop, saved.ranges[first:])
        for stored in (*in_range, *(s for s in saved.columns if s.start < stop and s.end > start)):
            try:
                self._read_into(memory, start, stop, stored, size)
            except Exception as error:  # a bad archive may raise anything
                found = f"its tensors cannot be read ({type(error).__name__}: {error})"
                raise damaged(self.path / stored.file, found) from error
        elements = torch.frombuffer(memory, dtype=torch.uint8) if memory else torch.empty(0, dtype=torch.uint8)
        try:
            return elements.view(saved.dtype)
        except RuntimeError as error:  # a quantised dtype, for example
            raise damaged(self.path, f"{name}: {saved.dtype} is not read here") from error

    def _read_into(self, memory: bytearray, start: int, stop: int, stored: _Stored, size: int) -> None:
        """Fill `memory`, elements [start, stop) of `size` bytes, with those that are `stored`."""
        run, stride = stored.runs if stored.runs[0] else (stored.end - stored.start, stored.end - stored.start)
        number = max(0, (start - stored.start - run) // stride + 1)  # of the first run that ends after `start`
        with (self.path / stored.file).open("rb") as file:
            archive = Slice(file, stored.at, stored.length)
            first, found = tensor_in(archive, stored.length)
            if found != stored.num_stored * size:
                raise ValueError(f"{found} bytes of elements, not {stored.num_stored * size}")
            for begin in range(stored.start + number * stride, min(stop, stored.end), stride):
                low, high = max(start, begin), min(stop, begin + run)
                into = memoryview(memory)[(low - start) * size : (high - start) * size]
                archive.seek(first + (stored.skipped + number * run + low - begin) * size)
                if archive.readinto(into) != len(into):
                    raise ValueError("the file ends before them")
                number += 1

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if the checkpoint does not hold it."""
        return self.tensors[name].shape if name in self.tensors else None

    def master_key(self, fqn: str) -> str:
        """The name of a parameter's most precise value: its master, or itself if it has none."""
        name = f"optimizer.state.{fqn}.master"
        return name if name in self.tensors else f"model.{fqn}"

    def untrained_key(self, fqn: str, rank: int) -> str:
        """The name of `rank`'s value of a frozen parameter or module buffer: by rank, or shared by all ranks."""
        name = f"rank.{rank}.{fqn}"
        return name if name in self.tensors else f"model.{fqn}"

    def fqns_of(self, rank: int) -> set[str]:
        """The fqns of the parameters and module buffers that `rank` held."""
        by_rank = (name.removeprefix(f"rank.{rank}.") for name in self.tensors if name.startswith(f"rank.{rank}."))
        return {*by_rank, *(name.removeprefix("model.") for name in self.tensors if name.startswith("model."))}

    def differing_fqns(self) -> set[str]:
        """The fqns of tensors that were not the same on all ranks."""
        return {name.split(".", 2)[2] for name in self.tensors if name.startswith("rank.")}


def _is_inside(shape: Sequence[int], box: Box) -> bool:
    return all(size > 0 and offset + size <= n for offset, size, n in zip(*box, shape))


def _stored_of(shape: Sequence[int], box: Box, file: str, at: int, length: int) -> Iterator[_Stored]:
    """The elements of a box in the archive of `length` bytes at byte `at` of `file`."""
    skipped = 0
    for start, elements, run, stride in runs_of(shape, box):
        end = start + elements if not run else start + (elements // run - 1) * stride + run
        yield _Stored(start, end, file, at, length, prod(box[1]), skipped, (run, stride))
        skipped += elements


def _dtype(name: str) -> torch.dtype:
    """The dtype called `name`. Raises a `TypeError` for any other name."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r:.40} is no dtype")
    return dtype


def _table(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Read a rank's table. Raises a `ValueError` that names the file for any fault."""
    text = read_small(path)
    try:
        raw = parse_json(text)
        size = manifest.files[raw["file"]].size
        for name, entry in raw["tensors"].items():
            shape, dtype = entry["shape"], _dtype(entry["dtype"])
            if len(shape) > MAX_DIMS:
                raise TypeError(f"{name!r:.80} has {len(shape)} dimensions, more than the {MAX_DIMS} of any tensor")
            numbers = [*shape]
            whole = name == ".".join(entry["name"]) and not (name.startswith("rank.") and name.count(".") < 2)
            for offsets, sizes, at, length in entry["boxes"]:
                whole &= len(offsets) == len(sizes) == len(shape)
                if not whole:
                    break
                numbers += [*offsets, *sizes, at, length]
                whole &= at + length <= size and prod(sizes) * dtype.itemsize <= length
            if not whole or not all(count(number) == number for number in numbers):
                raise TypeError(f"{name!r:.80} has boxes of another shape or outside of its file")
        return dict(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise not_understood(path, error) from error


def missing_from(
    reader: Reader, storage: Storage, fresh: set[str], untrained: UntrainedTensors, cut: UntrainedTensors, rank: int
) -> list[str]:
    """Describe the tensors that a load needs but that are absent or of another shape. Reads no data."""
    needed = {f"model.{fqn}": tuple(tensor.shape) for fqn, tensor in cut.items()}
    needed |= {reader.untrained_key(fqn, rank): tuple(tensor.shape) for fqn, tensor in untrained.items()}
    for bucket in storage.buckets:
        for piece in bucket.muon + bucket.adamw:
            spec = storage.layout.specs[piece.segment.param]
            needed[reader.master_key(spec.fqn)] = spec.shape
            for key in keys_of(bucket, piece):
                if key != "master" and not _starts_anew(reader, spec, key, fresh):
                    needed[f"optimizer.state.{spec.fqn}.{key}"] = () if key == "step" else spec.shape
    for index, moment in storage.row_moments.items():
        saved_as = _row_moment_key(reader, storage, index, fresh)
        if saved_as is not None:
            needed[saved_as] = tuple(moment.shape)
    shapes = [(name, reader.shape(name), shape) for name, shape in needed.items()]
    return [f"{name} has shape {found}, not {shape}" for name, found, shape in shapes if found != shape]


def _starts_anew(reader: Reader, spec: ParamSpec, key: str, fresh: set[str]) -> bool:
    """Whether `key` starts from zero: for a `fresh` parameter, and for the step of momentum saved without a step."""
    absent = spec.rule == "muon" and key == "step" and reader.shape(f"optimizer.state.{spec.fqn}.step") is None
    return absent or spec.fqn in fresh


def read_bucket(
    reader: Reader, storage: Storage, bucket: BucketStorage, fresh: set[str]
) -> list[tuple[ShardPiece, str, Tensor]]:
    """Values for `write_value`: masters and state of this rank's pieces, zeros for the state of `fresh` parameters."""
    values: list[tuple[ShardPiece, str, Tensor]] = []
    for piece in bucket.muon + bucket.adamw:
        segment = piece.segment
        spec = storage.layout.specs[segment.param]
        for key in dict.fromkeys(("master", *keys_of(bucket, piece))):
            if key != "master" and _starts_anew(reader, spec, key, fresh):
                values.append((piece, key, torch.zeros_like(read_value(bucket, piece, key))))
            elif key == "step":
                values.append((piece, key, reader.read(f"optimizer.state.{spec.fqn}.step", 0, 1).view(())))
            else:
                name = reader.master_key(spec.fqn) if key == "master" else f"optimizer.state.{spec.fqn}.{key}"
                elements = reader.read(name, segment.param_offset, segment.length, (segment.run, segment.stride))
                values.append((piece, key, elements))
    return values


def read_row_moments(reader: Reader, storage: Storage, fresh: set[str]) -> list[tuple[Tensor, Tensor]]:
    """(NorMuon's moments of a parameter, what they shall be): zeros if the save had none."""
    found = []
    for index, moment in storage.row_moments.items():
        key = _row_moment_key(reader, storage, index, fresh)
        found.append((moment, torch.zeros(()) if key is None else reader.read(key, 0, moment.numel())))
    return found


def _row_moment_key(reader: Reader, storage: Storage, index: int, fresh: set[str]) -> str | None:
    fqn = storage.layout.specs[index].fqn
    key = f"optimizer.state.{fqn}.{ROW_MOMENT}"
    return None if fqn in fresh or reader.shape(key) is None else key


def read_untrained(reader: Reader, fqn: str, tensor: Tensor, rank: int) -> Tensor:
    """Read `rank`'s value of the frozen parameter or module buffer `tensor`, to the CPU."""
    return reader.read(reader.untrained_key(fqn, rank), 0, tensor.numel()).view(tensor.shape)
