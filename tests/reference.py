"""The oracle: plain Muon and AdamW in one process, on whole matrices, in loops. It shares no line with distmuon.

Given each rank's micro-batches it computes what data-parallel training means, the mean gradient, with nothing but
autograd and applies the published formulas. `tests/unit/test_reference.py` holds it against torch's Muon and AdamW.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]  # a parameter that got no gradient on any rank is absent


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, rounded once: 16-bit products on some CPUs take 60 times as long as those in float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).to(a.dtype)


def newton_schulz(update: Tensor, steps: int) -> Tensor:
    """Keller Jordan's quintic (kellerjordan.github.io/posts/muon) on one (m, n) matrix, in the matrix's own dtype."""
    x: Tensor = update.mT if update.shape[0] > update.shape[1] else update
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = _product(x, x.mT)
        x = 3.4445 * x + _product(-4.7750 * gram + _product(2.0315 * gram, gram), x)
    return x.mT if update.shape[0] > update.shape[1] else x


class Reference:
    """The weights that a single process would have.

    `rules` {fqn: "muon" or "adamw"}; `splits` {fqn: (sizes, dim)} of fused weights; `stacks` names (E, m, n) weights.
    `own` {fqn: {"lr" or "weight_decay": number}}, empty at first: what goes before the numbers of the rule.
    `normuon_beta2`: NorMuon, except for the weights in `plain`.
    The model keeps its dtype; weights and state are held in `dtype` and copied into it. `ns_dtype`: of Newton-Schulz.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, str],
        *,
        splits: Mapping[str, tuple[Sequence[int], int]] | None = None,
        stacks: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
        ns_dtype: torch.dtype | None = None,
        max_norm: float | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr: float | None = None,
        adamw_eps: float = 1e-8,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_weight_decay: float | None = None,
        normuon_beta2: float | None = None,
        plain: Iterable[str] = (),
    ) -> None:
        self.model = copy.deepcopy(model)
        self.params = {fqn: p for fqn, p in self.model.named_parameters() if p.requires_grad}
        assert set(rules) == set(self.params), set(rules) ^ set(self.params)
        self.rules, self.splits, self.stacks = dict(rules), dict(splits or {}), set(stacks)
        self.weights = {fqn: p.detach().to(dtype, copy=True).contiguous() for fqn, p in self.params.items()}
        self.state: dict[str, dict[str, Any]] = {fqn: {} for fqn in self.params}
        self.dtype, self.ns_dtype = dtype, ns_dtype or dtype
        self.lr, self.weight_decay, self.momentum, self.nesterov = lr, weight_decay, momentum, nesterov
        self.ns_steps, self.adjust_lr_fn, self.max_norm = ns_steps, adjust_lr_fn, max_norm
        self.adamw_lr = lr if adamw_lr is None else adamw_lr
        self.adamw_weight_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
        self.betas, self.eps = adamw_betas, adamw_eps
        self.normuon_beta2, self.plain = normuon_beta2, set(plain)
        self.own: dict[str, dict[str, float]] = {}
        self.skipped_steps = 0

    def mean_gradients(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Sequence[Sequence[Any]]
    ) -> Gradients:
        """The mean over `batches[rank][micro]`; a rank without a gradient for a parameter counts as zeros."""
        total: Gradients = {}
        for micro_batches in batches:
            for batch in micro_batches:
                loss = loss_fn(self.model, batch) / len(micro_batches)
                grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
                for fqn, grad in zip(self.params, grads, strict=True):
                    if grad is not None:
                        total[fqn] = total.get(fqn, torch.zeros_like(self.weights[fqn])) + grad.to(self.dtype)
        return {fqn: grad / len(batches) for fqn, grad in total.items()}

    def step(self, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Sequence[Sequence[Any]]) -> Tensor:
        """One step on the mean gradient; returns its norm, before clipping."""
        return self.apply(self.mean_gradients(loss_fn, batches))

    @torch.no_grad()
    def apply(self, grads: Gradients) -> Tensor:
        """One step. A non-finite gradient anywhere: nothing changes. A parameter without a gradient is left alone."""
        norm = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum().sqrt()
        if not norm.isfinite():
            self.skipped_steps += 1
            return norm
        clip = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (float(norm) + 1e-6))
        for fqn, grad in grads.items():
            update = self._muon if self.rules[fqn] == "muon" else self._adamw
            update(self.weights[fqn], grad * clip, self.state[fqn], fqn)
            self.params[fqn].copy_(self.weights[fqn])
        return norm

    def _muon(self, weight: Tensor, grad: Tensor, state: dict[str, Any], fqn: str) -> None:
        mu = self.momentum
        state["momentum_buffer"] = mu * state.get("momentum_buffer", torch.zeros_like(grad)) + (1 - mu) * grad
        update = (1 - mu) * grad + mu * state["momentum_buffer"] if self.nesterov else state["momentum_buffer"]
        lr = self._number(fqn, "lr")
        weight.mul_(1 - lr * self._number(fqn, "weight_decay"))
        slices = zip(weight, update, strict=True) if fqn in self.stacks else [(weight.flatten(1), update.flatten(1))]
        parts = 0
        for w, u in slices:
            sizes, dim = self.splits.get(fqn, ([w.shape[0]], 0))
            for w_part, u_part in zip(w.split(list(sizes), dim), u.split(list(sizes), dim), strict=True):
                polar_factor = newton_schulz(u_part.to(self.ns_dtype), self.ns_steps).to(self.dtype)
                if self.normuon_beta2 is not None and fqn not in self.plain:
                    polar_factor = self._normuon(polar_factor, state.setdefault(f"rows of part {parts}", {}))
                parts += 1
                w_part.sub_(lr * self._scale(*w_part.shape) * polar_factor)

    def _normuon(self, polar_factor: Tensor, state: dict[int, float]) -> Tensor:
        """Each row over the root of the moving average of its mean square; then the norm of a polar factor."""
        m, n = polar_factor.shape
        assert self.normuon_beta2 is not None
        for row in range(m):
            mean_square = float(polar_factor[row].double().square().sum()) / n
            state[row] = self.normuon_beta2 * state.get(row, 0.0) + (1 - self.normuon_beta2) * mean_square
        by_rows = torch.stack([polar_factor[row].double() / (math.sqrt(state[row]) + 1e-8) for row in range(m)])
        return (by_rows * math.sqrt(min(m, n)) / by_rows.square().sum().sqrt()).to(polar_factor.dtype)

    def _number(self, fqn: str, key: str) -> float:
        of_rule: float = getattr(self, key if self.rules[fqn] == "muon" else f"adamw_{key}")
        return self.own.get(fqn, {}).get(key, of_rule)

    def _scale(self, m: int, n: int) -> float:
        return 0.2 * math.sqrt(max(m, n)) if self.adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1.0, m / n))

    def _adamw(self, weight: Tensor, grad: Tensor, state: dict[str, Any], fqn: str) -> None:
        beta1, beta2 = self.betas
        t = state["step"] = state.get("step", 0) + 1
        state["exp_avg"] = beta1 * state.get("exp_avg", torch.zeros_like(grad)) + (1 - beta1) * grad
        state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", torch.zeros_like(grad)) + (1 - beta2) * grad.square()
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + self.eps
        lr = self._number(fqn, "lr")
        weight.mul_(1 - lr * self._number(fqn, "weight_decay"))
        weight.sub_(lr * (state["exp_avg"] / (1 - beta1**t)) / denominator)
