"""Heads of attention in transformers' models: QK-clip, and Muon head by head.

This module decides which rows of an attention module's projections belong to which head.

[Note: rows of heads] QK-clip (arXiv 2507.20534, section 2.1) multiplies the logits of a head by g = min(1, t / S),
where S is the head's largest logit and t the threshold:

    q_proj, k_proj      a query's and its key's rows by sqrt(g); with grouped keys, g is the smallest of the group's
    latent attention    rows without rotation of q and k by sqrt(g); the rotated rows of q by g, since all heads share
                        the rotated key
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import problem
from distmuon.integrations.activations import AttentionLogits, registry_of
from distmuon.layout.routing import Route
from distmuon.optimizer import DistMuon


class QKClip:
    """QK-clip: before each `optimizer.step`, heads whose largest logit was above `threshold` have q and k scaled down.

    Make it once, after `DistMuon`, of the model that trains; then nothing else changes in the loop. The weights are
    scaled in the step, in their masters (`DistMuon.scale_rows`); the largest logits of all ranks are agreed on by an
    all-reduce of 4 bytes a head. Source: arXiv 2507.20534, section 2.1. Raises `ValueError` for attention that
    normalizes q and k, which needs no clip, and for projections that it does not know.
    """

    def __init__(self, model: nn.Module, optimizer: DistMuon, threshold: float = 100.0) -> None:
        if not threshold > 0:
            raise problem("threshold", found=f"found {threshold}", needed="a logit above 0 is needed", cure="pass 100")
        self.threshold = threshold
        self.logits = AttentionLogits(model)
        self._optimizer = optimizer
        groups = optimizer.param_groups
        name_of = {param: name for group in groups for name, param in zip(group["param_names"], group["params"])}
        self._heads = [(module, _Heads(module, name, name_of)) for module, name in self.logits.modules.items()]
        optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *_: Any) -> None:
        """Give the optimizer the factors of this step. Reads nothing on the host."""
        first = next((largest for module, _ in self._heads if (largest := self.logits.of(module)) is not None), None)
        device = self._optimizer.param_groups[0]["params"][0].device if first is None else first.device
        parts = []
        for module, heads in self._heads:
            largest = self.logits.of(module)
            if largest is not None and largest.numel() != heads.count:
                raise problem(
                    f"QKClip: {self.logits.modules[module]}",
                    found=f"found {largest.numel()} heads in forward",
                    needed=f"all {heads.count} heads of its config are needed on every rank",
                    cure="leave QKClip out under tensor parallelism",
                )
            parts.append(torch.full((heads.count,), float("-inf"), device=device) if largest is None else largest)
        self.logits.clear()
        whole = self._optimizer.group.start_all_reduce(torch.cat(parts), stage="qk_clip", largest=True).wait()
        ratio = torch.where(whole.isfinite() & (whole > self.threshold), self.threshold / whole, 1.0)
        for (_, heads), part in zip(self._heads, ratio.split([heads.count for _, heads in self._heads])):
            self._optimizer.scale_rows(heads.factors(part))


class _Heads:
    """Which rows of an attention module's projections belong to which head; see [Note: rows of heads]."""

    def __init__(self, module: nn.Module, name: str, name_of: dict[Tensor, str]) -> None:
        self._name_of = name_of
        self._where = f"QKClip: {name}"
        config: Any = module.config
        self.count = int(config.num_attention_heads)
        known = {key: getattr(module, key, None) for key in ("q_proj", "q_b_proj", "k_proj", "kv_b_proj")}
        self._query: Any = known["q_proj"] or known["q_b_proj"]
        self._key: Any = known["k_proj"] or known["kv_b_proj"]
        if getattr(module, "q_norm", None) is not None:
            raise problem(
                self._where,
                found="attention normalizes q and k",
                needed="their weights must set the size of logits",
                cure="leave QKClip out: normalized logits are bounded",
            )
        if not isinstance(self._query, nn.Linear) or not isinstance(self._key, nn.Linear):
            raise problem(
                self._where,
                found=f"found the modules {', '.join(key for key, _ in module.named_children())}",
                needed="q_proj and k_proj, or q_b_proj and kv_b_proj, are needed, as nn.Linear",
                cure="scale the rows by DistMuon.scale_rows",
            )
        self._is_latent = known["k_proj"] is None
        if self._is_latent:
            self._plain, self._rotated = int(config.qk_nope_head_dim), int(config.qk_rope_head_dim)
            self._values = int(config.v_head_dim)
        else:
            self._plain, self._rotated = self._query.out_features // self.count, 0
            self._key_heads = int(config.num_key_value_heads)

    def factors(self, ratio: Tensor) -> dict[str, Tensor]:
        """The factors of rows by parameter, for `ratio` (heads,) of the logits."""
        if self._is_latent:
            root, one = ratio.sqrt(), torch.ones_like(ratio)
            query = _rows((root, self._plain), (ratio, self._rotated))
            key = _rows((root, self._plain), (one, self._values))
        else:
            ratio = ratio.view(self._key_heads, -1).amin(dim=1)
            key = _rows((ratio.sqrt(), self._plain))
            query = _rows((ratio.sqrt().repeat_interleave(self.count // self._key_heads), self._plain))
        found = {}
        for projection, rows in ((self._query, query), (self._key, key)):
            for param in (projection.weight, projection.bias):
                if param is not None:
                    found[self._named(param)] = rows
        return found

    def _named(self, param: Tensor) -> str:
        if param not in self._name_of:
            raise problem(
                self._where,
                found="its projections are not trained by this optimizer",
                needed="QK-clip scales the weights that the optimizer updates",
                cure="leave QKClip out, or unfreeze the projections",
            )
        return self._name_of[param]


def head_routes(model: nn.Module) -> list[Route]:
    """Routes that let Muon orthogonalize the query, key and value weights of a transformers model head by head.

    ``DistMuon(model, routes=head_routes(model))``. The update is the one of separate weights, one a head; nothing more
    travels. Heads are read off each attention module's config, which must declare both their number and their size.
    Raises `ValueError` where it does not, or where a weight's rows are not that many heads.
    """
    found = []
    for module, name, projection, parts in _projections(model):
        weight = getattr(module, projection).weight
        if sum(parts) != weight.shape[0]:
            raise problem(
                f"head_routes: {name}.{projection}",
                found=f"found {weight.shape[0]} rows, and heads of {sum(parts)} rows in its config",
                needed="the config's heads must fill the weight",
                cure="write distmuon.Route(..., heads=) by hand",
            )
        found.append(Route(f"{name}.{projection}.weight", "muon", split=parts))
    if not found:
        raise problem(
            type(model).__name__,
            found="found no attention with q_proj, k_proj and v_proj whose config has num_attention_heads and head_dim",
            needed="both factors must be declared",
            cure="write distmuon.Route(..., heads=) by hand",
        )
    return found


def _projections(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, list[int]]]:
    """(attention module, its name, a projection's name, the rows of its logical matrices)."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if registry_of(module) is None or config is None:
            continue
        heads = getattr(config, "num_attention_heads", None)
        latent = getattr(config, "qk_nope_head_dim", None)
        if heads and latent and hasattr(module, "kv_b_proj"):
            query = "q_proj" if getattr(module, "q_proj", None) is not None else "q_b_proj"
            yield module, name, query, [latent + config.qk_rope_head_dim] * heads
            yield module, name, "kv_b_proj", [latent, config.v_head_dim] * heads
            continue
        size, key_heads = getattr(config, "head_dim", None), int(getattr(config, "num_key_value_heads", heads) or 0)
        if heads and size and all(hasattr(module, f"{letter}_proj") for letter in "qkv"):
            yield module, name, "q_proj", [size] * heads
            yield module, name, "k_proj", [size] * key_heads
            yield module, name, "v_proj", [size] * key_heads


def _rows(*parts: tuple[Tensor, int]) -> Tensor:
    """Each head's rows: for each part that many rows with the head's factor."""
    return torch.cat([factor.unsqueeze(1).expand(-1, size) for factor, size in parts], dim=1).reshape(-1)
