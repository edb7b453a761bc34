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
    with pytest.raises(ImportError, match=rf"pip install distmuon\[{name}\]"):
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


@pytest.mark.refuses("ZeRO stage >= 1, FSDP", "accelerate", use="plain data parallelism")
def test_accelerate_refuses_sharding_fp8_and_a_reduction_a_micro_batch(accelerate: Any) -> None:
    from distmuon.integrations.accelerate import check

    kinds = accelerate.DistributedType
    with pytest.raises(ValueError, match="distributed_type FSDP"):
        check(_accelerator(accelerate, distributed_type=kinds.FSDP))
    with pytest.raises(ValueError, match="mixed_precision='fp8', which exchanges layers"):
        check(_accelerator(accelerate, mixed_precision="fp8"))
    state = SimpleNamespace(plugin_kwargs={"sync_each_batch": True})
    with pytest.raises(ValueError, match="sync_each_batch=True"):
        check(_accelerator(accelerate, gradient_state=state))
    check(_accelerator(accelerate))


@pytest.mark.refuses("clipping by value", "accelerate", use="`clip_grad_norm_`")
def test_accelerates_clip_is_the_optimizers_even_in_one_process(accelerate: Any) -> None:
    """torch's own sees no gradient at all and returns 0 in silence: the planted fault, then the cure."""
    from distmuon.integrations.accelerate import prepare

    accelerator = accelerate.Accelerator(cpu=True)
    model = _model()
    optimizer = distmuon.DistMuon(model, lr=0.02)
    model(torch.ones(2, 6)).sum().backward()
    assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)) == 0.0
    optimizer.zero_grad()
    model, wrapped = prepare(accelerator, model, optimizer)
    model(torch.ones(2, 6)).sum().backward()
    assert float(accelerator.clip_grad_norm_(model.parameters(), 0.1)) > 1.0
    with pytest.raises(ValueError, match="clip_grad_value_: asked for"):
        accelerator.clip_grad_value_(model.parameters(), 0.1)
    wrapped.step()


# ------------------------------------------------------------------------------------------- transformers


def _trainer(accelerate: Any, tmp_path: Any, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    given = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_steps": 1, **changes}
    return transformers.Trainer(model=_model(), args=transformers.TrainingArguments(**given))


@pytest.mark.refuses("ZeRO stage >= 1, FSDP", "Trainer", use="`register()` and stage 0")
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
@pytest.mark.refuses("ZeRO stage >= 1, FSDP", "Fabric", use="`DistMuonStrategy`")
@pytest.mark.refuses("clipping by value", "Fabric", use="`clip_grad_norm_`")
def test_fabric_refuses_another_strategy_values_and_other_optimizers() -> None:
    lightning = pytest.importorskip("lightning_fabric", reason="pip install distmuon[fabric]")
    from distmuon.integrations.fabric import DistMuonStrategy, setup

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = _model()
    with pytest.raises(ValueError, match="Fabric: strategy SingleDeviceStrategy"):
        setup(fabric, model, distmuon.DistMuon(model))
    strategy = DistMuonStrategy()
    with pytest.raises(ValueError, match="a SGD; it averages no gradients"):
        strategy.setup_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="clip_val=1"):
        strategy.clip_gradients_value(model, None, 1.0)


# --------------------------------------------------- DeepSpeed, where no engine is needed; others in test_deepspeed.py


@pytest.mark.refuses("ZeRO stage >= 1, FSDP", "DeepSpeed", use="stage 0")
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
