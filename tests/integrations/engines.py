"""Runs inside torchrun: DeepSpeed's real engines, as others launch them, and all that they must refuse; one process.

    torchrun --standalone --nproc_per_node 2 -m tests.integrations.engines FOLDER '[{"how": "registered"}, ...]' 1

`worker.py` has the way through our own `initialize`; here somebody else calls `deepspeed.initialize`.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmuon
from distmuon.integrations import deepspeed as integration
from tests.integrations import worker
from tests.integrations.engine_facts import FACTS, config, start
from tests.integrations.worker import STEPS, Case, Seen, WithLoss, inputs, json_options, options
from tests.standing import make_batch
from tests.training import EXACT


def of_case(case: Case, **changes: Any) -> dict[str, Any]:
    return config(
        gradient_accumulation_steps=case.num_micro,
        gradient_clipping=case.clip,
        bf16={"enabled": case.dtype == "bfloat16"},
        optimizer={"type": "DistMuon", "params": json_options()},
        **changes,
    )


def engine_alone(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    """`deepspeed.initialize`; "client": with optimizer=; "unmanaged": `step` ends accumulation; "no_sync": users."""
    inner = WithLoss(dist.get_rank(), case.tied)  # the bf16 block casts
    settings = of_case(case, managed_gradient_accumulation=case.how != "unmanaged")
    given: dict[str, Any] = {}
    if case.how == "client":
        del settings["optimizer"]
        given["optimizer"] = distmuon.DistMuon(inner, **options())
    if case.how == "no_sync":
        settings["gradient_accumulation_steps"] = 1
    engine = start(inner, settings, **given)
    for step in range(case.first, case.last):
        for micro in range(case.num_micro):
            is_last = micro == case.num_micro - 1
            with engine.no_sync() if case.how == "no_sync" and not is_last else nullcontext():
                loss = engine(**inputs(step, micro))["loss"]
                engine.backward(loss / case.num_micro if case.how == "no_sync" else loss)
            if is_last or case.how not in ("unmanaged", "no_sync"):
                engine.step()
        seen.step(engine.optimizer, engine.get_global_grad_norm())
    assert engine.skipped_steps == 0 and engine.global_steps == case.last
    return inner, engine.optimizer


def plugin(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    """accelerate's own DeepSpeed plugin, and our `prepare`."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    from distmuon.integrations.accelerate import prepare

    settings = of_case(case)
    del settings["optimizer"]
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    inner = WithLoss(dist.get_rank(), case.tied)
    optimizer = distmuon.DistMuon(inner, **options())
    model, wrapped = prepare(accelerator, inner, optimizer)
    if case.first:
        accelerator.load_state(str(folder / "plugin"))
    for step in range(case.first, case.last):
        for micro in range(case.num_micro):
            with accelerator.accumulate(model):
                loss = model(**inputs(step, micro))["loss"]
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), case.clip)
                wrapped.step()
                wrapped.zero_grad()
        seen.step(optimizer, norm)
    if case.save:
        accelerator.save_state(str(folder / "plugin"))
    return inner, optimizer


def trainer(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    """transformers.Trainer with `deepspeed=`: `register` and a JSON whose numbers the Trainer fills in."""
    import transformers
    from torch.utils.data import SequentialSampler

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

        def _prepare_input(self, data: Any) -> Any:
            """Inputs as the plain loop has them; under DeepSpeed's bf16 the Trainer casts them, too."""
            return data

    class Record(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "grad_norm" in logs:
                seen.step(hf.deepspeed.optimizer, logs["grad_norm"])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step >= case.last

    filled = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    settings = {
        **auto,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "DistMuon", "params": {**json_options(), **filled}},
    }
    integration.register()
    inner = WithLoss(dist.get_rank(), case.tied)
    args = transformers.TrainingArguments(
        output_dir=str(folder / "hf"),
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
        bf16=case.dtype == "bfloat16",
        disable_tqdm=True,
        save_strategy="steps" if case.save else "no",
        save_steps=case.last,
        seed=0,
        use_cpu=True,
        deepspeed=settings,
    )
    hf = InOrder(
        model=inner, args=args, train_dataset=Data(), data_collator=lambda items: items[0], callbacks=[Record()]
    )
    hf.remove_callback(transformers.PrinterCallback)
    hf.train(resume_from_checkpoint=str(folder / "hf" / f"checkpoint-{case.first}") if case.first else None)
    return inner, hf.deepspeed.optimizer


def engines(case: Case, folder: Path, seen: Seen) -> tuple[nn.Module, distmuon.DistMuon]:
    runners = {"plugin": plugin, "trainer": trainer}
    return runners.get(case.how, engine_alone)(case, folder, seen)


def main() -> None:
    """The facts, if asked for, then each case beside the plain loop; rank 0 writes both."""
    folder, cases = Path(sys.argv[1]), [Case(**case) for case in json.loads(sys.argv[2])]
    faulthandler.enable()
    faulthandler.dump_traceback_later(500, exit=True)  # a hang names its place
    warnings.simplefilter("ignore")  # DeepSpeed's own
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    integration.register()
    worker.RUNNERS["engines"] = engines
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {fact.__name__: fact() for fact in FACTS} if sys.argv[3] == "1" else {})
    results = [worker.compared("engines", case, folder) for case in cases]
    worker.leave(folder, results, everyone)


if __name__ == "__main__":
    main()
