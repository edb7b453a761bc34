"""What trainers ask of an optimizer beyond a step: a state that one rank alone may fetch, norms and skips to report.

Decides nothing about the algorithm. `DistMuon` inherits it; the integrations and the trainers themselves call it.

[Note: who may ask for the state] `state_dict` gathers the shards, so all ranks must call it. A trainer that lets one
rank save calls `consolidate_state_dict` on all ranks first; from then to the next step or load `state_dict` answers
from what was gathered, on any rank, without talking to others. A rank that asks alone without it is told so: before
anything is gathered the ranks call the roll in the group's store, which no other collective waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmuon import guards
from distmuon.collectives import DataParallelGroup
from distmuon.guards import Verdict


class TrainerFace(torch.optim.Optimizer):
    """Base of `DistMuon`; the annotated attributes are its own."""

    group: DataParallelGroup
    _grad_norm: Tensor | None
    _skipped: Tensor | None
    _verdict: Verdict | None
    _sync: bool
    _consolidated: dict[int, dict[str, Tensor]] | None = None
    _skips_seen = 0

    def reduce_gradients(self, **_ignored: object) -> None:
        raise NotImplementedError

    def consolidate_state_dict(self) -> None:
        """Gather the whole state on the CPU of every rank, for later calls of `state_dict`. Collective.

        Every rank keeps it to the next step or load: as many bytes as all ranks' state together.
        """
        self._consolidated = None
        state = self.state_dict()["state"]
        if any(state.values()):
            self._consolidated = state

    def _consolidated_state(self, packed: dict[str, Any]) -> dict[str, Any] | None:
        """`packed` with the consolidated state, or None once all ranks have come to gather it."""
        if self._consolidated is not None:
            return {"state": dict(self._consolidated), "param_groups": packed["param_groups"]}
        if missing := self.group.missing_ranks("state_dict"):
            raise guards.asked_alone(self.group.dp_rank, missing)
        return None

    def set_requires_gradient_sync(self, requires: bool) -> None:
        """Whether the following backwards end an optimizer step; `no_sync` for callers that hold no context open.

        With False for every backward the reduction starts in `reduce_gradients`, with no overlap.
        """
        self._sync = requires

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "layout"):
            raise guards.late_group()
        super().add_param_group(param_group)

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """DeepSpeed asks at the last micro-batch which gradients it must average: none, that is done here."""
        self.reduce_gradients()
        return [], {}

    @property
    def _global_grad_norm(self) -> Tensor | None:
        """DeepSpeed's name for the norm of the last averaged gradient before clipping; 0-dim, on the device."""
        return self._grad_norm

    @property
    def overflow(self) -> bool:
        """DeepSpeed's name for a step that was skipped since the last question. Reads the device."""
        skips, before = int(self._skipped) if self._skipped is not None else 0, self._skips_seen
        self._skips_seen = skips
        return skips > before
