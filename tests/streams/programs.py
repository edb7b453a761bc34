"""Training programs for the modelled GPU: one model, many orders of calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from tests.streams.collectives import ModelDist, one_rank
from tests.streams.model import Fault, Gpu, Stream

WIDTH, VOCABULARY = 16, 31


class Net(nn.Module):
    """Two towers, of which the second may run on another stream, and a layer that some batches leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Sequential(nn.Linear(WIDTH, 40), nn.SiLU(), nn.Linear(40, WIDTH))
        self.second = nn.Sequential(nn.Linear(WIDTH, 24, bias=False), nn.SiLU(), nn.Linear(24, WIDTH, bias=False))
        self.norm = nn.LayerNorm(WIDTH)
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Sequential(nn.Linear(WIDTH, 40), nn.SiLU(), nn.Linear(40, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.towers: Callable[[Tensor], Tensor] = self.both

    def both(self, x: Tensor) -> Tensor:
        towers: Tensor = self.first(x) + self.second(x)
        return towers

    def forward(self, tokens: Tensor, extra: bool = True) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.towers(x))
        if extra:
            x = x + self.extra(x)
        logits: Tensor = self.head(x + self.third(x))
        return logits


class Program:
    """A model under DistMuon on one rank of a modelled GPU, and the calls that tests put together."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.gpu = gpu
        with gpu.on_device():
            self.model = Net().to(dtype)
        if options.pop("own_exchange_group", False):
            options["exchange_group"] = dist.new_group(list(range(dist.get_world_size())))
        given = {"lr": 0.02, "bucket_mb": 0.004, "ns_dtype": torch.bfloat16, **options}
        self.optimizer = distmuon.DistMuon(self.model, **given)
        self.batches = 0

    def batch(self) -> Tensor:
        self.batches += 1
        with self.gpu.on_device():
            return torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(self.batches))

    def loss(self, extra: bool = True) -> Tensor:
        tokens = self.batch()
        logits = self.model(tokens, extra)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    def step(self, micro_batches: int = 1, *, extra: bool = True, clip: float | None = None) -> None:
        for _ in range(micro_batches - 1):
            with self.optimizer.no_sync():
                self.loss(extra).backward()
        self.loss(extra).backward()
        if clip is not None:
            self.optimizer.clip_grad_norm_(clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.loss()


def calls(program: Program) -> None:
    """Every order of calls that a loop may have, on one stream, and an evaluation on a side stream."""
    optimizer, gpu = program.optimizer, program.gpu
    program.step()
    program.step(3)
    program.step(extra=False)
    program.step(2, clip=0.5)
    program.loss().backward()
    optimizer.zero_grad()  # a backward that is forgotten
    with optimizer.no_sync():
        program.loss(False).backward()
    program.model.zero_grad()
    program.step()
    side = gpu.stream()
    side.wait_stream(gpu.main)
    with gpu.on(side):
        program.evaluate()
    gpu.main.wait_stream(side)
    program.step()
    (program.loss() * torch.inf).backward()  # a step that the device skips
    optimizer.step()
    optimizer.zero_grad()
    program.evaluate()
    program.step()
    optimizer.synchronize()


def two_backward_streams(program: Program) -> None:
    """The towers run beside each other on two streams, and so do their backwards, in either order of the host."""
    gpu, model, optimizer = program.gpu, program.model, program.optimizer
    side = gpu.stream()

    def side_last(x: Tensor) -> Tensor:  # so its backward is launched first
        here, there = gpu.fork(x, side)
        first = model.first(here)
        return first + gpu.branch(side, model.second, there)

    def in_turns(x: Tensor) -> Tensor:
        here, there = gpu.fork(x, side)
        there = gpu.branch(side, model.second[:2], there, ends=False)
        here = model.first[:2](here)
        there = gpu.branch(side, model.second[2], there)
        return model.first[2](here) + there

    for towers in (side_last, in_turns):
        model.towers = towers
        for micro_batches in (1, 2, 1, 3):
            program.step(micro_batches)
            with gpu.on(side):
                program.batch()  # the next one is fetched there, and waits for nothing
        program.loss().backward()
        optimizer.zero_grad()
        program.step()
        with optimizer.no_sync():
            program.loss().backward()
        optimizer.zero_grad()
    program.step()
    optimizer.synchronize()


def late_evaluation(program: Program) -> None:
    """With parameters in flight an evaluation on a side stream waits first, and training goes on beside it."""
    gpu = program.gpu
    program.step()
    for _ in range(2):
        program.step()
        side = gpu.stream()
        side.wait_stream(gpu.main)
        with gpu.on(side):
            for module in (program.model.first, program.model.head):  # reads them; `step`'s stream does not wait
                program.optimizer.synchronize()
                module[0].weight.sum() if isinstance(module, nn.Sequential) else module.weight.sum()
        program.loss().backward()
        gpu.main.wait_stream(side)
        program.optimizer.step()
        program.optimizer.zero_grad()
    program.optimizer.synchronize()


def two_forward_streams(program: Program) -> None:
    """Two streams, both forked right after `step`, use weights of the same bucket in the forward."""
    gpu = program.gpu
    program.step()
    for _ in range(2):
        program.step()
        tokens = program.batch()
        sides: list[Stream] = [gpu.stream(), gpu.stream()]
        for side in sides:
            side.wait_stream(gpu.main)
        for side in sides:
            with gpu.on(side), torch.no_grad():
                program.model.embed(tokens)
                program.model.first[0](program.model.embed.weight)
        with torch.enable_grad():
            x = program.model.embed(tokens)  # main was forked before the sides had waited, too
        x.sum().backward()
        for side in sides:
            gpu.main.wait_stream(side)
        program.optimizer.step()
        program.optimizer.zero_grad()
    program.optimizer.synchronize()


def states(program: Program) -> None:
    """State is gathered, loaded and compared between steps, and parameters are written by other code."""
    optimizer, model = program.optimizer, program.model
    for _ in range(2):
        program.step()
        full = optimizer.full_state_dict()
        values = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.verify_bits()
        program.step()
        optimizer.not_finite()
        model.load_state_dict(values)
        optimizer.load_state_dict(full)
        with torch.no_grad():
            optimizer.synchronize()
            model.head.weight.mul_(0.5)
    program.step()
    assert optimizer.metrics()["steps"] == 5
    optimizer.synchronize()


def run(
    program: Callable[[Program], None],
    rank: int = 0,
    dp_size: int = 2,
    fault: Fault | None = None,
    *,
    kernels: bool = True,
    **options: Any,
) -> tuple[Gpu, ModelDist]:
    """Run a program on one modelled rank; return what was seen."""
    gpu = Gpu(fault, kernels=kernels)
    with one_rank(gpu, rank, dp_size) as modelled:
        program(Program(gpu, **options))
    return gpu, modelled
