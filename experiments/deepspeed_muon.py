"""DeepSpeed's own Muon and distmuon, counted side by side: the figures of the table in docs/integrations.md.

    export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1      # DeepSpeed compiles its Newton-Schulz otherwise: minutes
    torchrun --standalone --nproc_per_node=2 -m experiments.deepspeed_muon /tmp/muon
    torchrun --standalone --nproc_per_node=3 -m experiments.deepspeed_muon /tmp/muon       # resumes what 2 ranks saved

Three square matrices on two ranks, so that a shard border cuts one, and a bias. Nothing is timed: counts of calls and
bytes of one step, dtypes, and what a clip and a shape do to the first step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon import original_muon
from torch import nn

from distmuon.integrations import deepspeed as integration

SIDE, ROWS, LR = 96, 512, 0.5
SYSTEMS = ("DeepSpeed Muon, stage 0", "DeepSpeed Muon, stage 1", "DeepSpeed Muon, stage 2", "distmuon")


def make(system: str, clip: float = 0.0, shape: tuple[int, int] = (SIDE, SIDE), dtype: str = "float32") -> Any:
    """An engine around three matrices; momentum and decay alike, Newton-Schulz in each one's default dtype."""
    torch.manual_seed(0)
    rows, columns = shape
    model = nn.Sequential(
        nn.Linear(columns, rows, bias=False), nn.Linear(rows, columns, bias=False), nn.Linear(columns, rows)
    )
    ours = system == "distmuon"
    params: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "momentum": 0.95}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 0 if ours else int(system[-1])},
        "optimizer": {"type": "DistMuon", "params": params}
        if ours
        else {"type": "Muon", "params": {**params, "torch_adam": True}},
    }
    return integration.deepspeed.initialize(model=model, config=config)[0]


def step(engine: Any, scale: float = 1.0) -> None:
    torch.manual_seed(dist.get_rank())
    weight = next(engine.module.parameters())
    inputs = torch.randn(ROWS, weight.shape[1]).to(weight.dtype)
    engine.backward(engine(inputs).square().mean() * scale)
    engine.step()
    if hasattr(engine.optimizer, "synchronize"):
        engine.optimizer.synchronize()


def moved(engine: Any, scale: float = 1.0) -> float:
    """Root mean square of the first matrix's change in one step, divided by the learning rate."""
    weight = next(engine.module.parameters())
    before = weight.detach().clone()
    step(engine, scale)
    return float((weight.detach() - before).float().square().mean().sqrt()) / LR


@contextmanager
def counting(found: dict[str, Any]) -> Iterator[None]:
    """Matrices that DeepSpeed orthogonalizes here, and what each collective hands to gloo: (operation, elements)."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    original = original_muon.muon_update
    activities = [torch.profiler.ProfilerActivity.CPU]
    stage_0 = "deepspeed.runtime.zero.muon.muon_optimizer.muon_update"
    with (
        patch.object(original_muon, "muon_update", counted),
        patch(stage_0, counted),
        torch.profiler.profile(activities=activities, record_shapes=True) as seen,
    ):
        yield
    found["matrices"] = len(calls)
    for event in seen.profiler.kineto_results.events():
        if event.name().startswith("gloo:"):
            sizes = [torch.Size(s).numel() for s in event.shapes() if s and not isinstance(s[0], (list, tuple))]
            found.setdefault("sent", []).append((event.name()[5:], max(sizes, default=1)))


def counted_step(system: str, dtype: str) -> dict[str, Any]:
    """The second step, when buffers are there."""
    engine = make(system, dtype=dtype)
    step(engine)
    found: dict[str, Any] = {}
    with counting(found):
        step(engine)
    if system == "distmuon":
        metrics = engine.optimizer.metrics()
        found["matrices"], found["bytes"] = metrics["ns_matrices"], metrics["bytes"]
        pieces = [p.state["momentum_buffer"] for b in engine.optimizer._engine.storage.buckets for p in b.muon]
    else:
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        pieces = [entry["momentum_buffer"] for entry in inner.state.values() if "momentum_buffer" in entry]
    found["momentum"] = [(p.numel(), str(p.dtype)) for p in pieces]
    return found


def main() -> None:
    dist.init_process_group("gloo")
    integration.register()
    folder = Path(sys.argv[1])
    everyone: list[Any] = [None] * dist.get_world_size()
    for system in SYSTEMS:
        lines: dict[str, Any] = {}
        place = folder / system.replace(" ", "_")
        if place.exists():
            engine = make(system)
            try:
                engine.load_checkpoint(str(place))
                lines["resumed"] = f"by {dist.get_world_size()} ranks: step {engine.global_steps}"
            except Exception as error:
                lines["resumed"] = f"by {dist.get_world_size()} ranks: {type(error).__name__}: {str(error)[:160]}"
        else:
            for dtype in ("float32", "bfloat16"):
                dist.all_gather_object(everyone, counted_step(system, dtype))
                lines.update({f"{dtype}, rank {rank}": found for rank, found in enumerate(everyone)})
            for clip in (0.0, 1.0):
                rms = [f"{moved(make(system, clip), scale):.4f}" for scale in (1.0, 1e3)]
                lines[f"rms of the change / lr, clip {clip}"] = f"{rms[0]}, of gradients 1000 times as large {rms[1]}"
            for shape in ((192, 96), (96, 192)):
                lines[f"rms of the change / lr, {shape}"] = f"{moved(make(system, shape=shape)):.4f}"
            engine = make(system)
            step(engine)
            dist.barrier()
            engine.save_checkpoint(str(place))
        if dist.get_rank() == 0:
            print(f"\n{system}", *(f"  {key}: {value}" for key, value in lines.items()), sep="\n", flush=True)
        dist.barrier()


if __name__ == "__main__":
    main()
