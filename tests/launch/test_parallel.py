"""`parallel`: every sharding trains the same model on the same data, and a run may change its sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from launch.config import ModelConfig, ParallelConfig, parse
from launch.data import open_corpus
from launch.logs import open_log
from launch.models import build_model, next_token_loss
from launch.parallel import shard_model, tensor_parallel_plan
from launch.pretrain import train
from launch.ranks import Ranks
from launch.resume import StopRequest
from launch.run import make_run, validate
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

RUN = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT, "--train.global_batch=16"]
RUN += ["--optimizer.precision.newton_schulz=float32", "--train.steps=4"]
FSDP2 = ["--parallel.shard=fsdp2"]
HSDP = ["--parallel.shard=hsdp", "--parallel.replicas=2"]
TP = ["--parallel.shard=fsdp2", "--parallel.tp=2"]
ALL = {"fsdp2": FSDP2, "hsdp": HSDP, "tp": TP, "hsdp with tp": [*HSDP, "--parallel.tp=2"]}


def _ranks(tp: int) -> Ranks:
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if size > 1 else 0
    return Ranks(rank=rank, world_size=size, tp=tp if size > 1 else 1, device=torch.device("cpu"))


def _torch_adamw(group: Any, arguments: list[str]) -> tuple[list[float], int]:
    """Losses before each of four steps of torch.optim.AdamW on the sharded model, the last by `validate`; and the
    elements that this rank holds."""
    config = parse([*RUN, *arguments])
    ranks = _ranks(config.parallel.tp)
    torch.manual_seed(config.train.seed)
    corpus = open_corpus(config)
    model = build_model(config.model, corpus.vocab_size)
    if ranks.world_size > 1:
        shard_model(model, config, ranks)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    rules = {"lr": config.optimizer.lr, "betas": config.optimizer.adamw_betas, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, **rules)  # type: ignore[arg-type]
    losses = []
    for _ in range(config.train.steps):
        rows = corpus.train.next_batch(config.train.global_batch, ranks.data_rank, ranks.data_size)
        loss = next_token_loss(model, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(ranks.sum(loss.detach()).item() / ranks.world_size)
    # 7 windows: not all ranks have as many
    losses.append(validate(model, corpus.val, corpus.val.spread(7), 1, ranks))
    return losses, held


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["fsdp2", "tp", pytest.param("hsdp", marks=SLOW), pytest.param("hsdp with tp", marks=SLOW)]
)
def test_every_sharding_is_the_same_model_on_the_same_data(spawn: Any, name: str) -> None:
    """The placement alone, by torch's own optimizer: tensor parallel ranks read the same batches, replicas other
    ones, and a validation of FSDP2 in which ranks have different numbers of windows ends."""
    wanted, size = _torch_adamw(None, [])
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)  # what tp cuts
    others = size - matrices
    part = {"fsdp2": size / 4, "hsdp": size / 2, "tp": matrices / 4 + others / 2, "hsdp with tp": matrices / 2 + others}
    for losses, held in spawn(_torch_adamw, 4, arguments=ALL[name]):
        assert losses == pytest.approx(wanted, rel=2e-5)
        assert held == part[name]


def _pretrain(group: Any, folder: str, arguments: list[str]) -> bool:
    """The recipe in this pool's processes."""
    config = parse([*RUN, *arguments, f"--log.dir={folder}"])
    ranks = _ranks(config.parallel.tp)
    with open_log(config.log, rank=ranks.rank, steps=config.train.steps) as log:
        run = make_run(config, ranks, log, StopRequest(), "pretrain")
        train(run)
    return isinstance(run.model, FSDPModule)


def _losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if record["kind"] in ("train", "val")]


def test_the_recipe_has_one_curve_under_each_sharding(spawn: Any, tmp_path: Path) -> None:
    """With clipping, accumulation and validation, and samples: the forwards of FSDP2 and of tensor parallelism are
    collective, so a rank that takes another number of them hangs."""
    curves, samples = {}, {}
    for name, arguments in {"zero1": [], **ALL}.items():
        spawn(_pretrain, 4, folder=str(tmp_path / name), arguments=[*arguments, "--log.sample_tokens=8"])
        curves[name] = _losses(tmp_path / name)
        samples[name] = [r["text"] for r in records(tmp_path / name) if r["kind"] == "sample"]
        (summary,) = (record for record in records(tmp_path / name) if record["kind"] == "summary")
        assert sum(rank["ns_matrices"] for rank in summary["per_rank"]) == 14, "each matrix once, whatever holds it"
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["zero1"], rel=2e-5), name
        assert samples[name] == samples["zero1"] and all(samples[name]), name
    assert curves["zero1"][-1] < curves["zero1"][0] - 0.5


@pytest.mark.parametrize("name", ["fsdp2", "tp"])
def test_the_baseline_is_torchs_adamw(spawn: Any, tmp_path: Path, name: str) -> None:
    given = [*ALL[name], "--optimizer.name=adamw", "--train.max_grad_norm=null"]
    assert spawn(_pretrain, 4, folder=str(tmp_path), arguments=given) == [True] * 4
    wanted, _ = _torch_adamw(None, [])
    assert [r["loss"] for r in records(tmp_path) if r["kind"] == "train"] == pytest.approx(wanted[:4], rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_under_another_sharding(spawn: Any, tmp_path: Path) -> None:
    """A step under each: the unbroken run's curve."""
    saving = ["--checkpoint.every=1"]
    spawn(_pretrain, 4, folder=str(tmp_path / "unbroken"), arguments=saving)
    for steps, arguments in enumerate(([], FSDP2, ALL["hsdp with tp"], []), start=1):
        given = [*saving, *arguments, f"--train.steps={steps}", "--train.eval_every=100"]
        spawn(_pretrain, 4, folder=str(tmp_path / "broken"), arguments=given)
    losses, wanted = (
        [r["loss"] for r in records(tmp_path / name) if r["kind"] == "train"] for name in ("broken", "unbroken")
    )
    assert losses == pytest.approx(wanted, rel=2e-5)
    assert [r["resumed_from"] for r in records(tmp_path / "broken") if r["kind"] == "run"] == [0, 1, 2, 3]


def test_bfloat16_and_recomputed_activations_under_fsdp2(spawn: Any, tmp_path: Path) -> None:
    given = [*FSDP2, "--model.dtype=bfloat16", "--model.gradient_checkpointing=true"]
    spawn(_pretrain, 4, folder=str(tmp_path), arguments=given)
    losses = _losses(tmp_path)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--parallel.replicas=2"], "parallel.replicas: found 2 with parallel.shard zero1"),
        (["--parallel.shard=hsdp"], "parallel.replicas: found 1 with parallel.shard hsdp"),
        (["--parallel.tp=2"], "parallel.tp: found 2 with parallel.shard zero1"),
        (["--parallel.tp=0"], "parallel.tp: found 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert named in capsys.readouterr().err


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel: found 6 ranks for 2 replicas of tp 2; a multiple of 4 ranks"):
        ParallelConfig(shard="hsdp", replicas=2, tp=2).mesh_shape(6)
    assert ParallelConfig(shard="hsdp", replicas=2, tp=2).mesh_shape(12) == (2, 3, 2)
    with pytest.raises(ValueError, match=r"parallel\.shard: found fsdp2 in a single process"):
        shard_model(torch.nn.Linear(2, 2), parse(FSDP2), _ranks(1))
    small = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 1}
    with torch.device("meta"):
        llama = build_model(ModelConfig(config=small), 256)
        gpt2 = build_model(ModelConfig(arch="gpt2", config={"n_embd": 32, "n_layer": 1, "n_head": 2}), 256)
        qwen = build_model(ModelConfig(arch="qwen3", config={**small, "head_dim": 8}), 256)
    with pytest.raises(ValueError, match=r"parallel\.tp: found 2 for num_attention_heads 3"):
        tensor_parallel_plan(llama, 2)
    with pytest.raises(ValueError, match="found 2 for arch gpt2, whose plan in transformers has no entry"):
        tensor_parallel_plan(gpt2, 2)
    with pytest.raises(ValueError, match="found 3 for arch qwen3, whose plan in transformers has replicated_with_grad"):
        tensor_parallel_plan(qwen, 3)
