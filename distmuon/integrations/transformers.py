"""transformers.Trainer: call `attach` after the Trainer is made; nothing else changes.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    distmuon.integrations.transformers.attach(trainer, momentum=0.95)
    trainer.train()

Learning rate, weight decay and betas come from `TrainingArguments`, other options from `attach`. The optimizer is made
when the Trainer would make its optimizer. `max_grad_norm` clips the averaged gradient; `grad_norm` in the logs is its
norm. With `fsdp=True` FSDP2 shards the model. This module decides when the optimizer is made and when all ranks gather
its state; `accelerate.py` does the rest.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from distmuon.errors import problem
from distmuon.integrations import is_cut, need
from distmuon.integrations.accelerate import check, route
from distmuon.optimizer import DistMuon

transformers: Any = need("transformers", "transformers")


def attach(trainer: Any, **options: Any) -> None:
    """Let `trainer` train with DistMuon. `options`: arguments of `DistMuon`, which override those of the Trainer.

    Raises `ValueError` for `optim_args`, several GPUs in one process, FSDP1, DeepSpeed, without FSDP2
    `save_strategy="best"`, and if the Trainer has an optimizer already.
    """
    args = trainer.args
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise problem(
            "Trainer",
            found="it was given an optimizer",
            needed="attach makes the optimizer",
            cure="leave optimizers and optimizer_cls_and_kwargs out",
        )
    if args.optim_args:
        raise problem(
            "Trainer",
            found=f"optim_args={args.optim_args!r}",
            needed="attach makes the optimizer, and would ignore them",
            cure="pass them to attach as keywords",
        )
    if trainer.is_deepspeed_enabled:
        raise problem(
            "Trainer",
            found="args.deepspeed is set",
            needed="DeepSpeed's engine makes the optimizer",
            cure="call distmuon.integrations.deepspeed.register() instead of attach and name DistMuon in the JSON",
        )
    if args.n_gpu > 1:
        raise problem(
            "Trainer",
            found=f"{args.n_gpu} GPUs in one process (DataParallel)",
            needed="one process a GPU is needed",
            cure="launch with torchrun",
        )
    saves_best = str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"
    if saves_best and not trainer.is_fsdp_enabled:
        raise problem(
            "Trainer",
            found='save_strategy="best", which decides on a save after the callbacks',
            needed="all ranks must gather the state before one of them saves it",
            cure='use save_strategy="steps" with load_best_model_at_end=True',
        )
    given = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "adamw_betas": (args.adam_beta1, args.adam_beta2),
        "adamw_eps": args.adam_epsilon,
        **options,
    }

    class Factory:
        """Stand-in for an optimizer class, of the form that the Trainer calls with the model itself."""

        def __call__(self, model: nn.Module, **kwargs: Any) -> DistMuon:
            optimizer = DistMuon(model, **kwargs)
            route(trainer.accelerator)
            trainer.remove_callback(moments)
            trainer.add_callback(moments)  # after all other callbacks, which may decide on a save
            return optimizer

    moments = _collective_moments()
    trainer.add_callback(moments)
    check(trainer.accelerator)  # now, not when training starts
    trainer.optimizer_cls_and_kwargs = (Factory, given)


def _collective_moments() -> Any:
    """A TrainerCallback for actions that all ranks must take together."""

    class CollectiveMoments(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            """Gather the state on all ranks if a save is due: without FSDP2 only the saving rank asks for it."""
            inner = getattr(optimizer, "optimizer", optimizer)
            if control.should_save and not args.save_only_model and not is_cut(inner):
                inner.consolidate_state_dict()

        on_epoch_end = on_step_end

        def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            """Finish all collectives, so that weights can be read and the process group can be destroyed."""
            getattr(optimizer, "optimizer", optimizer).synchronize()

    return CollectiveMoments()
