"""The same promises on CUDA and NCCL: parity on 1 to N GPUs, overlap, no host wait in `step`. Run: pytest -m gpu.

TF32 is off and the oracle runs on the same GPU, so that both multiply in float32 with the same kernels.
"""

from __future__ import annotations

import itertools
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

import distmuon
from tests.standing import Batch, Standing, loss_fn, make_batch
from tests.training import REL_UPDATE, REL_WEIGHTS, Weights, digest, errors, make, reference, state_tensors, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and NCCL"),
]
NUM_GPUS = torch.cuda.device_count()
SIZES = [size for size in (1, 2, 3, 4, 8) if size <= NUM_GPUS]
WAYS = list(itertools.product(("balanced", "contiguous"), ("owner", "replicated")))


def _main(rank: int, size: int, folder: str, fn: Any, kwargs: dict[str, Any]) -> None:
    torch.cuda.set_device(rank)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", rank)
    store = f"file://{folder}/rendezvous"
    limit = timedelta(seconds=120)
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=size, timeout=limit, device_id=device)
    torch.save(fn(dist.group.WORLD, device, **kwargs), Path(folder, f"result-{rank}"))
    dist.destroy_process_group()


def _on_gpus(fn: Any, size: int, **kwargs: Any) -> list[Any]:
    """What `fn(group, device, **kwargs)` returned on each of `size` GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_main, (size, folder, fn, kwargs), nprocs=size)
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(size)]


def _on(device: torch.device, batch: Batch) -> Batch:
    assert batch.image is not None
    return Batch(*(t.to(device) for t in (batch.tokens, batch.targets, batch.values, batch.image)))


def _train(group: dist.ProcessGroup, device: torch.device, steps: int, **options: Any) -> tuple[Weights, Any]:
    model, optimizer = make(group, Standing(seed=dist.get_rank(group)).to(device), **options)
    for step in range(steps):
        loss_fn(model, _on(device, make_batch(step, dist.get_rank(group), 0))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {fqn: weight.cpu() for fqn, weight in weights(model, optimizer).items()}, optimizer


def _parity(group: dist.ProcessGroup, device: torch.device) -> list[tuple[str, Weights]]:
    results = []
    for packing, placement in WAYS:
        for overlap in (True, False):
            ends, _ = _train(group, device, 5, packing=packing, placement=placement, overlap=overlap)
            results.append((digest(ends), ends))
    return results


def _oracle(dp_size: int, steps: int) -> dict[str, Tensor]:
    device = torch.device("cuda", 0)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    oracle = reference(Standing().to(device))
    for step in range(steps):
        oracle.step(loss_fn, [[_on(device, make_batch(step, rank, 0))] for rank in range(dp_size)])
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    return {fqn: weight.cpu() for fqn, weight in oracle.weights.items()}


@pytest.mark.parametrize("dp_size", SIZES)
def test_five_steps_equal_one_process(dp_size: int) -> None:
    """Every packing and placement; ranks equal to the bit. CUDA's atomics make embedding gradients vary by rounding."""
    wanted, start = _oracle(dp_size, 5), Standing().state_dict()
    by_rank = _on_gpus(_parity, dp_size)
    for number, way in enumerate(itertools.product(WAYS, (True, False))):
        assert len({results[number][0] for results in by_rank}) == 1, f"{way}: ranks end with different weights"
        of_weights, of_updates = errors(by_rank[0][number][1], wanted, start)
        print(f"\ndp_size {dp_size}, {way}: {of_weights[0]:.1e} of weights, {of_updates[0]:.1e} of update")
        assert of_weights[0] <= REL_WEIGHTS and of_updates[0] <= REL_UPDATE, (way, of_weights, of_updates)


SAME_BITS: list[dict[str, Any]] = [
    {},
    {"overlap": False},
    {"overlap": "forward"},
    {"release_grads": True},
    {"param_gather": "updates"},
    {"own_exchange_group": True},
    {"overlap": "forward", "release_grads": True, "param_gather": "updates", "own_exchange_group": True},
]


def _by_hand(group: dist.ProcessGroup, device: torch.device, case: dict[str, Any]) -> tuple[str, str]:
    """Gradients by hand: nothing in them varies from run to run, so no option of overlap may change a bit.

    From the third step on, a host synchronisation inside backward or `step` raises.
    """
    options = dict(case)
    if options.pop("own_exchange_group", False):
        options["exchange_group"] = dist.new_group()
    model, optimizer = make(group, Standing().to(device), ns_dtype=None, **options)
    for step in range(5):
        optimizer.synchronize()  # the weights are used outside a forward
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank(group))
        grads = [torch.randn(param.shape, generator=generator).to(device) for param in model.parameters()]
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        for param, grad in zip(model.parameters(), grads):
            if param.requires_grad:
                (param * grad).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
    state = {name: value.cpu() for name, value in state_tensors(optimizer).items()}
    return digest({fqn: weight.cpu() for fqn, weight in weights(model, optimizer).items()}), digest(state)


@pytest.mark.parametrize("dp_size", SIZES)
def test_overlap_memory_and_traffic_change_no_bit(dp_size: int) -> None:
    results = {outcome for case in SAME_BITS for outcome in _on_gpus(_by_hand, dp_size, case=case)}
    assert len(results) == 1


def _without_synchronisation(group: dist.ProcessGroup, device: torch.device) -> int:
    """Third step, when everything is built and warm: a host synchronisation inside `step` raises."""
    model, optimizer = make(group, Standing().to(device), ns_dtype=None)
    for step in range(4):
        loss_fn(model, _on(device, make_batch(step, dist.get_rank(group), 0))).backward()
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
    return optimizer.metrics()["steps"]


@pytest.mark.parametrize("dp_size", SIZES[:2])
def test_step_never_waits_for_the_device(dp_size: int) -> None:
    assert _on_gpus(_without_synchronisation, dp_size) == [4] * dp_size


def _skipped(group: dist.ProcessGroup, device: torch.device) -> tuple[bool, int, Weights]:
    model, optimizer = make(group, Standing().to(device))
    for step in range(3):
        before = digest({fqn: weight.cpu() for fqn, weight in weights(model, optimizer).items()})
        loss = loss_fn(model, _on(device, make_batch(step, dist.get_rank(group), 0)))
        (loss * (torch.inf if step == 1 and dist.get_rank(group) == 0 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ends = {fqn: weight.cpu() for fqn, weight in weights(model, optimizer).items()}
        if step == 1:
            unchanged = digest(ends) == before
    return unchanged, optimizer.metrics()["skipped_steps"], ends


@pytest.mark.parametrize("dp_size", SIZES)
def test_a_non_finite_gradient_skips_the_step_on_all_gpus(dp_size: int) -> None:
    for unchanged, skipped, ends in _on_gpus(_skipped, dp_size):
        assert unchanged and skipped == 1
        assert all(torch.isfinite(weight).all() for weight in ends.values())


def _moved_in_between(group: dist.ProcessGroup, device: torch.device) -> str:
    """Engines make the optimizer on the CPU and move the model afterwards, before its first use."""
    model = Standing()
    _, optimizer = make(group, model)
    model.to(device)
    loss_fn(model, _on(device, make_batch(0, dist.get_rank(group), 0))).backward()
    optimizer.step()
    assert all(weight.is_cuda for weight in weights(model, optimizer).values())
    return digest({fqn: weight.cpu() for fqn, weight in weights(model, optimizer).items()})


@pytest.mark.parametrize("dp_size", SIZES[:2])
def test_a_model_moved_before_its_first_use(dp_size: int) -> None:
    assert len(set(_on_gpus(_moved_in_between, dp_size))) == 1
    assert distmuon.__version__
