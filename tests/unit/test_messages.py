"""The messages of an exchange, played through on plain sets: what is sent is there, and arrives once where it must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import inf

import pytest
from hypothesis import given, settings

from distmuon.layout import layout as layouts
from distmuon.layout.layout import Layout, PlacedUnit, Segment, make_layout
from distmuon.layout.messages import Message, to_holders, to_workers
from distmuon.options import Options
from distmuon.planning.counts import count
from distmuon.planning.shapes import shape_table
from distmuon.planning.step_time import HopLoad
from tests.unit.test_layout import cuts

Way = Callable[[PlacedUnit, int], Iterator[Message]]
Elements = dict[int, set[int]]  # by rank, elements of a matrix


def _ends(placed: PlacedUnit, way: Way, node_size: int, held: Elements) -> tuple[Elements, list[Message]]:
    """What each rank has once all messages have arrived, hop by hop, and the messages."""
    messages = list(way(placed, node_size))
    for hop in range(max((message.hop for message in messages), default=-1) + 1):
        before = {rank: set(elements) for rank, elements in held.items()}
        for message in (message for message in messages if message.hop == hop):
            start = message.part.piece.param_offset + message.part.start
            elements = range(start, start + message.part.length)
            assert message.sender != message.receiver and elements and before[message.sender].issuperset(elements)
            there = held.setdefault(message.receiver, set())
            assert there.isdisjoint(elements), "sent twice, or to a rank that has it"
            there.update(elements)
    return held, messages


def _elements_of(pieces: Sequence[Segment]) -> Elements:
    found: Elements = {}
    for piece in pieces:
        found.setdefault(piece.rank, set()).update(range(piece.param_offset, piece.param_offset + piece.length))
    return found


@given(cuts())
@settings(max_examples=200, deadline=None)
def test_matrices_become_whole_and_results_return(layout: Layout) -> None:
    """In one hop under any placement; in two where matrices have one worker and nodes are of equal size."""
    node_size = layout.node_size
    for placed in layout.matrices:
        whole = set(range(placed.unit.offset, placed.unit.offset + placed.unit.numel))
        has_relays = len(placed.workers) == 1 and layout.dp_size % node_size == 0
        for relays in {0, node_size} if has_relays else {0}:
            held, messages = _ends(placed, to_workers, relays, _elements_of(placed.pieces))
            assert all(held[worker] == whole for worker in placed.workers)
            assert {message.hop for message in messages} <= ({0, 1} if relays else {0})
            owner = placed.workers[0]
            held, messages = _ends(placed, to_holders, relays, {worker: set(whole) for worker in placed.workers})
            assert all(held[rank] >= elements for rank, elements in _elements_of(placed.pieces).items())
            for message in messages if relays else ():
                inside = owner // node_size == message.receiver // node_size == message.sender // node_size
                assert inside == (message.hop == 0), "the cards in the second hop, except for the owner's own"


@given(cuts())
@settings(max_examples=100, deadline=None)
def test_the_planner_adds_up_these_messages(layout: Layout) -> None:
    """By bucket, hop and rank, with second hops that cost nothing; for nodes of 2 ranks, if the layout knows none."""
    node_size = layout.node_size if layout.node_size < layout.dp_size else 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "_SECOND_HOP", -inf)
        num_relays = [layout.relays_of(bucket.index) for bucket in layout.buckets]
        loads = count(layout, Options(), node_size=node_size)[1]
    for number, load in enumerate(loads):
        for hops, way in ((load.gather, to_workers), (load.scatter, to_holders)):
            wanted = [HopLoad(layout.dp_size) for _ in hops]
            for placed in (placed for placed in layout.matrices if placed.bucket == number):
                for hop, sender, receiver, part in way(placed, num_relays[number]):
                    wanted[hop].sent[sender] += part.length
                    wanted[hop].received[receiver] += part.length
                    if sender // node_size != receiver // node_size:
                        wanted[hop].far_sent[sender] += part.length
                        wanted[hop].far_received[receiver] += part.length
            assert hops == wanted and all(any(hop.sent) for hop in hops)


def test_each_card_of_a_node_takes_its_share() -> None:
    """A matrix on 4 nodes of 4: a quarter through each card of the owner's node, there and back; pieces of the node
    itself go directly, and no more leaves a node than in one hop."""
    pieces = tuple(Segment(0, 6400 * rank, 6400, rank, 0) for rank in range(16))
    unit = layouts.Unit(0, 320, 320)
    placed = PlacedUnit(0, 0, unit, 0, pieces, (6,), pieces)
    ways: tuple[Way, Way] = (to_workers, to_holders)
    for number, way in enumerate(ways):
        cards: Counter[int] = Counter()
        for message in way(placed, 4):
            if message.sender // 4 != message.receiver // 4:
                assert message.hop == number
                cards[(message.receiver, message.sender)[number]] += message.part.length
            elif message.part.length == 6400:
                assert message.hop == 0
        assert cards == {4: 19200, 5: 19200, 6: 19200, 7: 19200}
        assert sum(message.part.length for message in way(placed, 0)) == 15 * 6400


def test_two_hops_where_they_are_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only between equal nodes of several ranks, for matrices with one worker, and if they save what a hop costs."""
    specs = shape_table("llama-1b")

    def in_two(dp_size: int, node_size: int, **given) -> bool:
        return any(make_layout(specs, dp_size, node_size=node_size, **given).two_hops)

    assert in_two(16, 4)
    assert not in_two(16, 1) and not in_two(16, 16) and not in_two(18, 4)
    assert not in_two(16, 4, placement="replicated") and in_two(16, 4, packing="contiguous")
    monkeypatch.setattr(layouts, "_SECOND_HOP", inf)
    assert not in_two(16, 4)
