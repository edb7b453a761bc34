"""Telemetry of one step: how large its updates are, and the singular values of what Newton-Schulz reads and writes.

This module decides what is measured, where, and how the ranks' parts become one record; it changes nothing. A matrix is
measured on its owner, the only rank that has it whole. The owner has the polar factor O and the momentum U anyway; the
masters W are gathered for this step through the routes of the exchange, in float32, and counted as stage ``telemetry``.
AdamW's elements are measured where they lie. Steps without telemetry do not come here.

A parameter's numbers are sums over its logical matrices and its pieces, so the ranks' parts are simply added.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor

from distmuon.comm.agreement import in_each_group
from distmuon.comm.group import DataParallelGroup
from distmuon.layout.layout import Layout, PlacedUnit
from distmuon.math import rules, spectra
from distmuon.step.matrix_exchange import MatrixExchange
from distmuon.step.storage import BucketStorage

STAGE: Final = "telemetry"
_SQUARES = ("update", "weight")
_MEANS = ("matrices", "residual", "momentum_entropy", "update_entropy", "weight_entropy")
_SPECTRA = ("update_singular_values", "weight_singular_values")
_SIZES = {
    **dict.fromkeys(_SQUARES, 1),
    **dict.fromkeys(_MEANS, 1),
    **dict.fromkeys(_SPECTRA, len(spectra.QUANTILES)),
}


class Telemetry:
    """What one step leaves behind, on this rank. `present`: whether each parameter has a gradient in this step."""

    def __init__(
        self,
        layout: Layout,
        param_groups: Sequence[dict[str, Any]],
        group_of: Sequence[int],
        present: Sequence[bool],
        device: torch.device,
    ) -> None:
        self._layout = layout
        self._param_groups = param_groups
        self._group_of = group_of
        self._present = present
        self._device = device
        self._sums: dict[int, dict[str, Tensor]] = {}

    def weights(self, storage: BucketStorage, exchange: MatrixExchange, me: int) -> None:
        """Measure the bucket's masters before the update changes them. Collective over the exchange's ranks."""
        pieces = [storage.master_of(piece) for piece in storage.muon]
        exchange32 = exchange.in_dtype(torch.float32)
        stacks = exchange32.new_stacks()
        stacks = exchange32.start_gather(pieces, stacks, exchange32.places(stacks), stage=STAGE).wait()
        del pieces
        for key, stack in stacks.items():
            for placed, matrix in zip(exchange.units[key], stack):
                if placed.workers[0] == me and self._present[placed.param]:
                    self._weight(placed, matrix)
        for piece in storage.adamw:
            if not piece.segment.replica:
                self._add(piece.segment.param, weight=_square_sum(storage.master_of(piece)))

    def _weight(self, placed: PlacedUnit, matrix: Tensor) -> None:
        self._add(placed.param, weight=_square_sum(matrix))
        for block in _blocks(placed, matrix):
            values = spectra.singular_values(block)
            entropy, quantiles = spectra.svd_entropy(values), spectra.quantiles(values)
            self._add(placed.param, weight_entropy=entropy, weight_singular_values=quantiles)

    def polar_factor(self, placed: PlacedUnit, momentum: Tensor, polar: Sequence[Tensor]) -> None:
        """Measure a matrix on its owner: `momentum` (m, n) before Newton-Schulz, `polar` its column blocks after."""
        if not self._present[placed.param]:
            return
        adjust = self._param_groups[self._group_of[placed.param]]["adjust_lr_fn"]
        for before, after in zip(_blocks(placed, momentum), polar):
            values = spectra.singular_values(after)
            scale = rules.lr_scale(after.size(0), after.size(1), adjust)
            self._add(
                placed.param,
                update=scale**2 * _square_sum(after),
                matrices=torch.ones((), dtype=torch.float64, device=self._device),
                residual=spectra.orthogonality_residual(values),
                momentum_entropy=spectra.svd_entropy(spectra.singular_values(before)),
                update_entropy=spectra.svd_entropy(values),
                update_singular_values=spectra.quantiles(values),
            )

    def adamw_updates(self, storage: BucketStorage) -> None:
        """Measure what AdamW has just added to this rank's elements, from the state that it left."""
        for piece in storage.adamw:
            if piece.segment.replica or not self._present[piece.segment.param]:
                continue
            param_group = self._param_groups[self._group_of[piece.segment.param]]
            (beta1, beta2), state = param_group["betas"], piece.state
            step = state["step"].to(torch.float64)
            mean = state["exp_avg"] / (1 - beta1**step)
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt()
            self._add(piece.segment.param, update=_square_sum(mean / (root + param_group["eps"])))

    def record(self, groups: Sequence[DataParallelGroup]) -> dict[str, dict[str, Any]]:
        """The numbers of every parameter of the ranks' groups, by name. Waits for the device. Collective."""
        packed = {param: torch.cat([sums[key].reshape(-1) for key in _SIZES]) for param, sums in self._sums.items()}
        rows = torch.stack(list(packed.values())).tolist() if packed else []
        mine, found = dict(zip(packed, rows)), dict[int, list[float]]()

        def add_up(number: int, group: DataParallelGroup) -> None:
            here = {param: row for param, row in mine.items() if self._layout.specs[param].group == number}
            for part in group.gather_objects(here, stage=STAGE):
                for param, row in part.items():
                    found[param] = [a + b for a, b in zip(found.get(param, [0.0] * len(row)), row)]

        in_each_group(groups, add_up, stage=STAGE)
        return {self._layout.specs[param].fqn: self._described(param, found[param]) for param in sorted(found)}

    def _described(self, param: int, row: list[float]) -> dict[str, Any]:
        spec = self._layout.specs[param]
        left = iter(row)
        sums = {key: list(islice(left, size)) for key, size in _SIZES.items()}
        update_rms, weight_rms = ((sums[key][0] / spec.numel) ** 0.5 for key in _SQUARES)
        step = rules.scalar(self._param_groups[self._group_of[param]]["lr"]) * update_rms
        numbers = {
            "rule": spec.rule,
            "shape": list(spec.shape),
            "update_rms": update_rms,
            "weight_rms": weight_rms,
            "update_to_weight": step / weight_rms if weight_rms else None,
        }
        if not spec.matrices or not self._present[param]:
            return numbers
        matrices = sums["matrices"][0]
        means = {key: sums[key][0] / matrices for key in _MEANS[1:]}
        return {**numbers, **means, **{key: [value / matrices for value in sums[key]] for key in _SPECTRA}}

    def _add(self, param: int, **parts: Tensor) -> None:
        if param not in self._sums:
            zeros = {key: torch.zeros(size, dtype=torch.float64, device=self._device) for key, size in _SIZES.items()}
            self._sums[param] = zeros
        for key, value in parts.items():
            self._sums[param][key] += value


def _square_sum(values: Tensor) -> Tensor:
    return values.to(torch.float64).square().sum()


def _blocks(placed: PlacedUnit, matrix: Tensor) -> Sequence[Tensor]:
    """The logical matrices of a unit (m, n)."""
    widths = placed.unit.column_split
    return torch.split(matrix, list(widths), dim=1) if widths else (matrix,)
