"""Each refusal of the integrations, by planting what it refuses; in one process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import distmuon


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("name", ["accelerate", "transformers", "deepspeed", "fabric"])
def test_a_missing_extra_gives_the_line_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "lightning_fabric" if name == "fabric" else name
    for loaded in [key for key in sys.modules if key == f"distmuon.integrations.{name}"]:
        monkeypatch.delitem(sys.modules, loaded)
    for loaded in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)

    class Missing:
        def find_spec(self, fullname: str, *_: Any) -> None:
            if fullname == package or fullname.startswith(f"{package}."):
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ImportError, match=rf'pip install "distmuon\[{name}\]"'):
        importlib.import_module(f"distmuon.integrations.{name}")


# ------------------------------------------------------------------------------------------- accelerate


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate", reason="pip install distmuon[accelerate]")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield module
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def _accelerator(accelerate: Any, **changes: Any) -> Any:
    real = accelerate.Accelerator(cpu=True)
    seen = {"distributed_type": real.distributed_type, "mixed_precision": "no", "gradient_state": real.gradient_state}
    return SimpleNamespace(**{**seen, **changes})


@pytest.mark.refuses("FSDP1", "accelerate", use="`fsdp_version=2`")
@pytest.mark.refuses("FSDP1", "Trainer", use="`fsdp_version=2`")
def test_accelerate_refuses_fsdp1_megatron_fp8_and_a_reduction_a_micro_batch(accelerate: Any) -> None:
    """The Trainer's `attach` asks the same of its accelerator."""
    from distmuon.integrations.accelerate import check

    kinds = accelerate.DistributedType
    with pytest.raises(
        ValueError, match=r"version 1 of FSDP, whose flat.*FullyShardedDataParallelPlugin\(fsdp_version=2"
    ):
        check(_accelerator(accelerate, distributed_type=kinds.FSDP, is_fsdp2=False))
    with pytest.raises(ValueError, match="distributed_type MEGATRON_LM"):
        check(_accelerator(accelerate, distributed_type=kinds.MEGATRON_LM))
    with pytest.raises(ValueError, match="mixed_precision='fp8', which replaces layers"):
        check(_accelerator(accelerate, mixed_precision="fp8"))
    state = SimpleNamespace(plugin_kwargs={"sync_each_batch": True})
    with pytest.raises(ValueError, match="sync_each_batch=True"):
        check(_accelerator(accelerate, gradient_state=state))
    check(_accelerator(accelerate, gradient_state=state, distributed_type=kinds.FSDP, is_fsdp2=True))
    check(_accelerator(accelerate))


def test_accelerates_clips_are_torchs_in_one_process(accelerate: Any) -> None:
    """Gradients stay in `param.grad`, so a part of the parameters may be clipped, and by value."""
    from distmuon.integrations.accelerate import prepare

    accelerator = accelerate.Accelerator(cpu=True)
    model = _model()
    optimizer = distmuon.DistMuon(model, lr=0.02)
    model, wrapped = prepare(accelerator, model, optimizer)
    model(torch.ones(2, 6)).sum().backward()
    assert float(accelerator.clip_grad_norm_(model.parameters(), 0.1)) > 1.0
    part = float(accelerator.clip_grad_norm_(model[0].parameters(), 0.01))
    assert 0.01 < part < 0.1 and model[0].weight.grad is not None
    accelerator.clip_grad_value_(model.parameters(), 1e-4)
    wrapped.step()
    assert 0.0 < optimizer.metrics()["grad_norm"] < 1e-4 * 92**0.5


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("loader, optimizer", r"a DistMuon without its model in \(DataLoader, DistMuon\).*pass the model"),
        ("optimizer", r"a DistMuon without its model in \(DistMuon\)"),
        ("other, optimizer", r"a DistMuon without its model in \(Sequential, DistMuon\)"),
        ("model, sgd", r"no DistMuon in \(Sequential, SGD\).*go through accelerator\.prepare"),
        ("", r"no DistMuon in \(nothing\)"),
    ],
)
def test_prepare_refuses_at_once_what_it_could_not_lead(accelerate: Any, given: str, found: str) -> None:
    """A loader in the model's place was accepted."""
    from distmuon.integrations.accelerate import prepare

    model = _model()
    objects = {
        "model": model,
        "other": _model(),
        "optimizer": distmuon.DistMuon(model),
        "loader": torch.utils.data.DataLoader([torch.zeros(6)]),
        "sgd": torch.optim.SGD(model.parameters(), lr=1.0),
    }
    with pytest.raises(ValueError, match=rf"^distmuon\.integrations\.accelerate\.prepare: {found}"):
        prepare(accelerate.Accelerator(cpu=True), *(objects[name] for name in given.split(", ") if name))


def test_prepare_takes_its_arguments_in_any_order_and_an_optimizer_after_its_model(accelerate: Any) -> None:
    from distmuon.integrations.accelerate import prepare

    accelerator = accelerate.Accelerator(cpu=True)
    model = _model()
    loader = torch.utils.data.DataLoader([torch.ones(6)], 1)
    optimizer = distmuon.DistMuon(model)
    assert accelerator.prepare(model) is model
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    loader, wrapped, scheduler = prepare(accelerator, loader, optimizer, scheduler)
    assert wrapped.optimizer is optimizer and len(loader) == 1
    assert prepare(accelerator, wrapped.optimizer).optimizer is optimizer, "one object alone comes back as one"


def test_a_dropped_accelerator_and_optimizer_are_freed_without_the_collector(accelerate: Any) -> None:
    import gc
    import weakref

    from distmuon.integrations.accelerate import prepare

    model = _model()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, wrapped = prepare(accelerator, model, distmuon.DistMuon(model))
    held = [weakref.ref(each) for each in (accelerator, wrapped.optimizer, model)]
    gc.disable()
    try:
        del accelerator, prepared, wrapped, model
        assert [ref() for ref in held] == [None, None, None]
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------- transformers


def _trainer(accelerate: Any, tmp_path: Any, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_steps": 1, **changes}
    return transformers.Trainer(model=_model(), args=transformers.TrainingArguments(**given))


@pytest.mark.refuses("ZeRO stage >= 1", "Trainer", use="`register()` and stage 0")
def test_attach_refuses_what_would_train_or_save_wrongly(accelerate: Any, tmp_path: Any) -> None:
    from distmuon.integrations.transformers import attach

    with pytest.raises(ValueError, match='save_strategy="best"'):
        attach(_trainer(accelerate, tmp_path, save_strategy="best", metric_for_best_model="loss"))
    trainer = _trainer(accelerate, tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="it was given an optimizer"):
        attach(trainer)
    with pytest.raises(ValueError, match=r"optim_args='momentum=0.9'.*pass them to attach"):
        attach(_trainer(accelerate, tmp_path, optim_args="momentum=0.9"))
    trainer = _trainer(accelerate, tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"args\.deepspeed is set.*deepspeed\.register"):
        attach(trainer)
    trainer = _trainer(accelerate, tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        attach(trainer)


def test_attach_takes_the_trainers_hyperparameters(accelerate: Any, tmp_path: Any) -> None:
    from distmuon.integrations.transformers import attach

    trainer = _trainer(accelerate, tmp_path, learning_rate=0.03, weight_decay=0.2, adam_beta2=0.97, adam_epsilon=1e-7)
    attach(trainer, momentum=0.9)
    optimizer = trainer.create_optimizer()
    groups = {group["rule"]: group for group in optimizer.param_groups}
    assert groups["muon"]["lr"] == groups["adamw"]["lr"] == 0.03
    assert groups["muon"]["weight_decay"] == 0.2 and groups["muon"]["momentum"] == 0.9
    assert tuple(groups["adamw"]["betas"]) == (0.9, 0.97) and groups["adamw"]["eps"] == 1e-7


# ------------------------------------------------------------------------------------------- Fabric


@pytest.mark.refuses("DDP around the model, not silenced", "Fabric", use="`DistMuonStrategy`")
def test_fabric_refuses_another_strategy_values_and_another_order() -> None:
    lightning = pytest.importorskip("lightning_fabric", reason="pip install distmuon[fabric]")
    from distmuon.integrations.fabric import DistMuonStrategy, setup

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = _model()
    with pytest.raises(
        ValueError, match=r"Fabric: strategy SingleDeviceStrategy.*DistMuonStrategy\(\); under ModelPar"
    ):
        setup(fabric, model, distmuon.DistMuon(model))
    fabric = lightning.Fabric(accelerator="cpu", devices=1, strategy=DistMuonStrategy())
    optimizer, other = distmuon.DistMuon(model), _model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    for wrong in ((optimizer, model), (model, sgd), (model,), (other, optimizer), (model, other, optimizer, sgd)):
        kinds = ", ".join(type(each).__name__ for each in wrong)
        with pytest.raises(ValueError, match=rf"fabric\.setup: \({kinds}\); one model and the DistMuon made from it"):
            setup(fabric, *wrong)


# --------------------------------------------------- DeepSpeed, where no engine is needed; others in test_deepspeed.py


@pytest.mark.refuses("ZeRO stage >= 1", "DeepSpeed", use="stage 0")
def test_initialize_refuses_stage_1_and_a_config_without_distmuon() -> None:
    pytest.importorskip("deepspeed", reason="pip install distmuon[deepspeed]")
    from distmuon.integrations.deepspeed import initialize

    muon = {"optimizer": {"type": "DistMuon", "params": {}}}
    with pytest.raises(ValueError, match=r"zero_optimization\.stage 1"):
        initialize(model=_model(), config={**muon, "zero_optimization": {"stage": 1}})
    with pytest.raises(ValueError, match="optimizer 'AdamW' in the config"):
        initialize(model=_model(), config={"optimizer": {"type": "AdamW"}})


def test_partitioned_parameters_are_refused() -> None:
    """zero.Init's `ds_id` is refused by the optimizer itself."""
    model = _model()
    model[0].weight.ds_id = 7
    with pytest.raises(ValueError, match=r"0\.weight: the parameter is partitioned by DeepSpeed"):
        distmuon.DistMuon(model)


def test_parameters_flattened_by_a_framework_are_refused() -> None:
    """What DeepSpeed's stage 1 does to an optimizer that it was told to trust: 1-D partitions in the groups."""
    model = _model()
    optimizer = distmuon.DistMuon(model)
    model(torch.ones(2, 6)).sum().backward()
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
    with pytest.raises(ValueError, match=r"param_groups: they hold 2 parameters.*ZeRO stage 0"):
        optimizer.step()
