"""A run whose steps are skipped says so, names the parameter, and ends with an error.

Nineteen of twenty steps were skipped once, faster than a healthy run, and neither the screen nor the records nor the
exit status said so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launch import pretrain
from launch.config import parse
from launch.diagnosis import first_not_finite
from launch.logs import RunLog
from launch.parallel import shard_model
from launch.ranks import Ranks
from launch.resume import StopRequest
from launch.run import make_run
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

RUN = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT]


def test_a_run_that_only_skips_ends_with_an_error_and_names_the_parameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 1000; the text under both names is that of the records too."""
    with pytest.raises(ValueError, match=r"train\.max_skipped: the last 3 steps up to step \d+ were skipped"):
        pretrain.main(
            [*RUN, "--train.steps=40", "--optimizer.lr=1e3", "--train.max_skipped=3", f"--log.dir={tmp_path}"]
        )
    run = records(tmp_path)
    train = [record for record in run if record["kind"] == "train"]
    skipped = [record["skipped_steps"] for record in train]
    assert skipped[-3:] == [1, 2, 3] and set(skipped[:-3]) == {0}
    assert [record["grad_norm"] for record in train[-3:]] == [None] * 3  # not finite
    (warning,) = (record for record in run if record["kind"] == "warning")
    assert warning["step"] == train[-3]["step"]
    assert "was skipped: its gradients were not finite, first the gradient of model.layers." in warning["text"]
    assert "summary" not in [record["kind"] for record in run]
    lines = capsys.readouterr().out
    assert f"warning: {warning['text']}" in lines and "grad nan" in lines and "skipped 2" in lines


@pytest.mark.parametrize(("most", "every"), [(0, 1), (4, 1), (4, 3)])
def test_skips_that_stop_in_time_end_nothing(tmp_path: Path, most: int, every: int) -> None:
    """Twice three skipped steps among twelve; also where healthy ones lie in the same interval. 0 never ends a run."""
    config = parse(
        [*RUN, "--train.steps=12", f"--train.max_skipped={most}", f"--log.every={every}", f"--log.dir={tmp_path}"]
    )
    log = RunLog(config.log, config.train.steps)
    run = make_run(config, Ranks(device=torch.device("cpu")), log, StopRequest(), "pretrain")

    def poison(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        poisoned = torch.is_grad_enabled() and run.progress.step + 1 in (4, 5, 6, 9, 10, 11)
        return output * float("nan") if poisoned else output

    run.model.model.norm.register_forward_hook(poison)  # type: ignore[union-attr, arg-type]
    pretrain.train(run)
    log.close()
    found = records(tmp_path)
    assert found[-1]["kind"] == "summary" and found[-1]["skipped_steps"] == 6 == run.progress.skipped_steps
    assert len([record for record in found if record["kind"] == "warning"]) == 1


def _diagnosed(group: Any, arguments: list[str], culprit: str) -> tuple[str, list[bool]]:
    """What is found where the gradient of one weight alone is not finite, on the last rank alone; and whether
    parameters and the next step are bit for bit those of a run that was not diagnosed."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weights = []
    for diagnose in (False, True):
        config = parse([*RUN, *arguments])
        config = replace(config, model=replace(config.model, config={**config.model.config, "attention_dropout": 0.1}))
        ranks = Ranks(rank=rank, world_size=size, device=torch.device("cpu"))
        run = make_run(config, ranks, RunLog(), StopRequest(), "pretrain")
        shard_model(run.model, config, ranks)
        optimizer = run.optimizer()
        broken = _switch(run.model.get_submodule(culprit)) if rank == size - 1 else [False]
        text = ""
        for step in range(3):
            rows = run.corpus.train.next_batch(8, rank, size).split(2)
            broken[0] = step == 1
            pretrain.train_step(run.model, optimizer, rows, 1.0)
            if step == 1:
                assert optimizer.overflow
                if diagnose:
                    text = first_not_finite(run.model, optimizer, rows, ranks)
        optimizer.synchronize()
        weights.append(
            [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in run.model.parameters()]
        )
    return text, [bool(a.equal(b)) for a, b in zip(*weights)]


def _switch(module: nn.Module) -> list[bool]:
    """Once its entry is True, the gradient of the module's output is not finite."""
    broken = [False]
    module.register_forward_hook(lambda _module, _inputs, output: _Nan.apply(output) if broken[0] else output)
    return broken


class _Nan(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float("nan")


@pytest.mark.parametrize("arguments", [[], ["--parallel.shard=fsdp2"]])
@pytest.mark.parametrize("culprit", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_the_first_parameter_in_the_order_of_backward_is_named(spawn: Any, arguments: list[str], culprit: str) -> None:
    """On one rank of four; and no bit of the run changes by the second look."""
    for text, same in spawn(_diagnosed, 4, arguments=arguments, culprit=culprit):
        assert f"first the gradient of {culprit}.weight, of a loss of 5." in text
        assert all(same)


def test_a_broken_weight_is_named_before_any_gradient() -> None:
    config = parse(RUN)
    ranks = Ranks(device=torch.device("cpu"))
    run = make_run(config, ranks, RunLog(), StopRequest(), "pretrain")
    optimizer = run.optimizer()
    rows = run.corpus.train.next_batch(8, 0, 1).split(2)
    pretrain.train_step(run.model, optimizer, rows, None)
    with torch.no_grad():
        run.model.get_parameter("model.layers.0.mlp.down_proj.weight")[3, 3] = float("inf")
    text = first_not_finite(run.model, optimizer, rows, ranks)
    assert text == "parameter model.layers.0.mlp.down_proj.weight itself is not finite (rank 0)"
