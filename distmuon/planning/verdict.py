"""Three answers from a plan: whether it fits, what Muon costs of a training step, and what it adds to the traffic.

This module decides how a plan's figures become answers. Forward and backward are not planned: they are counted as 6
floating-point operations for each parameter that a token uses and each token, at a stated share of the peak. Numbers
only; the wording is the command line's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distmuon.errors import problem
from distmuon.layout.routing import ParamSpec
from distmuon.options import is_number
from distmuon.planning.counts import HeldBytes
from distmuon.planning.plan import Plan
from distmuon.planning.step_time import Hardware

MFU = 0.4  # assumption: the share of the peak that forward and backward reach


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answers for one `Plan`. Times are estimates in seconds, None without hardware."""

    held: HeldBytes  # of the fullest rank, without activations
    hbm: float | None  # bytes of a rank's memory; None: not known
    tokens: int  # of a step, on all ranks together
    num_ranks: int
    active_elements: int  # parameters that a token uses
    model_s: float | None  # forward and backward of a rank
    optimizer_s: float | None  # the estimated step of the optimizer
    adamw_s: float | None  # the same of AdamW; None where it was not planned
    sent: int  # bytes that the busiest rank sends in a step, with FSDP2's own
    adamw_sent: int | None
    faster: str | None  # the compared way of Muon with the shortest estimated step, if it is shorter than this one

    @property
    def fits(self) -> bool | None:
        """Whether parameters, gradients, state and the step's own memory fit; None if `hbm` is not known."""
        return None if self.hbm is None else self.held.total <= self.hbm

    @property
    def tokens_per_rank(self) -> float:
        return self.tokens / self.num_ranks

    @property
    def overhead(self) -> float | None:
        """How much longer a training step is than with AdamW, as a share of AdamW's."""
        if self.model_s is None or self.optimizer_s is None or self.adamw_s is None:
            return None
        return (self.optimizer_s - self.adamw_s) / (self.model_s + self.adamw_s)

    @property
    def traffic(self) -> float | None:
        """`sent` relative to AdamW's; None where AdamW was not planned or sends nothing."""
        return self.sent / self.adamw_sent if self.adamw_sent else None

    def to_dict(self) -> dict[str, object]:
        """All answers as a dict for JSON."""
        names = [name for name in self.__slots__ if name != "held"]
        found = {name: getattr(self, name) for name in (*names, "fits", "tokens_per_rank", "overhead", "traffic")}
        return {"held_bytes": self.held.total, **found}


def judge(
    plan: Plan,
    *,
    hardware: Hardware | None,
    tokens: int,
    hbm: float | None = None,
    mfu: float = MFU,
    active_elements: int | None = None,
) -> Verdict:
    """Answer for `plan`.

    Args:
        hardware: the row that the plan was made with; without it there are no times.
        tokens: of a step, on all ranks together.
        hbm: bytes of a rank's memory; None: those of `hardware`.
        mfu: share of the peak that forward and backward are assumed to reach.
        active_elements: parameters that a token uses; None: all.
    """
    for name, value, most in (("tokens", tokens, float("inf")), ("mfu", mfu, 1.0), ("hbm", hbm, float("inf"))):
        if value is not None and not (is_number(value) and 0 < value <= most):
            needed = "a positive number is needed" if most > 1 else "a share above 0 and at most 1 is needed"
            raise problem(name, found=f"found {value!r}", needed=needed, cure=f"correct {name}")
    num_ranks = plan.dp_size if plan.given is None else plan.given.mesh.num_ranks
    own = 0 if plan.given is None else sum(plan.given.fsdp2.sent_bytes.values())
    adamw = next((other for other in plan.others if other.way == "adamw"), None)
    active = plan.num_elements if active_elements is None else active_elements
    return Verdict(
        held=plan.fullest,
        hbm=hbm if hbm is not None or hardware is None else hardware.hbm,
        tokens=tokens,
        num_ranks=num_ranks,
        active_elements=active,
        model_s=None if hardware is None else 6 * active * tokens / (mfu * hardware.flops * num_ranks),
        optimizer_s=plan.time.step_s if plan.time else None,
        adamw_s=adamw.time.step_s if adamw and adamw.time else None,
        sent=plan.sent + own,
        adamw_sent=None if adamw is None else adamw.sent + own,
        faster=_faster(plan),
    )


def active_elements(specs: Iterable[ParamSpec], experts_per_token: int) -> int:
    """The parameters that a token uses where `experts_per_token` of each stack of experts are chosen for it.

    A stack is a Muon weight (E, m, n) with more experts than that; in another model every parameter counts.
    """
    total = 0
    for spec in specs:
        is_stack = len(spec.shape) == 3 and spec.rule == "muon" and spec.shape[0] > experts_per_token
        total += spec.numel * experts_per_token // spec.shape[0] if is_stack else spec.numel
    return total


def _faster(plan: Plan) -> str | None:
    times = {way.way: way.time.step_s for way in (plan, *plan.others) if way.time and way.way != "adamw"}
    best = min(times, key=lambda way: times[way], default=plan.way)
    return None if best == plan.way or times[best] >= times[plan.way] else best
