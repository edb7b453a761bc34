"""Facts about accelerate's FSDP2 plugin and the Trainer's, each on two ranks; `fsdp2_worker.py` runs them."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distmuon
from tests.integrations import worker
from tests.integrations.fsdp2_worker import on_cpus, whole
from tests.integrations.worker import WithLoss, inputs, options

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def accelerator(**plugin: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    with on_cpus():
        return Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **plugin))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))


@contextmanager
def counting_whole_parameters(model: nn.Module) -> Iterator[list[int]]:
    """How many trained parameters of `model` exist when accelerate has cut it; accelerate itself holds the last."""
    from accelerate import accelerator as accelerates

    whole_ones = [weakref.ref(param) for param in model.parameters() if param.requires_grad]
    left: list[int] = []
    cut = accelerates.fsdp2_prepare_model

    def counting(*args: Any) -> Any:
        found = cut(*args)
        gc.collect()
        left.append(sum(ref() is not None for ref in whole_ones))
        return found

    with patch.object(accelerates, "fsdp2_prepare_model", counting):
        yield left


def the_same_object() -> dict[str, Any]:
    """What was made with the optimizer before `prepare` works after it; accelerate steps schedules once a rank."""
    from distmuon.integrations.accelerate import prepare

    model, steps = WithLoss(0), []
    given = options()
    given["routes"] = [*given["routes"], distmuon.Route("standing.up.weight", "muon", options={"lr": 0.01})]
    optimizer = distmuon.DistMuon(model, **given)
    optimizer.register_step_post_hook(lambda *_: steps.append(dist.get_rank()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    logical = {spec.fqn: (spec.rule, spec.matrices, spec.shape) for spec in optimizer.layout.specs}
    lead = accelerator()
    with counting_whole_parameters(model) as left:
        prepared, wrapped, scheduler = prepare(lead, model, optimizer, schedule)
    lrs = []
    for step in range(2):
        lead.backward(prepared(**inputs(step, 0))["loss"])
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        lrs.append([group["lr"] for group in optimizer.param_groups])
    again = lead.prepare(prepared, wrapped)
    lead.backward(prepared(**inputs(2, 0))["loss"])
    wrapped.step()
    optimizers = list(lead._optimizers)
    _reset()
    other = WithLoss(0)
    with counting_whole_parameters(other) as left_by_torchs:
        accelerator().prepare(other, torch.optim.AdamW(other.parameters()))
    return {
        "same": wrapped.optimizer is optimizer and schedule.optimizer is optimizer and again[1] is wrapped,
        "schedule knows it": scheduler.optimizers == optimizers == [wrapped],
        "logical": logical == {spec.fqn: (spec.rule, spec.matrices, spec.shape) for spec in optimizer.layout.specs},
        "left whole": [left, left_by_torchs],
        "hooks": steps == [dist.get_rank()] * 3,
        "lrs": lrs,
    }


def own_prepare() -> None:
    model = small()
    prepared, _ = accelerator().prepare(model, distmuon.DistMuon(model))
    prepared(torch.ones(2, 12))


def own_prepare_of_pairs() -> None:
    model = small()
    optimizer = distmuon.DistMuon(list(model.named_parameters()), routes=[distmuon.Route("*weight", "muon")])
    prepared, wrapped = accelerator().prepare(model, optimizer)
    prepared(torch.ones(2, 12)).sum().backward()
    wrapped.step()


def with_state() -> None:
    from distmuon.integrations.accelerate import prepare

    model = small()
    optimizer = distmuon.DistMuon(model)
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    prepare(accelerator(), model, optimizer)


def of_a_part() -> None:
    from distmuon.integrations.accelerate import prepare

    model = small()
    prepare(accelerator(), model, distmuon.DistMuon(model[2], routes="adamw"))


def cut_without_the_plugin() -> None:
    from accelerate import Accelerator

    from distmuon.integrations.accelerate import prepare

    model = small()
    fully_shard(model)
    prepare(Accelerator(cpu=True), model, distmuon.DistMuon(model))


def an_option() -> None:
    from distmuon.integrations.accelerate import prepare

    model = small()
    prepare(accelerator(), model, distmuon.DistMuon(model, overlap="forward"))


def fabrics_setup() -> None:
    from distmuon.integrations.fabric import setup

    model = small()
    setup(fabric(), model, distmuon.DistMuon(model))


def fabrics_own_setup() -> None:
    model = small()
    prepared, _ = fabric().setup(model, distmuon.DistMuon(model))
    prepared(torch.ones(2, 12))


def fabric() -> Any:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    def parallelize(model: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(model, mesh=mesh["data_parallel"])
        return model

    made = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(parallelize, 2, 1))
    made.launch()
    return made


WRONG = (own_prepare, own_prepare_of_pairs, with_state, of_a_part, cut_without_the_plugin, an_option)
WRONG += (fabrics_setup, fabrics_own_setup)


def refusals() -> dict[str, str]:
    """By case, what was raised."""
    messages = {}
    for trigger in WRONG:
        try:
            trigger()
            messages[trigger.__name__] = "nothing was raised"
        except Exception as error:
            messages[trigger.__name__] = f"{type(error).__name__}: {error}"
        _reset()
    return messages


def llama(seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config)


def tokens(step: int) -> Tensor:
    return torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def units_a_layer() -> list[float]:
    """Largest difference of a weight of a Llama: a unit a layer, checkpointed, with rank 0's values; and ZeRO-1."""
    from distmuon.integrations.accelerate import prepare

    lead = accelerator(
        auto_wrap_policy="transformer_based_wrap", activation_checkpointing=True, cpu_ram_efficient_loading=True
    )
    found = []
    for is_cut in (True, False):
        model: Any = llama(dist.get_rank() if is_cut else 0)
        optimizer: Any = distmuon.DistMuon(model, lr=0.02, ns_dtype=torch.float32, max_grad_norm=1.0)
        step_of = optimizer
        if is_cut:
            model, step_of = prepare(lead, model, optimizer)
            units = {name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP")}
            assert {"", "model.layers.0", "model.layers.1", "lm_head"} <= units, units
        for step in range(3):
            model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
            step_of.step()
            step_of.zero_grad()
        optimizer.synchronize()
        named = model.named_parameters()
        found.append({fqn.replace("_checkpoint_wrapped_module.", ""): whole(p.detach()).clone() for fqn, p in named})
    _reset()
    cut, plain = found
    assert cut.keys() == plain.keys()
    return [max(float((cut[fqn] - plain[fqn]).norm() / plain[fqn].norm()) for fqn in plain)]


def trainers_evaluations() -> dict[str, Any]:
    """Evaluations, the best model, two calls of `train`."""
    import transformers

    from distmuon.integrations.transformers import attach

    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (16, 8), generator=torch.Generator())]
    with on_cpus():
        hf = transformers.Trainer(
            model=llama(0),
            args=transformers.TrainingArguments(
                output_dir=common_folder(),
                per_device_train_batch_size=2,
                max_steps=2,
                learning_rate=0.02,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="best",
                metric_for_best_model="loss",
                load_best_model_at_end=True,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                fsdp=True,
                fsdp_config={},
            ),
            train_dataset=data,
            eval_dataset=data,
        )
        hf.remove_callback(transformers.PrinterCallback)
        attach(hf)
        hf.train()
        losses = [entry["eval_loss"] for entry in hf.state.log_history if "eval_loss" in entry]
        best = hf.evaluate()["eval_loss"]
        optimizer = hf.optimizer
        hf.train()
        of_second = [entry["eval_loss"] for entry in hf.state.log_history if "eval_loss" in entry]
    inner: Any = hf.optimizer
    _reset()
    return {
        "losses": losses,
        "best": best,
        "same": hf.optimizer is optimizer,
        "steps": inner.optimizer.metrics()["steps"],
        "second": of_second,
    }


def of_the_page() -> dict[str, int]:
    """The blocks of docs/integrations.md on FSDP2 as they stand there; how many steps DistMuon took in each."""
    import accelerate
    import lightning.pytorch
    import lightning_fabric
    import transformers
    from torch.optim.optimizer import register_optimizer_step_post_hook

    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, batch: Tensor) -> Tensor:
            loss: Tensor = self.net(batch).square().mean()
            return loss

    token_rows = torch.randint(64, (8, 8), generator=torch.Generator())
    kinds = {
        "optimizer =": {},
        "accelerator =": vars(accelerate) | vars(accelerate.utils),
        "attach": {"Trainer": transformers.Trainer, "TrainingArguments": transformers.TrainingArguments},
        "fabric =": vars(lightning_fabric) | vars(lightning_fabric.strategies),
        "class Module": vars(lightning.pytorch.strategies) | {"lightning": lightning.pytorch},
    }
    section = PAGE.read_text().partition("\n## FSDP2\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    steps: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: steps.append(optimizer))
    taken = {}
    for block in blocks:
        kind = next(kind for kind in reversed(kinds) if kind in block)
        given = {
            "torch": torch,
            "distmuon": distmuon,
            "fully_shard": fully_shard,
            "net": Scalar(),
            "model": llama(0) if kind == "attach" else Scalar(),
            "batch": torch.ones(4, 12),
            "loader": torch.utils.data.DataLoader(list(torch.ones(4, 12)), 2),
            "data": [{"input_ids": row, "labels": row} for row in token_rows],
            "folder": common_folder(),
        }
        with on_cpus(), patch.dict(os.environ, ACCELERATE_USE_CPU="true"):
            exec(block, {**kinds[kind], **given})
        taken[kind] = sum(isinstance(optimizer, distmuon.DistMuon) for optimizer in steps)
        steps.clear()
        _reset()
    handle.remove()
    return taken


def common_folder() -> str:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    return folder[0]


def _reset() -> None:
    worker._reset("accelerate")


FACTS: tuple[Callable[[], Any], ...] = (the_same_object, refusals, units_a_layer, trainers_evaluations, of_the_page)
