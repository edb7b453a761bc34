"""Runs inside torchrun: one trainer, all cases of one list in one process, results written by rank 0.

    torchrun --standalone --nproc_per_node 2 -m tests.integrations.worker TRAINER FOLDER '[{"dtype": ...}, ...]'

Every trainer drives the standing model over the same batches; "plain" is the loop of the README that the others must
equal.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from distmuon.cli.arguments import dtype_name
from distmuon.step.placeholder import InReduction
from tests.standing import Batch, Standing, loss_fn, make_batch, routes
from tests.training import EXACT, digest, policies, state_tensors, weights

STEPS = 3


@dataclass(frozen=True)
class Case:
    """One run. `autocast`: float32 weights under the trainer's own bfloat16 autocast."""

    dtype: str = "float32"
    num_micro: int = 1
    clip: float = 0.0
    autocast: bool = False
    first: int = 0
    """Step to start at, from the state saved in `folder`."""
    last: int = STEPS
    save: bool = False
    tied: bool = True
    """Trainer saves models that are not transformers' own through safetensors, which refuses tied weights."""
    scale: float = 0.0
    """float16 autocast and a loss scaler that begins here; in the first step the last rank alone overflows."""
    rounded: bool = False
    """The plain loop rounds float inputs to autocast's dtype, as Fabric does before it calls the model."""
    how: str = ""
    """Which of a trainer's ways (`tests.integrations.engines`)."""
    saved_by: str = "plain"
    """Whose files the plain loop resumes from."""


def without_shared_memory() -> None:
    """Keep DeepSpeed from compiling an all-reduce over shared memory, a minute of C++ that no training calls."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class WithLoss(nn.Module):
    """The standing model as trainers want it: tensors in, loss out."""

    overflows = False  # once, in the first forward

    def __init__(self, seed: int, tied: bool = True) -> None:
        super().__init__()
        self.standing = Standing(seed)
        self.standing.temperature = nn.Parameter(self.standing.temperature.detach().view(1))  # DeepSpeed needs one
        if not tied:
            self.standing.head.weight = nn.Parameter(self.standing.head.weight.detach().clone())

    def forward(self, tokens: Tensor, targets: Tensor, values: Tensor, image: Tensor) -> dict[str, Tensor]:
        loss = loss_fn(self.standing, Batch(tokens, targets, values, image))
        factor, self.overflows = float("inf") if self.overflows else 1.0, False
        return {"loss": loss * factor}


def make_model(case: Case) -> WithLoss:
    """Ranks start from different weights on purpose: rank 0's must be taken."""
    model = WithLoss(dist.get_rank(), case.tied).to(getattr(torch, case.dtype))
    model.overflows = case.scale > 0 and case.first == 0 and dist.get_rank() == dist.get_world_size() - 1
    return model


def options() -> dict[str, Any]:
    renamed = [distmuon.Route(f"standing.{r.pattern}", r.rule, r.split, r.split_dim) for r in routes()]
    return policies(**EXACT, routes=renamed)


def json_options() -> dict[str, Any]:
    """The same as a config of DeepSpeed has them."""
    given = options()
    precision = asdict(given["precision"])
    for name, value in precision.items():
        precision[name] = dtype_name(value) if isinstance(value, torch.dtype) else value
    routes = [asdict(route) for route in given["routes"]]
    return {**given, "sharding": asdict(given["sharding"]), "precision": precision, "routes": routes}


def inputs(step: int, micro: int) -> dict[str, Tensor]:
    return {key: value for key, value in asdict(make_batch(step, dist.get_rank(), micro)).items()}


class Seen:
    """What every trainer must show of its steps: norms, own collectives, and every all-reduce on the wire."""

    def __init__(self) -> None:
        self.norms: list[str] = []
        self.calls: list[dict[str, int]] = []
        self.all_reduces = 0

    def step(self, optimizer: distmuon.DistMuon, norm: Any, scaler: Any = None) -> None:
        self.norms.append(f"{float(norm)!r}, scale {scaler and scaler.get_scale()}")  # texts: a nan equals none
        self.calls.append(dict(optimizer.metrics()["calls"]))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts all-reduces of more than a thousand elements: gradients, not losses and verdicts."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            yield
        raw = profile.profiler.kineto_results.events()  # type: ignore[union-attr]  # events() takes seconds to sort them
        self.all_reduces += sum(e.name() == "gloo:all_reduce" and _elements(e.shapes()) > 1000 for e in raw)


def _elements(shapes: Any) -> int:
    """The largest of an operator's inputs; tensor lists are recorded as lists of shapes."""
    sizes = [1]
    for shape in shapes:
        if shape and isinstance(shape[0], (list, tuple)):
            sizes.append(_elements(shape))
        elif shape:
            sizes.append(int(torch.Size(shape).numel()))
    return max(sizes)


def amp_dtype(case: Case) -> torch.dtype | None:
    return torch.float16 if case.scale else torch.bfloat16 if case.autocast else None


def autocast(case: Case) -> Any:
    return torch.autocast("cpu", amp_dtype(case)) if amp_dtype(case) else nullcontext()


def grad_scaler(case: Case, kind: Any = torch.amp.GradScaler) -> Any:
    """Grows after two steps, so that what it has counted at a save matters. Disabled where nothing is scaled."""
    return kind("cpu", init_scale=case.scale or 1.0, growth_interval=2, enabled=case.scale > 0)


def rounded(case: Case, tensor: Tensor) -> Tensor:
    return tensor.to(amp_dtype(case)) if case.rounded and tensor.is_floating_point() else tensor


Runner = Callable[[Case, Path, Seen], tuple[nn.Module, distmuon.DistMuon]]


def saved_files(case: Case, folder: Path) -> dict[str, Any]:
    """The states of model and optimizer that the trainer `case.saved_by` has left in `folder`."""
    if case.saved_by == "plain":
        return torch.load(folder / "plain.pt")
    if case.saved_by == "fabric":
        return torch.load(folder / "fabric.ckpt")
    from safetensors.torch import load_file

    name = {"accelerate": "accelerate/optimizer.bin", "trainer": f"trainer/checkpoint-{case.first}/optimizer.pt"}
    optimizer = folder / name[case.saved_by]
    return {"model": load_file(optimizer.parent / "model.safetensors"), "optimizer": torch.load(optimizer)}


def plain(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    """The loop of the README."""
    model = make_model(case)
    optimizer, scaler = distmuon.DistMuon(model, **options()), grad_scaler(case, distmuon.GradScaler)
    if case.first:
        saved = saved_files(case, folder)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved.get("scaler", {}))
    for step in range(case.first, case.last):
        for micro in range(case.num_micro):
            with nullcontext() if micro == case.num_micro - 1 else optimizer.no_sync():
                with autocast(case):
                    loss = model(**{key: rounded(case, value) for key, value in inputs(step, micro).items()})["loss"]
                scaler.scale(loss / case.num_micro).backward()
        scaler.unscale_(optimizer)
        norm = optimizer.clip_grad_norm_(case.clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.step(optimizer, norm, scaler if case.scale else None)
    if case.save:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        if dist.get_rank() == 0:
            torch.save(state, folder / "plain.pt")
        dist.barrier()
    return model, optimizer


def ddp(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    """DDP kept as a wrapper, silenced; the user holds only its no_sync open."""
    from torch.nn.parallel import DistributedDataParallel

    from distmuon.integrations.ddp import silence

    inner = make_model(case)
    optimizer = distmuon.DistMuon(inner, **options())
    model = silence(DistributedDataParallel(inner, bucket_cap_mb=0.05), optimizer)
    for step in range(case.first, case.last):
        for micro in range(case.num_micro):
            with nullcontext() if micro == case.num_micro - 1 else model.no_sync():
                with autocast(case):
                    loss = model(**inputs(step, micro))["loss"]
                (loss / case.num_micro).backward()
        kinds = {type(p.grad) for p in inner.parameters() if p.grad is not None}
        assert kinds == {InReduction}, "DDP's buckets were dropped"
        norm = optimizer.clip_grad_norm_(case.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        seen.step(optimizer, norm)
    return inner, optimizer


def plant_fp16(case: Case, accelerator: Any) -> None:
    """What accelerate sets for mixed_precision="fp16" on a GPU; on a CPU it ignores the word."""
    if case.scale:
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = grad_scaler(case)


def accelerate(
    case: Case, folder: Path, seen: Seen, inner: WithLoss | None = None, **given: Any
) -> tuple[nn.Module, distmuon.DistMuon]:
    """`given`: to the accelerator, with a model of its own."""
    from accelerate import Accelerator

    from distmuon.integrations.accelerate import prepare

    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=case.num_micro, mixed_precision="bf16" if case.autocast else "no", **given
    )
    plant_fp16(case, accelerator)
    inner = make_model(case) if inner is None else inner
    optimizer = distmuon.DistMuon(inner, **options())
    model, wrapped = prepare(accelerator, inner, optimizer)
    if case.first:
        accelerator.load_state(str(folder / "accelerate"))
    for step in range(case.first, case.last):
        for micro in range(case.num_micro):
            with accelerator.accumulate(model):
                loss = model(**inputs(step, micro))["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), case.clip or float("inf"))
                wrapped.step()
                wrapped.zero_grad()
        seen.step(optimizer, norm, accelerator.scaler)
    if case.save:
        accelerator.save_state(str(folder / "accelerate"))
    return inner, optimizer


def trainer(
    case: Case, folder: Path, seen: Seen, inner: WithLoss | None = None, **given: Any
) -> tuple[nn.Module, distmuon.DistMuon]:
    """`given`: to the Trainer's arguments, with a model of its own."""
    import transformers
    from torch.utils.data import SequentialSampler

    from distmuon.integrations.transformers import attach

    world = dist.get_world_size()

    class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
        """Item i goes to rank i % world."""

        def __len__(self) -> int:
            return STEPS * case.num_micro * world

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            micro, rank = divmod(index, world)
            step, micro = divmod(micro, case.num_micro)
            return asdict(make_batch(step, rank, micro))

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(Data())

    class Record(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "grad_norm" in logs:
                seen.step(opt(), logs["grad_norm"], hf.accelerator.scaler)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step >= case.last

    inner = make_model(case) if inner is None else inner
    args = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=case.num_micro,
        max_steps=STEPS,
        max_grad_norm=case.clip,
        learning_rate=EXACT["lr"],
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=case.autocast,
        disable_tqdm=True,
        save_strategy="steps" if case.save else "no",
        save_steps=case.last,
        seed=0,
        **given,
    )
    hf = InOrder(
        model=inner, args=args, train_dataset=Data(), data_collator=lambda items: items[0], callbacks=[Record()]
    )
    hf.remove_callback(transformers.PrinterCallback)
    plant_fp16(case, hf.accelerator)
    attach(hf, **{key: value for key, value in options().items() if key != "lr"})

    def opt() -> distmuon.DistMuon:
        return getattr(hf.optimizer, "optimizer", hf.optimizer)

    hf.train(resume_from_checkpoint=str(folder / "trainer" / f"checkpoint-{case.first}") if case.first else None)
    assert not opt()._engine.must_wait, "a work under way keeps a thread of gloo's past the group"
    return inner, opt()


def deepspeed(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    from distmuon.integrations.deepspeed import initialize

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.num_micro,
        "gradient_clipping": case.clip,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "DistMuon", "params": json_options()},
        "bf16": {"enabled": case.dtype == "bfloat16"},
        "torch_autocast": {"enabled": case.autocast, "dtype": "bfloat16"},
    }
    inner = WithLoss(dist.get_rank(), case.tied)  # the bf16 block casts
    engine, optimizer, _, _ = initialize(model=inner, config=config)
    if case.first:
        engine.load_checkpoint(str(folder / "deepspeed"))
    for step in range(case.first, case.last):
        for micro in range(case.num_micro):
            loss = engine(**inputs(step, micro))["loss"]
            engine.backward(loss)
            engine.step()
        seen.step(optimizer, engine.get_global_grad_norm())
    assert engine.skipped_steps == 0 and engine.global_steps == case.last
    if case.save:
        engine.save_checkpoint(str(folder / "deepspeed"))
    return inner, optimizer


def fabric_loop(
    lightning: Any, case: Case, folder: Path, seen: Seen, state: dict[str, Any], optimizer: distmuon.DistMuon
) -> None:
    """The user's loop under Fabric, between a load and a save of `state`."""
    model, wrapped = state["model"], state["optimizer"]
    if case.first:
        lightning.load(folder / "fabric.ckpt", state)
    for step in range(case.first, case.last):
        for micro in range(case.num_micro):
            with lightning.no_backward_sync(model, enabled=micro < case.num_micro - 1):
                loss = model(**inputs(step, micro))["loss"]
                lightning.backward(loss / case.num_micro)
        norm = lightning.clip_gradients(model, wrapped, max_norm=case.clip or float("inf"))
        wrapped.step()
        wrapped.zero_grad()
        seen.step(optimizer, norm, getattr(lightning.strategy.precision, "scaler", None))
    if case.save:
        lightning.save(folder / "fabric.ckpt", state)


def fabric(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    from distmuon.integrations.fabric import DistMuonStrategy, setup

    plugins = [MixedPrecision("16-mixed", "cpu", grad_scaler(case))] if case.scale else []  # Fabric makes it on a GPU
    lightning = Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=DistMuonStrategy(),
        plugins=plugins,
        precision=None if case.scale else "bf16-mixed" if case.autocast else "32-true",
    )
    lightning.launch()
    inner = make_model(case)
    optimizer = distmuon.DistMuon(inner, **options())
    model, wrapped = setup(lightning, inner, optimizer)
    state = {
        "model": model,
        "optimizer": wrapped,
        **({"precision": lightning.strategy.precision} if case.scale else {}),
    }
    fabric_loop(lightning, case, folder, seen, state, optimizer)
    return inner, optimizer


RUNNERS: dict[str, Runner] = {f.__name__: f for f in (plain, ddp, accelerate, trainer, deepspeed, fabric)}


def _reset(name: str) -> None:
    """Trainers keep their state in singletons."""
    if name in ("accelerate", "trainer", "engines"):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()


def compared(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """What the trainer and the plain loop made of one case, by name. Collective."""
    of_case: dict[str, Any] = {}
    for who in (name, "plain"):
        seen = Seen()
        with seen.watching():
            model, optimizer = RUNNERS[who](case, folder, seen)
        ends, state = weights(model, optimizer), state_tensors(optimizer)
        everyone: list[Any] = [None] * dist.get_world_size()
        mine = (digest(ends), digest(state), seen.norms, seen.calls, seen.all_reduces)
        dist.all_gather_object(everyone, mine)
        of_case[who] = {"ranks": everyone, "weights": ends, "num_buckets": len(optimizer.layout.buckets)}
        del model, optimizer
        _reset(who)
    return of_case


def main() -> None:
    """Each case under the trainer and, unless it resumes, under the plain loop too."""
    name, folder, cases = sys.argv[1], Path(sys.argv[2]), [Case(**case) for case in json.loads(sys.argv[3])]
    faulthandler.enable()
    faulthandler.dump_traceback_later(500, exit=True)  # a hang names its place
    warnings.simplefilter("ignore")  # the trainers' own
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [compared(name, case, folder) for case in cases]
    leave(folder, results)


def leave(folder: Path, results: Any, facts: list[Any] | None = None) -> None:
    """Write rank 0's `results`, and the `facts` of all ranks, and end this process."""
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
        if facts is not None:
            (folder / "facts.json").write_text(json.dumps(facts))
    gc.collect()  # trainers keep the optimizer in reference cycles; it must go before the process group does
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # what the trainers have imported keeps the group, whose threads may abort the interpreter's farewell


if __name__ == "__main__":
    main()
