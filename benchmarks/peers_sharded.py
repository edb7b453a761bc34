"""Rows whose parameters or engine are not DDP's: DeepSpeed, and the FSDP2 packages. See `peers.py` for the face."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import Peer, System, ours
from benchmarks.setting import Setting, Trainee, rules, shape_groups, split


class EngineSystem(System):
    """DeepSpeed: its engine runs backward and the step."""

    def step(self, loss: Tensor) -> None:
        engine: Any = self.model
        engine.backward(loss)
        engine.step()

    def held(self) -> list[Tensor]:
        """State by flat partition, the float32 copy of this rank's partition, and Muon's flat momentum."""
        zero = self.optimizers[0]
        found = [*zero.single_partition_of_fp32_groups]
        for state in zero.optimizer.state.values():
            found += [t for t in state.values() if isinstance(t, Tensor) and t.ndim]
        return found


def _deepspeed(trainee: Trainee, setting: Setting) -> System:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if next(trainee.parameters()).is_cuda else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    of = rules(trainee)
    for fqn, param in trainee.named_parameters():
        param.use_muon = of[fqn] == "muon"  # type: ignore[attr-defined]
    matrices, rest = split(trainee)
    groups = [*shape_groups(setting, matrices, "aspect", False), {"params": rest}]
    config = {
        "train_micro_batch_size_per_gpu": setting.batch,
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,  # the default, 1.0, clips the orthogonalized update
        "steps_per_print": 1 << 30,
        "optimizer": {
            "type": "Muon",
            "params": {
                "lr": setting.lr,
                "weight_decay": setting.weight_decay,
                "momentum": setting.momentum,
                "betas": list(setting.betas),
                "eps": setting.eps,
                "ns_method": "standard",
                "torch_adam": True,
            },
        },
    }
    engine, optimizer, *_ = deepspeed.initialize(model=trainee, model_parameters=groups, config=config)
    return EngineSystem(trainee, engine, [optimizer])


def _fully_shard(trainee: Trainee, replicas: int = 1) -> None:
    """FSDP2 with the whole model as one unit, so that one backward of given gradients reaches it like any other.

    With `replicas`: HSDP, that many copies of the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(trainee.parameters()).device.type
    size = dist.get_world_size()
    if replicas == 1:
        mesh = init_device_mesh(device, (size,))
    else:
        mesh = init_device_mesh(device, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    fully_shard(trainee, mesh=mesh, reshard_after_forward=False)


def _distmuon_fsdp2(trainee: Trainee, setting: Setting) -> System:
    _fully_shard(trainee)
    return ours()(trainee, setting)


def _distmuon_hsdp(trainee: Trainee, setting: Setting) -> System:
    _fully_shard(trainee, replicas=2)
    return ours()(trainee, setting)


def _muon_fsdp2(trainee: Trainee, setting: Setting, replicas: int = 1) -> System:
    from muon_fsdp2 import Muon

    _fully_shard(trainee, replicas)
    matrices, rest = split(trainee)
    shared = {"lr": setting.lr, "weight_decay": setting.weight_decay}
    groups = [
        {"params": matrices, "use_muon": True, "momentum": setting.momentum, "rms_scale": True, **shared},
        {"params": rest, "use_muon": False, "betas": setting.betas, "eps": setting.eps, **shared},
    ]
    return System(trainee, trainee, [Muon(groups)])


def _no_optimizer(trainee: Trainee, setting: Setting, replicas: int = 1) -> System:
    """What FSDP2 itself takes: gradients are reduced and dropped, and parameters gathered for the next forward."""
    _fully_shard(trainee, replicas)
    return System(trainee, trainee, [torch.optim.SGD(trainee.parameters(), lr=0.0)])


def _torch_muon_fsdp2(trainee: Trainee, setting: Setting) -> System:
    from benchmarks.peers import torch_muon_options

    _fully_shard(trainee)
    matrices, rest = split(trainee)
    muon = torch.optim.Muon(matrices, **torch_muon_options(setting))
    return System(trainee, trainee, [muon, torch.optim.AdamW(rest, **{**setting.adamw, "fused": False})])


def _heavyball(trainee: Trainee, setting: Setting) -> System:
    import heavyball

    _fully_shard(trainee)
    matrices, rest = split(trainee)
    betas = (setting.momentum, setting.betas[1])
    muon = heavyball.Muon(matrices, lr=setting.lr, weight_decay=setting.weight_decay, betas=betas)
    return System(trainee, trainee, [muon, torch.optim.AdamW(rest, **{**setting.adamw, "fused": False})])


def _muonium(trainee: Trainee, setting: Setting) -> System:
    import muonium

    _fully_shard(trainee)
    matrices, rest = split(trainee)
    groups: list[dict[str, Any]] = [
        {"params": group["params"], "lr": group["lr"], "wd": group["weight_decay"]}
        for group in shape_groups(setting, matrices, "aspect", True)
    ]
    groups.append({"params": rest, "algorithm": "adamw", "lr": setting.lr, "wd": setting.weight_decay})
    optimizer = muonium.Muon(
        groups,
        momentum=setting.momentum,
        adam_betas=setting.betas,
        adam_eps=setting.eps,
        use_cautious_wd=False,
        orthogonalization_strategy="newton_schulz",
        foreach=False,
    )
    return System(trainee, trainee, [optimizer])


_WHOLE = "FSDP2 with the model as one unit: parameters, gradients and state are sharded (ZeRO-3's memory)"
_OURS = ("distmuon.step.bucket:orthogonalize",)
SHARDED = (
    Peer(
        name="DeepSpeed ZeRO-1 Muon",
        make=_deepspeed,
        counted=("deepspeed.runtime.zero.muon.original_muon:muon_update",),
        note="ns_method=standard (bfloat16); its own scale made equal by one lr and decay a shape; its default "
        "clip of 1 off; keeps a float32 copy of its partition also where parameters are float32",
    ),
    Peer(name="FSDP2 + distmuon", make=_distmuon_fsdp2, note=_WHOLE, counted=_OURS),
    Peer(name="HSDP + distmuon", make=_distmuon_hsdp, note="as above, in two copies of the model", counted=_OURS),
    Peer(name="FSDP2 + muon-fsdp2", make=_muon_fsdp2, note=_WHOLE, counted=("muon_fsdp2:zeropower_via_newtonschulz5",)),
    Peer(
        name="HSDP + muon-fsdp2",
        make=partial(_muon_fsdp2, replicas=2),
        note="as above, in two copies of the model",
        counted=("muon_fsdp2:zeropower_via_newtonschulz5",),
    ),
    Peer(name="FSDP2 + SGD", make=_no_optimizer, rule="adamw", equal=False, note="SGD with lr 0: FSDP2's own time"),
    Peer(
        name="HSDP + SGD",
        make=partial(_no_optimizer, replicas=2),
        rule="adamw",
        equal=False,
        note="SGD with lr 0: HSDP's own time",
    ),
    Peer(
        name="FSDP2 + torch.optim.Muon",
        make=_torch_muon_fsdp2,
        note=_WHOLE + "; DTensor redistributes inside every product of Newton-Schulz",
        counted=("torch.optim._muon:_zeropower_via_newtonschulz",),
    ),
    Peer(
        name="FSDP2 + heavyball Muon",
        make=_heavyball,
        equal=False,
        counted=("heavyball.utils:inplace_orthogonal_",),
        note=_WHOLE + "; another rule: five other triples, stochastic rounding, its own scale: cannot be made equal",
    ),
    Peer(name="FSDP2 + muonium", make=_muonium, note="pip muonium; imports triton, so this row has never run"),
)
