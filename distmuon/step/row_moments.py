"""NorMuon's second moments of the rows of matrices, for one bucket (arXiv 2510.05491).

This module decides where the moments live and how they stay equal on all ranks; `math.rules` has the formulas. A row's
moment is a number for a whole row of a polar factor, so it belongs to no element of the parameter and cannot be cut
with it. Every rank keeps the moments of all rows, 4 bytes for each. The owner of a matrix computes its new moments, and
one all-reduce a bucket sends them to all ranks: each number comes from its owner and is added to zeros, so all ranks
have the owner's bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.layout.layout import PlacedUnit
from distmuon.math import rules
from distmuon.step.verdict import Decision


class RowMoments:
    """The moments of a bucket's rows; empty where no parameter of the bucket is under NorMuon.

    `moments`: (rows,) float32 for each parameter under NorMuon, the rows of its matrices in order.
    """

    def __init__(self, moments: Mapping[int, Tensor], group: DataParallelGroup) -> None:
        self._moments = moments
        self._group = group
        self._sizes = [moment.numel() for moment in moments.values()]
        self._new: dict[int, Tensor] = {}  # views of what is sent
        self._pending: Pending | None = None

    def normalize(self, units: Sequence[PlacedUnit], polar: Tensor, beta2: float) -> Tensor:
        """Normalize the rows of polar factors (B, m, n), those of `units`, by their new moments; float32."""
        rows = polar.size(1)
        places = [(placed.param, placed.unit.offset // placed.unit.columns) for placed in units]
        old = torch.stack([self._moments[param][first : first + rows] for param, first in places])
        new = rules.row_second_moment(polar, old, beta2)
        for (param, first), placed, moment in zip(places, units, new):
            if placed.workers[0] == self._group.dp_rank:
                self._new[param][first : first + rows] = moment
        return rules.normalized_rows(polar, new)

    def begin(self) -> None:
        """Make room for the new moments of a step."""
        if self._moments:
            self._sent = next(iter(self._moments.values())).new_zeros(sum(self._sizes))
            self._new = dict(zip(self._moments, torch.split(self._sent, self._sizes)))

    def start_sum(self) -> None:
        """Start to send the owners' new moments to all ranks."""
        if self._moments:
            self._pending = self._group.start_all_reduce(self._sent, stage="row_moments")

    def finish(self, decisions: Sequence[Decision | None]) -> None:
        """Write the new moments of the parameters that had a gradient. `decisions`: by parameter, see `Step`."""
        if self._pending is not None:
            self._pending.wait()
            for param, new in self._new.items():
                decision = decisions[param]
                if decision is not None:
                    decision.write(self._moments[param], new)
            self._pending, self._new = None, {}
            del self._sent
