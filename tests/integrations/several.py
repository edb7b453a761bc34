"""Runs inside torchrun: several models and optimizers under one accelerator or Fabric, and what is refused there.

    torchrun --standalone --nproc_per_node 2 -m tests.integrations.several FOLDER

Each way trains a body and a critic by one joint loss with accumulation and a clip of each, next to a plain loop that
needs no trainer; rank 0 writes what all ranks found.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import distmuon
from distmuon.integrations import accelerate as ours
from distmuon.integrations import fabric as ours_fabric
from tests.training import digest

STEPS, MICRO, CLIPS = 3, 2, (0.05, 0.02)
KINDS = ("muon", "adamw", "external")  # what trains the critic
Found = dict[str, Any]


EXACT = distmuon.Precision(newton_schulz=torch.float32)


def models() -> tuple[nn.Sequential, nn.Sequential]:
    """Body and critic; the ranks start from different weights on purpose, rank 0's must be taken."""
    torch.manual_seed(dist.get_rank())
    sizes = ((12, 32, 12), (12, 32, 4))
    body, critic = (nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)) for a, b, c in sizes)
    return body, critic


def optimizers(kind: str, body: nn.Module, critic: nn.Module) -> tuple[Any, Any]:
    options: Any = {"lr": 0.02, "precision": EXACT}
    first = distmuon.DistMuon(body, **options)
    if kind == "adamw":
        return first, torch.optim.AdamW(critic.parameters(), lr=0.01)
    return first, distmuon.DistMuon(
        critic, grad_reduction="external" if kind == "external" else "reduce_scatter", **options
    )


def joint_loss(body: Any, critic: Any, step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
    hidden = body(torch.randn(5, 12, generator=generator))
    return hidden.square().mean() + (critic(hidden) - 1.0).square().mean()


def ends(body: nn.Module, critic: nn.Module, *trained: Any) -> list[str]:
    for optimizer in trained:
        if isinstance(optimizer, distmuon.DistMuon):
            optimizer.synchronize()
    return [digest({name: p.detach() for name, p in model.named_parameters()}) for model in (body, critic)]


def plain(kind: str) -> Found:
    """No trainer: DistMuon reduces its models, DDP the others."""
    body, critic = models()
    first, second = optimizers(kind, body, critic)
    wrapped: Any = critic if kind == "muon" else DistributedDataParallel(critic)
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO):
            with ExitStack() as stack:
                if micro < MICRO - 1:
                    stack.enter_context(first.no_sync())
                    stack.enter_context(second.no_sync() if kind == "muon" else wrapped.no_sync())
                (joint_loss(body, wrapped, step, micro) / MICRO).backward()
        norms.append(float(first.clip_grad_norm_(CLIPS[0])))
        norm = second.clip_grad_norm_ if kind == "muon" else lambda clip: clip_grad_norm_(critic.parameters(), clip)
        norms.append(float(norm(CLIPS[1])))
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    return {"norms": norms, "ends": ends(body, critic, first, second)}


def accelerator(**given: Any) -> Any:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    return Accelerator(cpu=True, **given)


def under_accelerate(kind: str, calls: str) -> Found:
    """`calls`: how the pairs are prepared."""
    ran = accelerator(gradient_accumulation_steps=MICRO)
    body, critic = inner = models()
    first, second = given = optimizers(kind, body, critic)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 2)), 2)
    if calls == "one, in disorder":
        second, _, critic, first, body = ours.prepare(ran, second, loader, critic, first, body)
    elif calls == "theirs last":
        body, first = ours.prepare(ran, body, first)
        critic, second = ran.prepare(critic, second)
    else:  # theirs first
        critic, second = (ours.prepare if kind == "muon" else Accelerator.prepare)(ran, critic, second)
        first, body = ours.prepare(ran, first, body)
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO):
            with ran.accumulate(body, critic):
                ran.backward(joint_loss(body, critic, step, micro))
                if ran.sync_gradients:
                    norms += [
                        float(ran.clip_grad_norm_(model.parameters(), clip))
                        for model, clip in zip((body, critic), CLIPS)
                    ]
                for optimizer in (first, second):
                    optimizer.step()
                    optimizer.zero_grad()
    return {"norms": norms, "ends": ends(*inner, *given)}


def under_fabric(kind: str) -> Found:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=ours_fabric.DistMuonStrategy())
    fabric.launch()
    body, critic = inner = models()
    first, second = given = optimizers(kind, body, critic)
    body, first = ours_fabric.setup(fabric, body, first)
    critic, second = (fabric.setup if kind == "adamw" else lambda *pair: ours_fabric.setup(fabric, *pair))(
        critic, second
    )
    norms = []
    for step in range(STEPS):
        for micro in range(MICRO):
            accumulating = micro < MICRO - 1
            with fabric.no_backward_sync(body, accumulating), fabric.no_backward_sync(critic, accumulating):
                fabric.backward(joint_loss(body, critic, step, micro) / MICRO)
        for model, optimizer, clip in zip((body, critic), (first, second), CLIPS):
            norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=clip)))
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    return {"norms": norms, "ends": ends(*inner, *given)}


def own_prepare_external() -> Found:
    """accelerate's own `prepare`, no line of ours: DDP averages, clips are torch's, by value as well."""
    results = []
    for trainer in (True, False):
        body, _ = models()
        optimizer: Any = distmuon.DistMuon(body, lr=0.02, precision=EXACT, grad_reduction="external")
        given = optimizer
        ran: Any = accelerator(gradient_accumulation_steps=MICRO)
        model: Any = DistributedDataParallel(body)
        if trainer:
            model, optimizer = ran.prepare(body, optimizer)
        for step in range(STEPS):
            for micro in range(MICRO):
                batch = torch.randn(5, 12, generator=torch.Generator().manual_seed(step * 7 + micro + dist.get_rank()))
                accumulating = nullcontext() if micro == MICRO - 1 else model.no_sync()
                with ran.accumulate(model) if trainer else accumulating:
                    loss = model(batch).square().mean()
                    ran.backward(loss) if trainer else (loss / MICRO).backward()
                    if micro == MICRO - 1:
                        norm, value = clip_grad_norm_, torch.nn.utils.clip_grad_value_
                        if trainer:
                            norm, value = ran.clip_grad_norm_, ran.clip_grad_value_
                        norm(model.parameters(), 0.05)
                        value(model.parameters(), 0.004)
                    if trainer or micro == MICRO - 1:
                        optimizer.step()
                        optimizer.zero_grad()
        results.append(ends(body, body, given))
    return {"trainer": results[0], "plain": results[1]}


def pair() -> tuple[nn.Module, distmuon.DistMuon]:
    body, _ = models()
    return body, distmuon.DistMuon(body, lr=0.02)


def one_step(ran: Any, model: Any, optimizer: Any, num_micro: int = 1) -> None:
    for _ in range(num_micro):
        with ran.accumulate(model):
            ran.backward(model(torch.ones(2, 12)).square().mean())
            optimizer.step()
            optimizer.zero_grad()


def own_prepare() -> None:
    ran = accelerator()
    one_step(ran, *ran.prepare(*pair()))


def own_prepare_and_accumulation() -> None:
    ran = accelerator(gradient_accumulation_steps=2)
    one_step(ran, *ran.prepare(*pair()), num_micro=2)


def own_prepare_then_ours() -> None:
    ran, (model, optimizer) = accelerator(), pair()
    ours.prepare(ran, ran.prepare(model), optimizer)


def local_sgd() -> None:
    ran = accelerator()
    model, optimizer = ours.prepare(ran, *pair())
    with LocalSGD(accelerator=ran, model=model, local_sgd_steps=2):
        one_step(ran, model, optimizer)


def uneven_inputs() -> None:
    ran = accelerator()
    model, _ = ours.prepare(ran, *pair())
    with ran.join_uneven_inputs([model]):
        pass


def clip_of_both() -> None:
    ran, (body, critic) = accelerator(), models()
    body, critic, *_ = ours.prepare(ran, body, critic, *optimizers("muon", body, critic))
    ran.backward(joint_loss(body, critic, 0, 0))
    ran.clip_grad_norm_([*body.parameters(), *critic.parameters()], 1.0)


def clip_with_adamw() -> None:
    ran, (body, critic) = accelerator(), models()
    body, critic, *_ = ours.prepare(ran, body, critic, *optimizers("adamw", body, critic))
    ran.backward(joint_loss(body, critic, 0, 0))
    ran.clip_grad_norm_([*body.parameters(), *critic.parameters()], 1.0)


def clip_of_a_part() -> None:
    ran, (body, optimizer) = accelerator(), pair()
    body, _ = ours.prepare(ran, body, optimizer)
    ran.backward(body(torch.ones(2, 12)).sum())
    ran.clip_grad_norm_(body[0].parameters(), 1.0)


def clip_of_values() -> None:
    ran, (body, optimizer) = accelerator(), pair()
    body, _ = ours.prepare(ran, body, optimizer)
    ran.clip_grad_value_(body.parameters(), 1.0)


def fabrics_clip_of_values() -> None:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=ours_fabric.DistMuonStrategy())
    fabric.launch()
    body, optimizer = ours_fabric.setup(fabric, *pair())
    fabric.backward(body(torch.ones(2, 12)).sum())
    fabric.clip_gradients(body, optimizer, clip_val=1.0)


def a_model_of_two_kinds() -> None:
    ran, (body, critic) = accelerator(), models()
    optimizer, other = optimizers("adamw", body, critic)
    ours.prepare(ran, nn.Sequential(body, critic), optimizer, other)


def fabrics_model_first() -> None:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=ours_fabric.DistMuonStrategy())
    fabric.launch()
    body, _ = models()
    fabric.setup_module(body)
    fabric.setup_optimizers(distmuon.DistMuon(body))


REFUSED: tuple[Callable[[], None], ...] = (
    own_prepare,
    own_prepare_and_accumulation,
    own_prepare_then_ours,
    local_sgd,
    uneven_inputs,
    clip_of_both,
    clip_with_adamw,
    clip_of_a_part,
    clip_of_values,
    a_model_of_two_kinds,
    fabrics_model_first,
    fabrics_clip_of_values,
)


def refusal(trigger: Callable[[], None]) -> str:
    try:
        trigger()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def no_sync_of_the_model() -> Found:
    """`model.no_sync()`, where users write it under accelerate: as one that DDP had wrapped."""
    body, optimizer = pair()
    model, _ = ours.prepare(accelerator(), body, optimizer)
    with model.no_sync():
        model(torch.ones(2, 12)).sum().backward()
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    return {"steps": optimizer.metrics()["calls"]["guard"]}


def main() -> None:
    folder = Path(sys.argv[1])
    faulthandler.dump_traceback_later(500, exit=True)  # a hang names its place
    warnings.simplefilter("ignore")  # the trainers' own
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: Found = {"refused": {each.__name__: refusal(each) for each in REFUSED}}
    found["external"], found["no_sync"] = own_prepare_external(), no_sync_of_the_model()
    for kind in KINDS:
        found[f"plain {kind}"] = plain(kind)
        for calls in ("one, in disorder", "theirs last", "theirs first"):
            found[f"accelerate {kind} {calls}"] = under_accelerate(kind, calls)
        found[f"fabric {kind}"] = under_fabric(kind)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everyone))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DDP, which some of them have left behind, keeps the group


if __name__ == "__main__":
    main()
