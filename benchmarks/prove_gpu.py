"""What holds of DistMuon on the GPUs of this machine, in eight minutes at the most; one GPU is enough.

    python -m benchmarks.prove_gpu [--out FILE.json] [--parts probe,promises] [--minutes 8]
    python -m benchmarks.prove_gpu --cpu                      the dry mode: small, on CPUs; proves this script alone
    python -m benchmarks.prove_gpu --table FILE.json          the table of an earlier run

Parts run one after another, each though another fails, and each writes its part of the JSON at once. A part that the
time does not allow is listed as not run. The table comes last; `holds` is what the part promises, not a speed.

facts      versions, driver, GPUs
probe      NCCL on ranks that share the GPU, all verbs on two groups; else gloo moves CUDA tensors
promises   the bodies of tests/gpu on 1, 2 and 4 ranks: parity, bits, host waits, sleeping streams, saves
profile    a model at 2 ranks: reduce-scatters that start under backward, host waits, when `step` returns
share      one rank's share of a large model, other ranks left out: milliseconds by stage, memory beside the plan
newton_schulz   TFLOP/s by shape beside torch.optim.Muon's loop
stack      a Llama stack: milliseconds of forward and backward, of a step by Muon and by AdamW
passes     elementwise kernels in GB/s
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz as torch_muon

import distmuon
from distmuon.layout.routing import ParamSpec
from distmuon.math.newton_schulz import flops, orthogonalize
from distmuon.planning import shapes
from distmuon.planning.step_time import HARDWARE
from tests.gpu.bodies import BODIES
from tests.gpu.world import Ranks, no_host_wait, num_gpus, sizes

# What `step` may call of the runtime's waits: one for the flag of the step before, which has arrived long ago.
WAITS = {"cudaStreamSynchronize": 0, "cudaDeviceSynchronize": 0, "cudaEventSynchronize": 1}
TINY = "tiny"


@dataclass
class Run:
    """A run of this script: what it may use, and until when."""

    dry: bool
    ends_at: float
    ranks: Ranks | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    def pool(self) -> Ranks:
        if self.ranks is None:
            self.ranks = Ranks(2 if self.dry else max(sizes()), dry=self.dry)
        return self.ranks


Part = Callable[[Run], dict[str, Any]]  # "holds": whether what it promises was seen; None: it only measures


def facts(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "distmuon": distmuon.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(number) for number in range(num_gpus())],
        "processor": platform.processor() or platform.machine(),
        "mps": shutil.which("nvidia-cuda-mps-control") is not None,
    }
    if not run.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {"memory_gib": properties.total_memory / 2**30, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    return {"holds": None, **found}


def probe(run: Run) -> dict[str, Any]:
    ranks = run.pool()
    for size in (2,) if run.dry else sizes():
        ranks.verbs(size)
    return {"holds": True, "backend": ranks.backend, "why": ranks.why}


# What a dry run leaves out of each body, so that it takes seconds.
DRY: dict[str, dict[str, Any]] = {"newton_schulz": {"k": 96}, "disturbed": {"cases": ["all"], "seeds": (1,)}}


def promises(run: Run) -> dict[str, Any]:
    """All bodies; with little time, those at 2 ranks come first."""
    ranks, found = run.pool(), {}
    wanted = [2] if run.dry else sorted(sizes(), key=lambda size: (size != 2, size))
    bodies = ["same_bits", "disturbed", "newton_schulz"] if run.dry else list(BODIES)
    for size in wanted:
        for name in bodies:
            if run.left_s < 10:
                found[f"{name} at {size}"] = "not run: no time left"
                continue
            with tempfile.TemporaryDirectory() as folder:
                kwargs = {"folder": folder} if name == "saved" else DRY.get(name, {}) if run.dry else {}
                try:
                    by_rank = ranks.run(BODIES[name], size, **kwargs)
                    equal = all(result == by_rank[0] for result in by_rank)
                    found[f"{name} at {size}"] = "holds" if equal else "ranks end with different bits"
                except AssertionError as error:
                    found[f"{name} at {size}"] = str(error)[-600:]
    return {"holds": all(text == "holds" for text in found.values()), "backend": ranks.backend, "bodies": found}


# ------------------------------------------------------------------------------------------------------ the profile


class Block(nn.Module):
    """A Llama layer: grouped-query attention without rotation, and a gated MLP."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads, width // heads
        self.norm, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            linear(y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for linear, heads in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norm_mlp(x)
        done: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return done


class Stack(nn.Module):
    """Embedding, layers, tied head; the loss of next tokens."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, hidden, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x) @ self.embed.weight.mT
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_stack(size: str, device: torch.device) -> Stack:
    """`size`: "tiny", "100m", or "1b", which has the widths of Llama 3.2 1B with a smaller vocabulary."""
    numbers = {
        TINY: (64, 128, 4, 2, 2, 256),
        "100m": (768, 2048, 12, 4, 12, 32000),
        "1b": (2048, 8192, 32, 8, 16, 32000),
    }
    with torch.device(device):
        return Stack(*numbers[size]).to(torch.bfloat16)


@dataclass(frozen=True)
class Span:
    """An event of a profile: a range of the host, a call of the runtime, or a kernel. Times in microseconds."""

    name: str
    start: float
    end: float
    on_device: bool
    correlation: int  # a kernel has its launch's


def spans_of(profiler: Any) -> list[Span]:
    events = profiler.profiler.kineto_results.events()
    on_cpu = torch._C._autograd.DeviceType.CPU
    return [
        Span(
            event.name(),
            event.start_ns() / 1e3,
            (event.start_ns() + event.duration_ns()) / 1e3,
            event.device_type() != on_cpu,
            event.correlation_id(),
        )
        for event in events
    ]


def structure(spans: Sequence[Span]) -> dict[str, Any]:
    """What a profile of one iteration says of overlap; its ranges are named ``prove::<what>``."""
    ranges = {span.name.removeprefix("prove::"): span for span in spans if span.name.startswith("prove::")}
    kernels = [span for span in spans if span.on_device and not span.name.startswith(("prove::", "distmuon::"))]
    host = [span for span in spans if not span.on_device]

    def inside(span: Span, name: str) -> bool:
        return ranges[name].start <= span.start < ranges[name].end

    launched = {span.correlation for span in host if "Launch" in span.name and inside(span, "backward")}
    of_backward = [span for span in kernels if span.correlation in launched and "nccl" not in span.name.lower()]
    last = max((span.end for span in of_backward), default=0.0)
    reduces = [span for span in kernels if "ReduceScatter" in span.name]
    found: dict[str, Any] = {
        "reduce_scatters": len(reduces),
        "before_the_last_backward_kernel": sum(span.start < last for span in reduces),
        "host_waits_in_step": {
            name: sum(span.name == name and inside(span, "step") for span in host) for name in WAITS
        },
        "stages": sorted({span.name.split("/")[0] for span in host if span.name.startswith("distmuon::")}),
    }
    if kernels:
        found["step_returns_before_the_device_ms"] = (max(s.end for s in kernels) - ranges["step"].end) / 1e3
        found["device_busy_ms"] = sum(span.end - span.start for span in kernels) / 1e3
        gathers = [span for span in kernels if "AllGather" in span.name]
        found["all_gathers"] = len(gathers)
        found["all_gathers_end_after_step_ms"] = max((s.end for s in gathers), default=0.0) / 1e3
        found["all_gathers_end_after_step_ms"] -= ranges["step"].end / 1e3
    return found


def profiled(group: dist.ProcessGroup, device: torch.device, model_size: str, overlap: Any, second_group: bool) -> Any:
    """Profile the fifth iteration, with the next forward; rank 0's."""
    options: dict[str, Any] = {"overlap": overlap}
    if second_group:
        options["exchange_group"] = dist.new_group()
    model = make_stack(model_size, device)
    optimizer = distmuon.DistMuon(model, lr=1e-3, process_group=group, **options)
    tokens = torch.randint(200, (2, 64 if model_size == TINY else 1024), device=device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(4):
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.profiler.profile(activities=activities) as profiler:
        label = torch.profiler.record_function
        loss = model(tokens)
        with label("prove::backward"):
            loss.backward()
        with label("prove::step"):
            optimizer.step()
        optimizer.zero_grad()
        with label("prove::forward"):
            model(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
    optimizer.synchronize()
    return structure(spans_of(profiler))


def profile(run: Run) -> dict[str, Any]:
    found = {}
    for name, overlap, second in (("True", True, False), ("forward", "forward", False), ("exchange group", True, True)):
        size = TINY if run.dry else "100m"
        found[name] = run.pool().run(profiled, 2, model_size=size, overlap=overlap, second_group=second)[0]
    waits = [seen["host_waits_in_step"][name] > WAITS[name] for seen in found.values() for name in WAITS]
    overlapped = [seen["before_the_last_backward_kernel"] > 0 for seen in found.values()]
    is_nccl = run.pool().backend == "nccl"
    return {"holds": (not any(waits) and all(overlapped)) if is_nccl else None, "by_overlap": found}


# ------------------------------------------------------------------------------------------- one rank's share


def specs_of(model: str) -> list[ParamSpec]:
    return list(shapes._llama(64, 2, 128, 32)) if model == TINY else list(shapes.shape_table(model))


@contextmanager
def _stages_on_device(optimizer: Any, device: torch.device) -> Iterator[None]:
    """In the block, stages wait for the device at both ends, so that their host times are those of the work."""
    stage = optimizer._metrics.stage

    @contextmanager
    def synchronised(*args: Any) -> Iterator[None]:
        _synchronize(device)
        with stage(*args):
            yield
            _synchronize(device)

    optimizer._metrics.stage = synchronised
    try:
        yield
    finally:
        del optimizer._metrics.stage


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def one_share(model: str, dp_size: int, rank: int, device: torch.device) -> dict[str, Any]:
    """Rank `rank` of `dp_size`, alone, on torch's fake group: its compute and memory are real, its messages noise."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=dp_size, store=FakeStore())
    specs = specs_of(model)
    plan = distmuon.plan(specs, dp_size=dp_size)
    scale: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    params = {spec.fqn: nn.Parameter(torch.randn(spec.shape, **scale).mul_(0.02)) for spec in specs}
    noise = torch.randn(max(param.numel() for param in params.values()), **scale).mul_(1e-3)
    groups = [
        {"params": [(spec.fqn, params[spec.fqn]) for spec in specs if spec.rule == rule], "rule": rule}
        for rule in ("muon", "adamw")
    ]
    optimizer = distmuon.DistMuon(groups, lr=1e-3)
    with _alone():
        for number in range(4):
            if number == 2 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            _synchronize(device)
            begin = time.perf_counter()
            views = [param.view_as(param) for param in params.values()]
            torch.autograd.backward(views[::-1], [noise[: v.numel()].view(v.shape) for v in views[::-1]])
            _synchronize(device)
            middle = time.perf_counter()
            if number == 3:
                with _stages_on_device(optimizer, device):
                    optimizer.step()
            else:
                optimizer.step()
            returned = time.perf_counter()
            _synchronize(device)
            if number == 2:
                times = {
                    "backward_ms": 1e3 * (middle - begin),
                    "step_ms": 1e3 * (time.perf_counter() - middle),
                    "step_returns_ms": 1e3 * (returned - middle),
                }
                peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            optimizer.zero_grad()
        measured = optimizer.metrics()
    held = plan.ranks[rank].held.total
    stage_ms = measured["stage_ms"]
    ns_s = stage_ms.get("newton_schulz", 0.0) / 1e3
    return {
        "model": model,
        "dp_size": dp_size,
        "rank": rank,
        **times,
        "stage_ms": stage_ms,
        "peak_gib": (peak - noise.nbytes) / 2**30 if peak else None,
        "planned_gib": held / 2**30,
        "ns_tflops": plan.ranks[rank].ns_flops / ns_s / 1e12 if ns_s else None,
        "planned_ns_tflops": HARDWARE["h200"].flops * HARDWARE["h200"].flops_share / 1e12,
    }


@contextmanager
def _alone() -> Iterator[None]:
    """In the block, the other ranks of a fake group say what this rank says."""
    import pytest

    from distmuon.comm.group import DataParallelGroup, Pending

    def said(self: Any, text: bytes) -> list[bytes]:
        return [text] * self.dp_size

    def summed(self: Any, tensor: Tensor, **_: Any) -> Pending:
        return Pending(tensor.mul_(self.dp_size))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataParallelGroup, "_gather_bytes", said)
        patch.setattr(DataParallelGroup, "start_all_reduce", summed)
        yield


def share(run: Run) -> dict[str, Any]:
    """Each in a process of its own, so that the memory of one does not count for the next."""
    wanted = [(TINY, 4)] if run.dry else [("llama-1b", 8), ("llama-8b", 8), ("llama-8b", 64), ("llama-8b", 256)]
    found: list[dict[str, Any]] = []
    for model, dp_size in wanted:
        command = [sys.executable, "-m", "benchmarks.prove_gpu", "--share", model, "--dp", str(dp_size)]
        limit = max(5.0, min(90.0, run.left_s))
        try:
            done = subprocess.run(
                [*command, *(["--cpu"] if run.dry else [])], capture_output=True, text=True, timeout=limit
            )
            text = done.stdout.strip().rpartition("\n")[2]
            failed = {"model": model, "dp_size": dp_size, "error": done.stderr[-600:]}
            found.append(json.loads(text) if done.returncode == 0 else failed)
        except subprocess.TimeoutExpired:
            found.append({"model": model, "dp_size": dp_size, "error": f"not done in {limit:.0f} s"})
    ran = ["error" not in one for one in found]
    near = [abs(one["peak_gib"] / one["planned_gib"] - 1) <= 0.1 for one in found if one.get("peak_gib")]
    return {"holds": all(ran) and all(near), "shares": found}


# ------------------------------------------------------------------------------------------------------ speeds


def milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median of `rounds` calls, each timed by itself."""
    call()
    found = []
    for _ in range(rounds):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        _synchronize(device)
        found.append(1e3 * (time.perf_counter() - begin))
    return median(found)


def newton_schulz(run: Run) -> dict[str, Any]:
    all_shapes = [(1, 2048, 2048), (1, 2048, 8192), (1, 4096, 4096), (1, 4096, 14336), (1, 14336, 4096)]
    all_shapes += [(8, 2048, 8192), (64, 768, 2048), (64, 1536, 2048)]
    rows = []
    for count, m, n in [(2, 96, 128)] if run.dry else all_shapes:
        x = torch.randn(count, m, n, device=run.device, dtype=torch.bfloat16)
        work = count * flops(m, n, 5) / 1e9

        def loop(x: Tensor = x) -> list[Tensor]:
            return [torch_muon(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7) for matrix in x]

        row: dict[str, Any] = {"shape": [count, m, n], "rounds": 3 if run.dry else 9}
        ways: dict[str, Callable[[], object]] = {
            "distmuon": lambda x=x: orthogonalize(x, steps=5, coefficients="jordan"),  # type: ignore[misc]
            "torch.optim.Muon": loop,
        }
        for name, way in ways.items():
            taken = milliseconds(way, run.device, row["rounds"])
            row[name] = {"ms": taken, "tflops": work / taken}
        rows.append(row)
    carried = find_spec("gram_newton_schulz") is not None
    return {"holds": None, "rows": rows, "gram-newton-schulz": "installed, not timed" if carried else "not installed"}


def stack(run: Run) -> dict[str, Any]:
    """`tflops` of a step are not said: the tokens and the model are."""
    size, tokens_shape = (TINY, (2, 64)) if run.dry else ("1b", (4, 4096))
    found: dict[str, Any] = {"size": size, "tokens": tokens_shape[0] * tokens_shape[1]}
    for name in ("muon", "adamw"):
        torch.manual_seed(0)
        model = make_stack(size, run.device)
        found["parameters"] = sum(param.numel() for param in model.parameters())
        made: Any = (
            distmuon.DistMuon(model, lr=1e-3)
            if name == "muon"
            else torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        )
        tokens = torch.randint(200, tokens_shape, device=run.device)

        def backward(model: nn.Module = model, tokens: Tensor = tokens) -> None:
            model(tokens).backward()

        backward()
        made.step()
        made.zero_grad()
        found[f"{name}_forward_and_backward_ms"] = milliseconds(backward, run.device, 3)
        found[f"{name}_step_ms"] = milliseconds(made.step, run.device, 3)
        for _ in range(2):
            with no_host_wait(run.device, name == "muon"):
                backward()
                made.step()
                made.zero_grad()
        del model, made
    return {"holds": None, **found}


def passes(run: Run) -> dict[str, Any]:
    """Kernels as a step has them, in GB/s of what they must read and write."""
    numel = 1 << (14 if run.dry else 28)
    wide, other = (torch.randn(numel, device=run.device) for _ in range(2))
    narrow, ok = wide.bfloat16(), torch.ones((), dtype=torch.bool, device=run.device)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "copy bfloat16 to float32": (6, lambda: wide.copy_(narrow)),
        "copy float32 to bfloat16": (6, lambda: narrow.copy_(wide)),
        "lerp in place": (12, lambda: wide.lerp_(other, 0.05)),
        "where with a verdict": (12, lambda: torch.where(ok, other, wide, out=wide)),
        "norm": (4, lambda: torch._foreach_norm([wide], 2.0, dtype=torch.float64)),
    }
    found = {}
    for name, (size, call) in calls.items():
        found[name] = numel * size / milliseconds(call, run.device, 5) / 1e6
    return {"holds": None, "gb_per_s": found}


PARTS: dict[str, Part] = {
    part.__name__: part for part in (facts, probe, promises, profile, share, newton_schulz, stack, passes)
}
# The order when time is short, and the least seconds that are kept for the parts that follow the long one.
KEPT_S = {"promises": 220.0}


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a line for each part, and below it the figures."""
    lines = ["| part | holds | seconds | what was seen |", "|---|---|---|---|"]
    for name, part in results.items():
        holds = {True: "yes", False: "**no**", None: "-"}[part.get("holds")] if "error" not in part else "**failed**"
        lines.append(f"| {name} | {holds} | {part['seconds']:.0f} | {_said(name, part)} |")
    return "\n".join(lines)


def _said(name: str, part: dict[str, Any]) -> str:
    if "error" in part:
        return " ".join(str(part["error"]).split())[-300:].replace("|", "/")
    if name == "facts":
        return ", ".join(f"{key} {part[key]}" for key in ("date", "torch", "cuda", "devices") if part.get(key))
    if name == "probe":
        return str(part["why"])
    if name == "promises":
        failed = {body: text for body, text in part["bodies"].items() if text != "holds"}
        said = f"{len(part['bodies']) - len(failed)} of {len(part['bodies'])}, {part['backend']}"
        return said + "".join(f"; {body}: {' '.join(text.split())[-160:]}" for body, text in failed.items()).replace(
            "|", "/"
        )
    if name == "profile":
        return "; ".join(
            f"{how}: {seen['before_the_last_backward_kernel']} of {seen['reduce_scatters']} reduce-scatters under "
            f"backward, {sum(seen['host_waits_in_step'].values())} host waits in step"
            for how, seen in part["by_overlap"].items()
        )
    if name == "share":
        return "; ".join(
            f"{one['model']} at {one['dp_size']}: "
            + (
                one["error"][-120:].replace("\n", " ")
                if "error" in one
                else f"step {one['step_ms']:.1f} ms, {one['peak_gib'] or 0:.2f} GiB, planned {one['planned_gib']:.2f}"
            )
            for one in part["shares"]
        )
    if name == "newton_schulz":
        return "; ".join(
            f"{'x'.join(map(str, row['shape']))}: {row['distmuon']['tflops']:.0f} TFLOP/s, torch.optim.Muon "
            f"{row['torch.optim.Muon']['tflops']:.0f}"
            for row in part["rows"]
        )
    if name == "stack":
        return (
            f"{part['parameters'] / 1e6:.0f} M parameters, {part['tokens']} tokens: step {part['muon_step_ms']:.1f} ms,"
            f" AdamW {part['adamw_step_ms']:.1f}, forward and backward {part['muon_forward_and_backward_ms']:.1f}"
        )
    return "; ".join(f"{call}: {rate:.0f} GB/s" for call, rate in part["gb_per_s"].items())


def prove(run: Run, parts: Sequence[str], out: Path | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    whole = run.ends_at
    for name in parts:
        begin = time.monotonic()
        later = any(other in parts[parts.index(name) + 1 :] for other in PARTS)
        run.ends_at = whole - (KEPT_S.get(name, 0.0) if later and not run.dry else 0.0)
        if run.left_s <= 0:
            results[name] = {"error": "not run: no time left"}
        else:
            try:
                results[name] = PARTS[name](run)
            except Exception as error:  # the next part runs all the same
                results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = time.monotonic() - begin
        run.ends_at = whole
        if out is not None:
            out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {results[name].get('error') or results[name].get('holds')}", file=sys.stderr, flush=True)
    if run.ranks is not None:
        run.ranks.close()
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the dry mode")
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after so long")
    parser.add_argument("--table", type=Path, default=None, help="print the table of this JSON file, run nothing")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dp", type=int, default=8, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    if not arguments.cpu and not num_gpus():
        parser.error("this machine has no GPU that torch can use; --cpu is the dry mode")
    unknown = [part for part in arguments.parts.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if arguments.share:
        device = torch.device("cpu" if arguments.cpu else "cuda")
        print(json.dumps(one_share(arguments.share, arguments.dp, 0, device)), flush=True)
        os._exit(0)  # a fake group has no peers to say goodbye to
    run = Run(dry=arguments.cpu, ends_at=time.monotonic() + 60 * arguments.minutes)
    results = prove(run, arguments.parts.split(","), arguments.out)
    print(table(results))
    return 0 if all("error" not in part and part["holds"] is not False for part in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
