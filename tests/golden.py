"""Golden digests: bits, state and traffic of every kind of run, so that a restructuring can prove that it moved none.

    python -m tests.golden            compare with tests/golden.json
    python -m tests.golden --half     each case at two of the four numbers of ranks, as the daily test does
    python -m tests.golden --write    write it anew; a commit of its own says why

For each case and number of ranks: digests of parameters and of state after four steps (one is skipped, one backward is
forgotten), and the number, bytes and order of this run's collectives on all ranks. Kernels differ by processor, so the
command runs itself again with the plainest ones; where even those compute other bits (`probe`), traffic alone is
compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmuon.step import verdict
from tests.pool import Pool
from tests.standing import Standing, make_batch
from tests.training import backward, digest, make, state_tensors, weights

FILE = Path(__file__).with_suffix(".json")
PLAIN_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
VERBS = ("all_reduce", "all_to_all_single", "broadcast")  # all that gloo is asked for on tensors

ALL_SAVINGS = {"overlap": "forward", "param_gather": "updates", "release_grads": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "contiguous": {"packing": "contiguous"},
    "replicated": {"placement": "replicated"},
    "contiguous, replicated": {"packing": "contiguous", "placement": "replicated"},
    "one bucket": {"bucket_mb": 64.0},
    "buckets chosen": {"bucket_mb": None},
    "no overlap": {"overlap": False},
    "gathers under the forward": {"overlap": "forward"},
    "updates travel": {"param_gather": "updates"},
    "gradients released": {"release_grads": True},
    "all savings": ALL_SAVINGS,
    "all savings, own exchange group": {**ALL_SAVINGS, "own_exchange_group": True},
    "all savings, verdict on the device": {**ALL_SAVINGS, "verdict_on_device": True},
    "verdict on the device": {"verdict_on_device": True},
    "verdict on the device, int8": {"verdict_on_device": True, "momentum_dtype": torch.int8},
    "external": {"grad_reduction": "external"},
    "clipped": {"max_grad_norm": 0.5},
    "three micro-batches": {"num_micro": 3},
    "three micro-batches, bfloat16 reduction": {"num_micro": 3, "reduce_dtype": torch.bfloat16},
    "bfloat16 reduction, released": {"reduce_dtype": torch.bfloat16, "release_grads": True},
    "float16 reduction": {"reduce_dtype": torch.float16},
    "bfloat16 momentum": {"momentum_dtype": torch.bfloat16},
    "int8 momentum": {"momentum_dtype": torch.int8},
    "bfloat16 exchange": {"exchange_dtype": torch.bfloat16},
    "bfloat16 exchange, updates travel": {"exchange_dtype": torch.bfloat16, "param_gather": "updates"},
    "bfloat16 Newton-Schulz": {"ns_dtype": torch.bfloat16},
    "bfloat16 model": {"model_dtype": torch.bfloat16},
    "bfloat16 model, remainders": {"model_dtype": torch.bfloat16, "master_format": "remainder"},
    "bfloat16 model, remainders, verdict on the device": {
        "model_dtype": torch.bfloat16,
        "master_format": "remainder",
        "verdict_on_device": True,
    },
    "the rules' other numbers": {
        "momentum": 0.9,
        "nesterov": False,
        "ns_steps": 7,
        "ns_coefficients": "polar_express",
        "adjust_lr_fn": "original",
        "adamw_lr": 0.003,
        "adamw_betas": (0.8, 0.9),
        "weight_decay": 0.3,
    },
    "adamw": {"routes": "adamw"},
}


def _steps(group: dist.ProcessGroup, model: nn.Module, optimizer: Any, num_micro: int, averages: bool) -> None:
    """Four steps; the second begins with a backward that is forgotten, the third is skipped."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for step in range(4):
        batches = [make_batch(step, rank, micro) for micro in range(num_micro)]
        if step == 1:
            backward(model, optimizer, batches)
            optimizer.zero_grad()
        handle = None
        if step == 2 and rank == size - 1:
            handle = list(model.parameters())[-1].register_hook(lambda grad: grad * torch.inf)
        backward(model, optimizer, batches)
        if handle is not None:
            handle.remove()
        if averages:
            _average(model, group)
        optimizer.step()
        optimizer.zero_grad()


def _average(model: nn.Module, group: dist.ProcessGroup) -> None:
    """What DDP would have left in `param.grad`."""
    for param in model.parameters():
        if param.requires_grad:
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            everyone = [torch.empty_like(grad) for _ in range(dist.get_world_size(group))]
            dist.all_gather(everyone, grad, group=group)
            param.grad = torch.stack(everyone).mean(0)


@contextmanager
def _recorded(asked: list[str]) -> Iterator[None]:
    """Note each collective on tensors, in order, as "verb: elements dtype"."""

    def noting(verb: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            asked.append(f"{verb}: {tensor.numel()} {tensor.dtype}")
            return call(tensor, *args, **kwargs)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for verb in VERBS:
            patch.setattr(dist, verb, noting(verb, getattr(dist, verb)))
        yield


def _run(group: dist.ProcessGroup, names: list[str]) -> dict[str, list[Any]]:
    """By case: [digest of parameters, of state, bytes sent, calls, the collectives in order], this rank's."""
    found = {}
    for name in names:
        options = {**CASES[name]}
        num_micro, dtype = options.pop("num_micro", 1), options.pop("model_dtype", torch.float32)
        if options.pop("own_exchange_group", False):
            options["exchange_group"] = group
        asked: list[str] = []
        with pytest.MonkeyPatch.context() as patch, _recorded(asked):
            if options.pop("verdict_on_device", False):
                patch.setattr(verdict, "read_on_host", lambda ok: None)
            model, optimizer = make(group, Standing().to(dtype), **options)
            _steps(group, model, optimizer, num_micro, options.get("grad_reduction") == "external")
            metrics = optimizer.metrics()
            optimizer.synchronize()
        assert metrics["skipped_steps"] == 1
        bits = digest(weights(model, optimizer)), digest(state_tensors(optimizer))
        found[name] = [*bits, metrics["bytes"], metrics["calls"], asked]
    return found


def probe(_group: dist.ProcessGroup) -> str:
    """Of the arithmetic that the cases rest on: equal where torch and its kernels compute the same bits."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(67, 131, generator=generator), torch.randn(131, 59, generator=generator)
    image, kernel = torch.randn(2, 2, 9, 9, generator=generator), torch.randn(13, 2, 3, 3, generator=generator)
    products = {"float32": a @ b, "bfloat16": (a.bfloat16() @ b.bfloat16()).float()}
    others = {
        "convolution": torch.nn.functional.conv2d(image, kernel),
        "softmax": a.softmax(1),
        "sin": a.sin(),
        "gelu": torch.nn.functional.gelu(a),
        "sum": a.sum(),
    }
    return digest({**products, **others})[:16]


def measure(*, half: bool = False) -> dict[str, Any]:
    """What the file holds, of this machine; `half`: at 1 and 3 ranks or at 2 and 4, in turns."""
    os.environ.update(PLAIN_KERNELS)
    pool, found = Pool(4), {}
    try:
        (arithmetic,) = pool.spawn(probe, 1)
        for dp_size in (1, 2, 3, 4):
            names = [name for number, name in enumerate(CASES) if not half or (number + dp_size) % 2]
            by_rank = pool.spawn(_run, dp_size, timeout=300, names=names)
            for name in names:
                ranks = [of_rank[name] for of_rank in by_rank]
                assert len({(weights, state) for weights, state, *_ in ranks}) == 1, f"{name}: ranks differ"
                order = hashlib.sha256(json.dumps([asked for *_, asked in ranks]).encode()).hexdigest()
                found[f"{name}, dp {dp_size}"] = {
                    "weights": ranks[0][0][:16],
                    "state": ranks[0][1][:16],
                    "bytes": [sum(sent.values()) for _, _, sent, _, _ in ranks],
                    "calls": [len(asked) for *_, asked in ranks],
                    "collectives": order[:16],
                }
    finally:
        pool.close()
    return {"torch": torch.__version__, "probe": arithmetic, "runs": found}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One text for each run and each thing that is not as it was; bits only where the arithmetic is the same."""
    same_arithmetic = all(found[key] == wanted[key] for key in ("torch", "probe"))
    keys = (*(("weights", "state") if same_arithmetic else ()), "bytes", "calls", "collectives")
    texts = [f"{name}: no longer run" for name in wanted["runs"].keys() - found["runs"].keys()]
    for name, run in found["runs"].items():
        before = wanted["runs"].get(name)
        if before is None:
            texts.append(f"{name}: new")
        else:
            texts += [f"{name}: {key} {run[key]}, were {before[key]}" for key in keys if run[key] != before[key]]
    return texts


def main() -> None:
    if any(os.environ.get(name) != value for name, value in PLAIN_KERNELS.items()):  # read when torch is imported
        command = [sys.executable, "-m", "tests.golden", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env={**os.environ, **PLAIN_KERNELS}).returncode)
    write = "--write" in sys.argv[1:]
    half = "--half" in sys.argv[1:] and not write
    found = measure(half=half)
    if write:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{FILE}: {len(found['runs'])} runs")
        return
    wanted = json.loads(FILE.read_text())
    if half:
        wanted["runs"] = {name: run for name, run in wanted["runs"].items() if name in found["runs"]}
    texts = differences(found, wanted)
    print("\n".join(texts) or f"all {len(found['runs'])} runs as they were")
    if any(found[key] != wanted[key] for key in ("torch", "probe")):
        print("the arithmetic of this torch or processor differs: bits were not compared")
    raise SystemExit(bool(texts))


if __name__ == "__main__":
    main()
