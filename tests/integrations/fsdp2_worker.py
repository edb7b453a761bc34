"""Runs inside torchrun: FSDP2 under each trainer, next to `fully_shard` and a loop by hand, all in one process.

    torchrun --standalone --nproc_per_node 2 -m tests.integrations.fsdp2_worker FOLDER '{"accelerate": [{...}, ...]}' 1

accelerate, and the Trainer through it, take their FSDP plugin on accelerators only; on CPUs they go on without a word.
`on_cpus` sets what they set there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import distmuon
from tests.integrations import worker
from tests.integrations.worker import Case, Seen, WithLoss, inputs, options
from tests.training import digest, state_tensors

Run = tuple[nn.Module, distmuon.DistMuon]
ROUNDED = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)  # accelerate's for "bf16"


def make_model(case: Case) -> WithLoss:
    """Equal on all ranks, unless rank 0's is to be taken."""
    return WithLoss(dist.get_rank() if case.how == "efficient" else 0, case.tied).to(getattr(torch, case.dtype))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def by_hand(case: Case, seen: Seen, like: str) -> Run:
    """From the first step on, so that it shows what a resumed run must end with.

    Lightning's and Fabric's clips sum in the order of the param groups. Lightning shows no norm but the optimizer's,
    and reduces in each micro-batch.
    """
    model: Any = WithLoss(0, case.tied).to(getattr(torch, case.dtype))
    fully_shard(model, **({"mp_policy": ROUNDED} if case.autocast else {}))
    optimizer = distmuon.DistMuon(model, **options())
    for step in range(case.last):
        for micro in range(case.num_micro):
            model.set_requires_gradient_sync(like == "lightning" or micro == case.num_micro - 1)
            (model(**inputs(step, micro))["loss"] / case.num_micro).backward()
        grads = [whole(param.grad).double() for param in model.parameters() if param.grad is not None]
        true = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        params = params if like in ("fabric", "lightning") else list(model.parameters())
        norm: Any = nn.utils.clip_grad_norm_(params, case.clip or float("inf"))
        of_dtype = {
            "rtol": 1e-5 if case.dtype == "float32" else 1e-2,
            "atol": 0.0,
        }  # torch sums in the gradients' dtype
        torch.testing.assert_close(norm.full_tensor().double(), true, **of_dtype)
        optimizer.step()
        optimizer.zero_grad()
        if step >= case.first:
            seen.step(optimizer, optimizer.metrics()["grad_norm"] if like == "lightning" else norm)
    return model, optimizer


@contextmanager
def on_cpus() -> Iterator[None]:
    """AcceleratorState as it is with a plugin and GPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with patch.object(AcceleratorState, "__init__", with_plugin):
        try:
            yield
        finally:
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it for good


def state_dict_type(case: Case) -> str:
    return "SHARDED_STATE_DICT" if case.how == "sharded" else "FULL_STATE_DICT"


def accelerate(case: Case, folder: Path, seen: Seen) -> Run:
    from accelerate.utils import FullyShardedDataParallelPlugin

    with on_cpus():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type=state_dict_type(case), cpu_ram_efficient_loading=case.how == "efficient"
        )
        return worker.accelerate(case, folder, seen, make_model(case), fsdp_plugin=plugin)


def trainer(case: Case, folder: Path, seen: Seen) -> Run:
    settings = {"state_dict_type": state_dict_type(case), "cpu_ram_efficient_loading": case.how == "efficient"}
    with on_cpus():
        return worker.trainer(case, folder, seen, make_model(case), fsdp=True, fsdp_config=settings)


def fabric(case: Case, folder: Path, seen: Seen) -> Run:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(model, mesh=mesh["data_parallel"])
        return model

    lightning = Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=ModelParallelStrategy(
            parallelize,
            data_parallel_size=dist.get_world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=case.how == "sharded",
        ),
    )
    lightning.launch()
    net = make_model(case)
    model = lightning.setup_module(net)
    optimizer = distmuon.DistMuon(net, **options())
    wrapped = lightning.setup_optimizers(optimizer)
    state = {"model": model, "optimizer": wrapped}
    worker.fabric_loop(lightning, case, folder, seen, state, optimizer)
    return net, optimizer


def lightning(case: Case, folder: Path, seen: Seen) -> Run:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model(case)

        def configure_model(self) -> None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            self.made = distmuon.DistMuon(self.net, **options())
            return self.made

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            step, micro = divmod(index, case.num_micro)
            loss: Tensor = self.net(**inputs(step, micro))["loss"]
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Tensor, index: int) -> None:
            if index % case.num_micro == case.num_micro - 1:
                seen.step(self.made, self.made.metrics()["grad_norm"])

    world = dist.get_world_size()
    saving = pl.callbacks.ModelCheckpoint(
        folder / "lightning", filename="{step}", every_n_train_steps=case.last, save_top_k=-1
    )
    module = Module()
    pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=case.how == "sharded"
        ),
        max_steps=case.last,
        gradient_clip_val=case.clip or None,
        accumulate_grad_batches=case.num_micro,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_checkpointing=case.save,
        callbacks=[saving] if case.save else [],
    ).fit(
        module,
        torch.utils.data.DataLoader(torch.arange(100).view(-1, 1), batch_size=None),
        ckpt_path=folder / "lightning" / f"step={case.first}.ckpt" if case.first else None,
    )
    return module.net, module.made


RUNNERS: dict[str, Callable[[Case, Path, Seen], Run]] = {
    f.__name__: f for f in (accelerate, trainer, fabric, lightning)
}


def compared(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """What the trainer and the loop by hand made of one case, by name. Collective."""
    of_case: dict[str, Any] = {}
    for who in (name, "by hand"):
        seen = Seen()
        model, optimizer = RUNNERS[name](case, folder, seen) if who == name else by_hand(case, seen, name)
        ends = {fqn: whole(param.detach()).clone() for fqn, param in model.named_parameters()}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (digest(ends), digest(state_tensors(optimizer)), seen.norms, seen.calls))
        of_case[who] = {"ranks": everyone, "weights": ends}
        del model, optimizer
        worker._reset(who)
    return of_case


def main() -> None:
    """The facts, if asked for, then each case; rank 0 writes both."""
    from tests.integrations.fsdp2_facts import FACTS

    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    faulthandler.enable()
    faulthandler.dump_traceback_later(500, exit=True)  # a hang names its place
    warnings.simplefilter("ignore")  # the trainers' own
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {fact.__name__: fact() for fact in FACTS} if sys.argv[3] == "1" else {})
    results = {name: [compared(name, Case(**case), folder) for case in of_name] for name, of_name in cases.items()}
    worker.leave(folder, results, everyone)


if __name__ == "__main__":
    main()
