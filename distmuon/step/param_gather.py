"""The way from updated shards to full parameters on all ranks: what travels, and what happens when it arrives.

Each bucket has a `Transport`. This module decides what a transport sends; the hooks of the modules (hooks.py) decide
when a forward waits for it, so the all-gathers of later layers may run under the forward of earlier layers. The module
knows no rule: the caller passes the function that updates a weight.

[Note: updates travel] With `Sharding(param_gather="updates")` a rank sends the polar factors of its shard (2 bytes an
element in bfloat16, 1 in int8) instead of its float32 parameters (4), and every rank computes line 6 of the algorithm
on its whole replica. The owners of the matrices have rounded them so that encoding loses nothing, whatever the cut
([Note: updates in int8] in math/codecs.py). AdamW's elements travel as parameters. Replicas stay equal bit by bit: they
make the same three roundings of the same numbers, and no kernel contracts a product and a sum (`rules.muon_weight`).

      message of a rank: | AdamW elements, float32 | polar factors, encoded | up to the longest message |

[Note: streams of a forward] The first stream that needs a bucket waits for the collective and copies staged parameters
out. On a GPU that orders this stream alone: the step's stream then waits for it, because the next step will read and
write there, and any other stream waits for an event when it needs the bucket, once in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.layout.layout import Layout, Segment
from distmuon.math.codecs import UpdateCodec
from distmuon.step.flat_storage import FlatStorage
from distmuon.step.storage import BucketStorage, Masters, runs_of

ApplyMuon = Callable[[Segment, Tensor, Tensor], None]  # line 6 on one segment: (segment, weight, polar factor)


class Transport(Protocol):
    """The way in which a bucket's update reaches all ranks."""

    has_message: bool
    """Whether the message has separate memory, so that only few messages may be in flight."""

    def apply(self, masters: Masters, polar: Sequence[Tensor], apply_muon: ApplyMuon) -> None:
        """Compute line 6, now or on arrival. `masters`: by piece; `polar`: a 1-D tensor for each Muon piece."""

    def start(self) -> None:
        """Start the all-gather."""

    def wait(self) -> None:
        """Wait for the all-gather, if it is in flight, and copy staged parameters out; later calls only let the current
        stream wait, too."""


class _Flight:
    """An all-gather; on a GPU also the streams that may read what it brought, see [Note: streams of a forward]."""

    def __init__(self, pending: Pending, tensor: Tensor) -> None:
        self._pending: Pending | None = pending
        self._home = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        self._ordered: set[torch.cuda.Stream] = set()
        self._arrived: torch.cuda.Event | None = None

    def take(self) -> Pending | None:
        """The collective, for the first stream that waits; None for all others."""
        taken, self._pending = self._pending, None
        return taken

    def arrived(self) -> None:
        """All is in place on the current stream, the first that waited."""
        if self._home is not None:
            current = torch.cuda.current_stream(self._home.device)
            self._arrived = torch.cuda.Event()
            self._arrived.record(current)
            self._ordered.add(current)
            self._follow(self._home)

    def follow(self) -> None:
        """Let the current stream wait, too."""
        if self._home is not None:
            self._follow(torch.cuda.current_stream(self._home.device))

    def _follow(self, stream: torch.cuda.Stream) -> None:
        if self._arrived is not None and stream not in self._ordered:
            stream.wait_event(self._arrived)
            self._ordered.add(stream)


class Parameters:
    """Transport of the parameters themselves, in place in the flat buffer; counted under `stage`."""

    has_message = False

    def __init__(self, storage: FlatStorage, group: DataParallelGroup, stage: str = "all_gather") -> None:
        self._storage = storage
        self._group = group
        self._stage = stage
        self._flight: _Flight | None = None

    def apply(self, masters: Masters, polar: Sequence[Tensor], apply_muon: ApplyMuon) -> None:
        for piece, factor in zip(self._storage.muon, polar):
            apply_muon(piece.segment, masters(piece), factor)

    def start(self) -> None:
        storage = self._storage
        self._flight = _start(storage, self._group, storage.param_flat, storage.param_shard, self._stage)

    @torch.no_grad()
    def wait(self) -> None:
        flight = self._flight
        pending = flight.take() if flight is not None else None
        if flight is not None and pending is not None:
            pending.wait()
            self._storage.stage_out()
            self._storage.note_arrived()
            flight.arrived()
        elif flight is not None:
            flight.follow()


class Nothing:
    """FSDP2 gathers what a forward needs by itself: line 6 on the shards, and nothing travels."""

    has_message = False

    def __init__(self, storage: BucketStorage, params: Sequence[nn.Parameter]) -> None:
        self._storage = storage
        self._params = [params[index] for index in storage.spec.params]

    def apply(self, masters: Masters, polar: Sequence[Tensor], apply_muon: ApplyMuon) -> None:
        for piece, factor in zip(self._storage.muon, polar):
            apply_muon(piece.segment, masters(piece), factor)

    def start(self) -> None:
        """Autograd must see that the parameters changed."""
        for param in self._params:
            torch.autograd.graph.increment_version(param)

    def wait(self) -> None:
        """The shards are whole."""


class Updates:
    """Transport of updates, which every rank applies to its whole replica. See [Note: updates travel]."""

    has_message = True

    def __init__(self, storage: FlatStorage, group: DataParallelGroup, layout: Layout, codec: UpdateCodec) -> None:
        self._storage = storage
        self._group = group
        self._layout = layout
        self._codec = codec
        by_rank = [[s for s in storage.spec.segments if s.rank == rank] for rank in range(group.dp_size)]
        self._runs = [runs_of(segments, layout, storage.block) for segments in by_rank]
        self._polar: Sequence[Tensor] = ()
        self._apply_muon: ApplyMuon | None = None
        self._flight: _Flight | None = None

    def apply(self, masters: Masters, polar: Sequence[Tensor], apply_muon: ApplyMuon) -> None:
        self._polar, self._apply_muon = polar, apply_muon

    def start(self) -> None:
        message = self._message()
        self._polar = ()
        messages = message.new_empty(self._group.dp_size * message.numel())
        self._flight = _start(self._storage, self._group, messages, message, "all_gather")

    @torch.no_grad()
    def wait(self) -> None:
        flight = self._flight
        pending = flight.take() if flight is not None else None
        if flight is not None and pending is not None:
            self._take(pending.wait())
            self._apply_muon = None
            self._storage.stage_out()
            self._storage.note_arrived()
            flight.arrived()
        elif flight is not None:
            flight.follow()

    def _message(self) -> Tensor:
        storage = self._storage
        size = self._layout.message_bytes(storage.spec, self._codec)
        message = torch.zeros(size, dtype=torch.uint8, device=storage.param_flat.device)
        muon = [piece.segment for piece in storage.muon]
        adamw, sent = self._sections(message, [piece.segment for piece in storage.adamw], muon)
        for place, piece in zip(adamw, storage.adamw):
            place.copy_(piece.cut(storage.param_shard))
        values = self._codec.room(sent)
        for place, polar in zip(self._places(values, muon), self._polar):
            place.copy_(polar)
        self._codec.encode(values, sent)
        return message

    def _take(self, messages: Tensor) -> None:
        """Compute line 6 on the shards of all ranks, and copy AdamW's elements of the other ranks."""
        assert self._apply_muon is not None
        for rank, (message, segments) in enumerate(zip(messages.view(self._group.dp_size, -1), self._runs)):
            muon = [s for s in segments if self._layout.specs[s.param].rule == "muon"]
            adamw = [s for s in segments if self._layout.specs[s.param].rule == "adamw"]
            places, sent = self._sections(message, adamw, muon)
            for segment, elements in zip(adamw, places) if rank != self._group.dp_rank else ():
                self._weight(segment).copy_(elements)
            for segment, polar in zip(muon, self._places(self._codec.decode(sent), muon)):
                self._apply_muon(segment, self._weight(segment), polar)

    def _weight(self, segment: Segment) -> Tensor:
        """The elements of any rank's segment in this rank's replica."""
        start = segment.rank * self._storage.spec.shard_size + segment.shard_offset
        return self._storage.param_flat[start : start + segment.length]

    def _sections(
        self, message: Tensor, adamw: Sequence[Segment], muon: Sequence[Segment]
    ) -> tuple[Sequence[Tensor], Tensor]:
        """The places of AdamW's segments in a rank's message, and the bytes of its encoded polar factors."""
        end = 4 * sum(s.length for s in adamw)
        border = -(-end // 8) * 8
        elements = sum(self._layout.blocks_of(s, self._codec.block)[0] for s in muon)
        places = torch.split(message[:end].view(torch.float32), [s.length for s in adamw])
        return places, message[border : border + self._codec.bytes(elements)]

    def _places(self, values: Tensor, muon: Sequence[Segment]) -> list[Tensor]:
        """The elements of segments in `values`, which hold whole blocks of each."""
        touched = [self._layout.blocks_of(s, self._codec.block) for s in muon]
        blocks = torch.split(values, [elements for elements, _ in touched])
        return [found[before : before + s.length] for found, (_, before), s in zip(blocks, touched, muon)]


def _start(storage: FlatStorage, group: DataParallelGroup, output: Tensor, input: Tensor, stage: str) -> _Flight:
    storage.note_sent()
    with torch.profiler.record_function(f"distmuon::all_gather/{storage.spec.index}"):
        return _Flight(group.start_all_gather(output, input, stage=stage, label=storage.label), output)
