"""The telemetry of a run: every `log.telemetry_every` steps, what an update does and what forwards show.

The optimizer measures itself (docs/telemetry.md); this module adds the largest attention logits and the outputs of the
blocks in the same step's forwards. Decides nothing about training, and other steps pay nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

import distmuon
from distmuon.integrations.activations import AttentionLogits, OutputRms
from launch.ranks import Ranks


class Watch:
    """Watches the forwards of measured steps. `every`: 0 watches none. `compiled`: leave the model's graphs alone."""

    def __init__(self, model: nn.Module, every: int, *, compiled: bool) -> None:
        self._every = every
        self._watchers: dict[str, AttentionLogits | OutputRms] = {}
        if every and not compiled:
            self._watchers["output_rms"] = OutputRms(model, watching=False)
            if AttentionLogits.fits(model):
                self._watchers["attention_logits"] = AttentionLogits(model, watching=False)

    def begin(self, number: int) -> None:
        """Step `number`, counted from 1 at the optimizer's first, begins."""
        for watcher in self._watchers.values():
            watcher.watching = number % self._every == 0
            watcher.clear()  # a measured step that was skipped has left its forwards

    def record(self, optimizer: distmuon.DistMuon, ranks: Ranks) -> dict[str, Any] | None:
        """The fields of the step's record; None unless it was measured. Collective."""
        measured = optimizer.telemetry()
        if measured is None:
            return None
        fields: dict[str, Any] = {"parameters": measured}
        for name, watcher in self._watchers.items():
            by_rank = ranks.gather(watcher.read())
            fields[name] = {key: max(found[key] for found in by_rank if key in found) for key in by_rank[0]}
        return fields
