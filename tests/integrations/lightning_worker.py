"""Runs inside torchrun, or alone: Lightning's Trainer next to a plain loop with DDP, in external mode.

    torchrun --standalone --nproc_per_node 2 -m tests.integrations.lightning_worker FOLDER external
    python -m tests.integrations.lightning_worker FOLDER external|reduce_scatter       # one process, no process group

Each way is a LightningModule as users write it, without a line for DistMuon but the one that makes the optimizer.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import distmuon
from tests.training import digest, state_tensors

STEPS, CUT = 4, 2
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulation": {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "clip by value": {"gradient_clip_val": 0.004, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed", "gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    "bf16-true": {"precision": "bf16-true", "gradient_clip_val": 0.05},
}
GRAD_REDUCTION: Any = sys.argv[2] if len(sys.argv) > 2 else "external"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def network(outputs: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, outputs))


def muon(model: nn.Module) -> distmuon.DistMuon:
    precision = distmuon.Precision(newton_schulz=torch.float32)
    return distmuon.DistMuon(model, lr=0.02, precision=precision, grad_reduction=GRAD_REDUCTION)


def loss_of(model: Any, batch: int) -> Tensor:
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(10 * batch + rank()), dtype=torch.float32)
    return model(inputs.to(next(model.parameters()).dtype)).square().mean() * 3.0


def weights(*models: nn.Module) -> str:
    return digest({f"{n}.{name}": tensor for n, net in enumerate(models) for name, tensor in net.state_dict().items()})


def ends(net: nn.Module, optimizer: distmuon.DistMuon) -> list[Any]:
    """Weights, optimizer state (by position: a module's names differ from those of its part) and the last norm."""
    state = {str(i): tensor for i, tensor in enumerate(state_tensors(optimizer).values())}
    return [weights(net), digest(state), optimizer.metrics()["grad_norm"]]


class Automatic(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = loss_of(self.net, index)  # a resumed Trainer goes on counting, and begins the loader anew
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        self.made = optimizer = muon(self)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]


class Manual(lightning.LightningModule):
    """Two networks in turn, as GANs train them: `self.optimizers()` are Lightning's wrappers."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.critic = network(), network(4)
        self.second = second

    def training_step(self, batch: Tensor, index: int) -> None:
        for model, optimizer in zip((self.body, self.critic), self.optimizers()):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss_of(model, int(batch)))
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [muon(self.body), critics(self.second, self.critic)]


def critics(second: str, critic: nn.Module) -> Any:
    return muon(critic) if second == "muon" else torch.optim.AdamW(critic.parameters(), lr=0.01)


def trainer(folder: Path, steps: int, **given: Any) -> Any:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    strategy = given.pop("strategy", "ddp")
    strategy = strategy if dist.is_initialized() else "auto"
    return lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"enable_checkpointing": False, **given},
    )


def loader(num: int) -> Any:
    return torch.utils.data.DataLoader(torch.arange(num).view(-1, 1), batch_size=None)


def under_the_trainer(folder: Path, way: str) -> dict[str, Any]:
    """An unbroken run that saves in its middle, and one that goes on from there."""
    given, batches = WAYS[way], loader(100)
    whole, rest, every = Automatic(), Automatic(), {"every_n_train_steps": CUT, "save_top_k": -1}
    saving = lightning.callbacks.ModelCheckpoint(folder / way, filename="{step}", **every)
    trainer(folder, STEPS, enable_checkpointing=True, callbacks=[saving], **given).fit(whole, batches)
    first = folder / way / f"step={CUT}.ckpt"
    trainer(folder, STEPS, **given).fit(rest, batches, ckpt_path=first)
    (state,) = torch.load(first)["optimizer_states"]
    return {
        "whole": ends(whole.net, whole.made),
        "resumed": ends(rest.net, rest.made),
        "losses": whole.losses,
        "rest": rest.losses,
        "steps": sorted({float(entry["step"]) for entry in state["state"].values() if "step" in entry}),
    }


def plain(way: str) -> dict[str, Any]:
    """What the Trainer does of it, by hand."""
    given, net = WAYS[way], network()
    if given.get("precision") == "bf16-true":
        net.to(torch.bfloat16)
    optimizer, losses = muon(net), []
    model: Any = DistributedDataParallel(net) if dist.is_initialized() else net
    num_micro, clip = given.get("accumulate_grad_batches", 1), given.get("gradient_clip_val")
    autocast = torch.autocast(
        "cpu", torch.bfloat16, enabled=given.get("precision") == "bf16-mixed", cache_enabled=False
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(num_micro):
            holds = dist.is_initialized() and micro < num_micro - 1
            with model.no_sync() if holds else nullcontext(), autocast:
                loss = loss_of(model, step * num_micro + micro)
            losses.append(float(loss))
            with model.no_sync() if holds else nullcontext():
                (loss / num_micro).backward()
        if clip is not None:
            params = [param for group in optimizer.param_groups for param in group["params"]]  # the Trainer's order
            (clip_grad_value_ if "gradient_clip_algorithm" in given else clip_grad_norm_)(params, clip)
        optimizer.step()
    rest = losses[CUT * num_micro :]
    end = ends(net, optimizer)
    return {"whole": end, "resumed": end, "losses": losses, "rest": rest, "steps": [CUT]}


def manual(folder: Path, second: str) -> str:
    model = Manual(second)
    trainer(folder, 2 * STEPS, strategy="ddp_find_unused_parameters_true").fit(model, loader(STEPS))
    return weights(model.body, model.critic)


def manual_plain(second: str) -> str:
    body, critic = network(), network(4)
    optimizers = (muon(body), critics(second, critic))
    for step in range(STEPS):
        for net, optimizer in zip((body, critic), optimizers):
            optimizer.zero_grad()
            (loss_of(net, step)).backward()
            for param in net.parameters() if dist.is_initialized() else ():
                assert param.grad is not None
                param.grad /= dist.get_world_size()
                dist.all_reduce(param.grad)
            clip_grad_norm_([param for group in optimizer.param_groups for param in group["params"]], 0.05)
            optimizer.step()
    return weights(body, critic)


def default_under_ddp(folder: Path) -> str:
    """DistMuon as it is made without external mode."""
    global GRAD_REDUCTION
    GRAD_REDUCTION = "reduce_scatter"
    try:
        trainer(folder, 1, gradient_clip_val=1.0, precision="bf16-mixed").fit(Automatic(), loader(1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main() -> None:
    folder = Path(sys.argv[1])
    faulthandler.dump_traceback_later(500, exit=True)  # a hang names its place
    warnings.simplefilter("ignore")  # the trainer's own
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    found: dict[str, Any] = {way: [under_the_trainer(folder, way), plain(way)] for way in WAYS}
    for second in ("muon", "adamw"):
        found[f"manual, {second}"] = [manual(folder, second), manual_plain(second)]
    everyone: list[Any] = [found]
    if dist.is_initialized():
        found["default"] = default_under_ddp(folder)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(everyone))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DDP, which some of them have left behind, keeps the group


if __name__ == "__main__":
    main()
