"""The rows of `benchmarks.step`: each system behind one small face, set to the common rule as far as it lets us.

`PEERS` lists all of them in the order of the table. A row says what its rule is, whether that is the common rule in the
same dtype (`equal`), and in `note` what had to be adjusted or cannot be. What others' packages need is imported when
the row is made, so that a missing package is that row's reason and nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distmuon
from benchmarks.setting import Setting, Trainee, shape_groups, split
from distmuon import Sharding


@dataclass
class System:
    """One system that trains its own copy of the model. DDP and plain torch optimizers need nothing but this."""

    trainee: Trainee  # holds the parameters
    model: nn.Module  # what is called: the trainee or its wrapper
    optimizers: list[Any]
    state: list[Tensor] = field(default_factory=list)  # held beside the optimizers' own `state`

    def step(self, loss: Tensor) -> None:
        """Backward, synchronisation and update, until all ranks could read the new parameters."""
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters by name. Collective."""
        return {fqn: _whole(param.detach()) for fqn, param in self.trainee.named_parameters()}

    def held(self) -> list[Tensor]:
        """This rank's tensors of optimizer state, without 0-dim counters."""
        found = [*self.state]
        for optimizer in self.optimizers:
            inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's own copy is empty
            found += [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
        return [t.to_local() if hasattr(t, "to_local") else t for t in found]

    def state_bytes(self) -> int:
        """Bytes of `held`, memory that several of them share counted once."""
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in self.held() if t.numel()}.values())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


class DistMuonSystem(System):
    """Ours. A timed step ends when the all-gathers have arrived, although training would hide them under forward."""

    def step(self, loss: Tensor) -> None:
        super().step(loss)
        self.optimizers[0].synchronize()

    def state_bytes(self) -> int:
        return int(self.optimizers[0].metrics()["state_bytes"])


Make = Callable[[Trainee, Setting], System]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A row. `counted`: "module:function" that orthogonalizes, matrices as its first argument, to be counted."""

    name: str
    make: Make
    rule: str = "muon"
    equal: bool = True
    note: str = ""
    counted: tuple[str, ...] = ()


def ours(**options: Any) -> Make:
    """DistMuon with `options`."""

    def make(trainee: Trainee, setting: Setting) -> System:
        optimizer = distmuon.DistMuon(
            trainee,
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            momentum=setting.momentum,
            adamw_betas=setting.betas,
            adamw_eps=setting.eps,
            **options,
        )
        return DistMuonSystem(trainee, trainee, [optimizer])

    return make


def ddp(trainee: Trainee) -> nn.Module:
    """DDP as a careful user sets it: gradients are views of its buckets."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return trainee
    return DistributedDataParallel(trainee, gradient_as_bucket_view=True, broadcast_buffers=False)


def torch_muon_options(setting: Setting) -> dict[str, Any]:
    """torch.optim.Muon's arguments for the common rule; its defaults are Jordan's triple, 5 steps, Nesterov."""
    return {
        "lr": setting.lr,
        "weight_decay": setting.weight_decay,
        "momentum": setting.momentum,
        "adjust_lr_fn": "match_rms_adamw",
    }


def ddp_torch_muon(trainee: Trainee, setting: Setting) -> System:
    model, (matrices, rest) = ddp(trainee), split(trainee)
    muon = torch.optim.Muon(matrices, **torch_muon_options(setting))
    return System(trainee, model, [muon, torch.optim.AdamW(rest, **setting.adamw)])


def zero_torch_muon(trainee: Trainee, setting: Setting) -> System:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns on import

    model, (matrices, rest) = ddp(trainee), split(trainee)
    shared = {"parameters_as_bucket_view": True}
    muon = ZeroRedundancyOptimizer(matrices, torch.optim.Muon, **shared, **torch_muon_options(setting))
    return System(trainee, model, [muon, ZeroRedundancyOptimizer(rest, torch.optim.AdamW, **shared, **setting.adamw)])


def zero_adamw(trainee: Trainee, setting: Setting) -> System:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, params = ddp(trainee), list(trainee.parameters())
    return System(
        trainee,
        model,
        [ZeroRedundancyOptimizer(params, torch.optim.AdamW, parameters_as_bucket_view=True, **setting.adamw)],
    )


def ddp_adamw(trainee: Trainee, setting: Setting) -> System:
    return System(trainee, ddp(trainee), [torch.optim.AdamW(trainee.parameters(), **setting.adamw)])


def _pytorch_optimizer(trainee: Trainee, setting: Setting) -> System:
    from pytorch_optimizer import DistributedMuon

    model, (matrices, rest) = ddp(trainee), split(trainee)
    groups: list[dict[str, Any]] = [
        {"params": group["params"], "use_muon": True} for group in shape_groups(setting, matrices, "rms", False)
    ]
    groups.append(
        {
            "params": rest,
            "use_muon": False,
            "lr": setting.lr,
            "betas": setting.betas,
            "eps": setting.eps,
            "weight_decay": setting.weight_decay,
        }
    )
    optimizer = DistributedMuon(
        groups,
        lr=setting.lr,
        momentum=setting.momentum,
        weight_decay=setting.weight_decay,
        use_adjusted_lr=True,
    )
    return System(trainee, model, [optimizer])


def _keller_jordan(trainee: Trainee, setting: Setting) -> System:
    from muon import MuonWithAuxAdam

    model, (matrices, rest) = ddp(trainee), split(trainee)
    groups = [
        {**group, "momentum": setting.momentum, "use_muon": True}
        for group in shape_groups(setting, matrices, "aspect", False)
    ]
    groups.append(
        {
            "params": rest,
            "lr": setting.lr,
            "betas": setting.betas,
            "eps": setting.eps,
            "weight_decay": setting.weight_decay,
            "use_muon": False,
        }
    )
    return System(trainee, model, [MuonWithAuxAdam(groups)])


def _optimuon(trainee: Trainee, setting: Setting) -> System:
    import optimuon

    model, (matrices, rest) = ddp(trainee), split(trainee)
    muon = optimuon.Muon(
        list(shape_groups(setting, matrices, "rms", True)),
        momentum=setting.momentum,
        distributed=True,
        gram_ns=False,
        adjust_lr="match_rms_adamw",
        ns_coefficients=(3.4445, -4.7750, 2.0315),
        ns_norm_scale=1.0,
        normuon=False,
        cautious_wd=False,
    )
    return System(trainee, model, [muon, torch.optim.AdamW(rest, **setting.adamw)])


def _dion(trainee: Trainee, setting: Setting) -> System:
    import dion

    def jordan(x: Tensor, epsilon: Tensor | float = 1e-7) -> Tensor:  # traced into dion's own compiled update
        tall = x.size(-2) > x.size(-1)
        x = x.bfloat16().mT if tall else x.bfloat16()
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + epsilon)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x

    model, (matrices, rest) = ddp(trainee), split(trainee)
    groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw", "epsilon": setting.eps}]
    optimizer = dion.Muon(
        groups,
        distributed_mesh=dist.group.WORLD,
        lr=setting.lr,
        mu=setting.momentum,
        betas=setting.betas,
        weight_decay=setting.weight_decay,
        nesterov=True,
        adjust_lr="rms_norm",
        newton_schulz_func=jordan,
    )
    return System(trainee, model, [optimizer])


def all_peers() -> Iterator[Peer]:
    """Every row, ours first."""
    from benchmarks.peers_sharded import SHARDED

    mine, ns = "distmuon.step.bucket:orthogonalize", ("torch.optim._muon:_zeropower_via_newtonschulz",)
    yield Peer(name="distmuon", make=ours(), counted=(mine,))
    yield Peer(
        name="distmuon, gathers under the forward", make=ours(sharding=Sharding(overlap="forward")), counted=(mine,)
    )
    yield Peer(name="distmuon, no overlap", make=ours(sharding=Sharding(overlap=False)), counted=(mine,))
    yield Peer(
        name="distmuon, updates travel",
        make=ours(sharding=Sharding(param_gather="updates")),
        counted=(mine,),
        note="bfloat16 polar factors are gathered in place of float32 parameters",
    )
    yield Peer(
        name="distmuon, the paper's placement",
        make=ours(sharding=Sharding(packing="contiguous", placement="replicated")),
        note="contiguous packing, every holder of a piece repeats Newton-Schulz",
        counted=(mine,),
    )
    yield Peer(name="distmuon AdamW", make=ours(routes="adamw"), rule="adamw")
    yield Peer(name="DDP + AdamW", make=ddp_adamw, rule="adamw", note="state on every rank")
    yield Peer(name="DDP + ZeRO-1 AdamW (torch)", make=zero_adamw, rule="adamw")
    yield Peer(
        name="DDP + torch.optim.Muon", make=ddp_torch_muon, note="every rank does all; state on every rank", counted=ns
    )
    yield Peer(
        name="DDP + ZeRO-1 torch.optim.Muon",
        make=zero_torch_muon,
        counted=ns,
        note="torch's ZeroRedundancyOptimizer around torch.optim.Muon: the best without an install",
    )
    yield Peer(
        name="DDP + dion Muon",
        make=_dion,
        counted=("dion.megabatch_base:muon_update_newton_schulz",),
        note="given Jordan's triple through newton_schulz_func; compiled; state on every rank; "
        "pip install git+https://github.com/microsoft/dion",
    )
    yield Peer(
        name="DDP + KellerJordan Muon",
        make=_keller_jordan,
        counted=("muon:zeropower_via_newtonschulz5",),
        note="pip muon-optimizer; its own scale made equal by one lr and decay a shape",
    )
    yield Peer(
        name="DDP + pytorch-optimizer DistributedMuon",
        make=_pytorch_optimizer,
        counted=("pytorch_optimizer.optimizer.muon.base:zero_power_via_newton_schulz_5",),
        note="one group a shape, as its all-gather needs",
    )
    yield Peer(
        name="DDP + optimuon",
        make=_optimuon,
        counted=("optimuon._muon:newton_schulz",),
        note="its decay made equal by one decay a shape; NorMuon and cautious decay off; state on every rank",
    )
    yield from SHARDED
