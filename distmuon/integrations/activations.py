"""What a forward shows: the largest attention logits of transformers' models, and the size of blocks' outputs.

This module decides how a forward is watched; it changes nothing. Attention modules of transformers call a function from
a registry, `ALL_ATTENTION_FUNCTIONS`. While the model's forward runs, the registry's entry is a function that first
computes logits of its own, without gradients, and then calls the real one. Nothing is read on the host before `read`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import problem

_MOST_LOGITS = 1 << 24  # computed at a time


class AttentionLogits:
    """The largest attention logit of every head, of all forwards of `model` since the last `clear`.

    `model`: a transformers model, or a module that holds one. Logits are ``scaling * q @ k`` before the softmax, of the
    pairs that attention sees. They are computed a second time, at the cost of a half of attention's forward, while
    `watching` is true. Raises `ValueError` for a model without attention of transformers.
    """

    def __init__(self, model: nn.Module, *, watching: bool = True) -> None:
        self.watching = watching
        self.modules = {module: name for name, module in model.named_modules() if registry_of(module) is not None}
        if not self.fits(model):
            raise problem(
                type(model).__name__,
                found="found no attention module of transformers",
                needed="attention that calls transformers' ALL_ATTENTION_FUNCTIONS is needed",
                cure="pass the transformers model",
            )
        self._largest: dict[nn.Module, Tensor] = {}
        self._replaced: list[tuple[Any, str, Any]] = []
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True, prepend=True)  # the last that came leaves first

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether `model` has attention that can be watched."""
        return any(registry_of(module) is not None for module in model.modules())

    def clear(self) -> None:
        self._largest = {}

    def of(self, module: nn.Module) -> Tensor | None:
        """This rank's largest logits by head, (heads,) float32 on the device; None if no forward has run."""
        return self._largest.get(module)

    def read(self) -> dict[str, float]:
        """This rank's largest logit of each attention module, by name, and clear. Waits for the device."""
        found = {self.modules[module]: float(largest.max()) for module, largest in self._largest.items()}
        self.clear()
        return found

    def _begin(self, model: nn.Module, _: Any) -> None:
        self._end()
        if not (self.watching and torch.is_grad_enabled()):
            return
        names = {(id(registry), name): registry for registry, name in map(_entry, self.modules)}
        for (_number, name), registry in names.items():
            attention = registry.get(name)
            registry[name] = self._watched(attention)
            self._replaced.append((registry, name, attention))

    def _end(self, *_: Any) -> None:
        for registry, name, attention in self._replaced:
            del registry[name]  # which uncovers the entry of all registries
            if attention is not None and registry.get(name) is not attention:
                registry[name] = attention
        self._replaced = []

    def _watched(self, attention: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            if module in self.modules:
                with torch.no_grad():
                    found = largest_logits(query, key, mask, causal=getattr(module, "is_causal", True), **options)
                before = self._largest.get(module)
                self._largest[module] = found if before is None else torch.maximum(before, found)
            real = attention or sys.modules[type(module).__module__].eager_attention_forward
            return real(module, query, key, value, mask, **options)

        return call


def largest_logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **_ignored: Any,
) -> Tensor:
    """The largest logit of each head, (heads,) float32.

    `query` (B, heads, n, d), `key` (B, key heads, m, d). `mask`: (B, 1 or heads, n, m), True or 0 where a query sees a
    key; or (B, m), True for the keys that are no padding; None: all, or those before it if `causal`.
    """
    batch, heads, n, size = query.shape
    groups, m = heads // key.size(1), key.size(2)
    keys = key.mT.unsqueeze(2)  # (B, key heads, 1, d, m)
    causal = causal if is_causal is None else is_causal
    rows = max(1, _MOST_LOGITS // max(1, batch * heads * m))
    found = torch.full((heads,), float("-inf"), device=query.device)
    for start in range(0, n, rows):
        part = query[:, :, start : start + rows]
        grouped = part.reshape(batch, key.size(1), groups, part.size(2), size)
        logits = (grouped @ keys).float().mul_(size**-0.5 if scaling is None else scaling)
        logits = logits.reshape(batch, heads, part.size(2), m)
        if mask is not None and mask.ndim == 4:
            seen = mask[:, :, start : start + rows, :m]
            logits = logits.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen
        elif causal and n > 1:
            at = torch.arange(start, start + part.size(2), device=query.device).unsqueeze(1) + m - n
            other = torch.arange(m, device=query.device)
            hidden = other > at
            if sliding_window is not None:
                hidden = hidden | (other <= at - sliding_window)
            logits = logits.masked_fill(hidden, float("-inf"))
        if mask is not None and mask.ndim == 2:
            logits = logits.masked_fill(~mask[:, None, None, :m].bool(), float("-inf"))
        found = torch.maximum(found, logits.amax(dim=(0, 2, 3)))
    return found


class OutputRms:
    """The root mean square of the outputs of `model`'s blocks, of all forwards since the last `clear`.

    Blocks are the members of every `nn.ModuleList` of two modules or more that return a tensor, or a tuple that begins
    with one. A size that grows from step to step is the paper's sign of missing weight decay (arXiv 2502.16982, 2.2),
    and bfloat16 loses digits of what is added to a large sum. `watching`: whether forwards count.
    """

    def __init__(self, model: nn.Module, *, watching: bool = True) -> None:
        self.watching = watching
        self._squares: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) > 1:
                for number, block in enumerate(module):
                    block.register_forward_hook(self._hook(f"{name}.{number}"))

    def _hook(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if self.watching and torch.is_grad_enabled() and isinstance(first, Tensor):
                with torch.no_grad():
                    self._squares.setdefault(name, []).append(first.float().square().mean())

        return see

    def clear(self) -> None:
        self._squares = {}

    def read(self) -> dict[str, float]:
        """This rank's RMS of each block, by name, and clear. Waits for the device."""
        found = {name: float(torch.stack(squares).mean().sqrt()) for name, squares in self._squares.items()}
        self.clear()
        return found


def registry_of(module: nn.Module) -> Any:
    """The registry that an attention module calls, None for any other module."""
    if getattr(getattr(module, "config", None), "_attn_implementation", None) is None:
        return None
    if not any(hasattr(module, name) for name in ("q_proj", "c_attn", "kv_b_proj", "qkv_proj", "query_key_value")):
        return None
    return getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)


def _entry(module: nn.Module) -> tuple[Any, str]:
    config: Any = module.config
    return registry_of(module), config._attn_implementation
