"""A dropped optimizer is gone by reference count alone, with all that it held but the parameters."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.weak import WeakIdKeyDictionary

import distmuon
from tests.standing import Standing, loss_fn, make_batch
from tests.training import backward, digest, make, train, weights


@contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _held(optimizer: Any) -> WeakIdKeyDictionary:
    """The storages that an optimizer must not outlive: gradients, momentum, moments and masters beside parameters."""
    storages = WeakIdKeyDictionary()
    for bucket in optimizer._engine.storage.buckets:
        kept: list[Tensor | None] = [bucket.grad_shard, bucket.kept_master]
        kept += [bucket.grad_buffer.flat] if bucket.grad_buffer is not None else []
        kept += [tensor for piece in bucket.muon + bucket.adamw for tensor in piece.state.values()]
        for tensor in kept:
            if tensor is not None:
                storages[tensor] = True
    assert len(storages)
    return storages


def _uses() -> dict[str, Callable[[dist.ProcessGroup | None, Any, Any], Any]]:
    """What users do before they drop an optimizer; what a use returns is dropped with it."""

    def nothing(group: dist.ProcessGroup, model: Any, optimizer: Any) -> None:
        return None

    def state_dict(group: dist.ProcessGroup, model: Any, optimizer: Any) -> None:
        optimizer.consolidate_state_dict()
        optimizer.load_state_dict(optimizer.state_dict())

    def refused(group: dist.ProcessGroup, model: Any, optimizer: Any) -> None:
        state = optimizer.state_dict()
        state["state"][0] = {"momentum_buffer": torch.zeros(3)}
        with pytest.raises(ValueError):
            optimizer.load_state_dict(state)
        with pytest.raises(ValueError):
            optimizer.clip_grad_norm_(-1.0)

    def half_a_step(group: dist.ProcessGroup, model: Any, optimizer: Any) -> None:
        backward(model, optimizer, [make_batch(9, 0, 0)])

    def scheduler(group: dist.ProcessGroup, model: Any, optimizer: Any) -> Any:
        made = [lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step), lr_scheduler.StepLR(optimizer, 1)]
        train(group, model, optimizer, [3])
        for one in made:
            one.step()
        return made

    def hooked(group: dist.ProcessGroup, model: Any, optimizer: Any) -> None:
        optimizer.register_step_post_hook(lambda *_: None)
        optimizer.register_state_dict_pre_hook(lambda _: None)
        train(group, model, optimizer, [3])

    uses = (nothing, state_dict, refused, half_a_step, scheduler, hooked)
    return {use.__name__: use for use in uses}


def _dropped(group: dist.ProcessGroup, use: str, options: dict[str, Any]) -> tuple[int, bool, str, str]:
    """How many tensors outlive the optimizer, whether it does itself, and the weights before and after."""
    model = Standing().bfloat16() if options.pop("bf16", False) else Standing()
    model, optimizer = make(group, model, **options)
    with _no_collector():
        train(group, model, optimizer, range(3))
        kept = _uses()[use](group, model, optimizer)
        before = digest(weights(model, optimizer))
        held, itself = _held(optimizer), weakref.ref(optimizer)
        del optimizer, kept
        alive, deadline = itself() is not None, time.monotonic() + 5
        while len(held) and time.monotonic() < deadline:  # gloo's thread lets go of what was on its way
            time.sleep(0.01)
        left = len(held)
        after = digest(dict(model.named_parameters()))
        loss_fn(model, make_batch(0, 0, 0)).backward()  # no hook of it is left
    return left, alive, before, after


@pytest.mark.parametrize("use", sorted(_uses()))
@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_dropped_optimizer_is_gone_without_the_collector(spawn, dp_size: int, use: str) -> None:
    """A cycle over a bound method once kept twelve bytes a parameter until the next run of the collector."""
    for left, alive, before, after in spawn(_dropped, dp_size, use=use, options={}):
        assert (left, alive) == (0, False)
        assert before == after


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"bf16": True, "master_format": "remainder"},
        {"momentum_dtype": torch.int8},
        {"release_grads": True},
        {"param_gather": "updates"},
        {"overlap": False},
        {"max_grad_norm": 1.0},
    ],
)
def test_so_it_is_with_every_option(spawn, options: dict[str, Any]) -> None:
    for left, alive, before, after in spawn(_dropped, 2, use="state_dict", options=options):
        assert (left, alive, before) == (0, False, after)


def _raised(group: dist.ProcessGroup, stage: str) -> tuple[int, bool]:
    """The optimizer is dropped after an error left it at some depth, once the error is gone."""
    model, optimizer = make(group)
    with _no_collector():
        train(group, model, optimizer, range(2))
        held, itself = _held(optimizer), weakref.ref(optimizer)
        try:
            if stage == "closure":
                optimizer.step(lambda: 1 / 0)
            elif stage == "backward":
                loss_fn(model, make_batch(0, 0, 0)).backward()
                optimizer.clip_grad_norm_("one")
            else:
                optimizer.param_groups[0]["lr"] = -1.0
                distmuon.verify_parameters(model, optimizer)
        except (ValueError, ZeroDivisionError):
            pass
        else:
            raise AssertionError("it did not raise")
        del optimizer
        return len(held), itself() is not None


@pytest.mark.parametrize("stage", ["closure", "backward", "verify"])
def test_an_error_that_is_over_keeps_nothing(spawn, stage: str) -> None:
    assert spawn(_raised, 2, stage=stage) == [(0, False)] * 2
