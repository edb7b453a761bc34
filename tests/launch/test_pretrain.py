"""Whole runs with the real optimizer: two processes bit for bit twice, every architecture, every rank count alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import pretrain
from tests import forks

ROOT = Path(__file__).parents[2]
TINY = [
    "--model.config.hidden_size=32",
    "--model.config.intermediate_size=64",
    "--model.config.num_hidden_layers=2",
    "--model.config.num_attention_heads=2",
    "--model.config.num_key_value_heads=2",
]
SHORT = [
    "--model.seq_len=32",
    "--train.global_batch=8",
    "--train.micro_batch=2",
    "--train.schedule=constant",
    "--train.warmup_steps=0",
    "--optimizer.lr=1e-2",
    "--train.eval_every=4",
    "--train.eval_batches=1",
    "--log.sample_tokens=3",
    "--log.sinks=[]",
]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def torchrun(folder: Path, *arguments: str, nproc: int = 2) -> list[dict[str, Any]]:
    """A run of 6 steps of the tiny quickstart Llama in processes of its own; warnings are errors there too."""
    given = ["--config", "configs/quickstart.yaml", *TINY, *SHORT, "--train.steps=6", f"--log.dir={folder}", *arguments]
    done = forks.torchrun("launch.pretrain", *given, nproc=nproc, environment={"PYTHONWARNINGS": "error"}, timeout=120)
    assert done.returncode == 0, done.stdout
    return records(folder)


def numbers(run: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must repeat exactly: everything but the times."""
    kept = ("kind", "step", "loss", "lr", "grad_norm", "bytes")
    return [tuple(record.get(key) for key in kept) for record in run if record["kind"] in ("train", "val")]


@pytest.fixture(scope="module")
def muon_run(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return torchrun(tmp_path_factory.mktemp("muon"))


def test_two_ranks_leave_a_complete_record_and_the_loss_falls(muon_run: list[dict[str, Any]]) -> None:
    kinds = [record["kind"] for record in muon_run]
    checked = ["val", "sample"]
    assert kinds == ["run", *checked, *["train"] * 4, *checked, *["train"] * 2, *checked, "summary"]
    train = [record for record in muon_run if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    val = [record["loss"] for record in muon_run if record["kind"] == "val"]
    assert val[0] > val[1] > val[2]
    assert abs(val[0] - 5.545) < 0.1  # log 256: nothing is known before the first step
    for record in train:
        assert set(record["lr"]) == {"muon", "adamw"}
        assert record["grad_norm"] > 0
        assert record["tokens_per_s"] == pytest.approx(8 * 32 * 1e3 / record["step_ms"])
        assert record["bytes"]["reduce_scatter"] > 0
        assert record["bytes"]["all_gather"] > 0
        assert record["tokens"] == record["step"] * 8 * 32
        assert record["peak_bytes"] is None and record["mfu"] is None  # no GPU
        assert 0 < sum(record["stage_ms"].values()) < record["step_ms"]
    summary = muon_run[-1]
    assert summary["val_loss"] == val[-1]
    assert summary["skipped_steps"] == 0
    assert len(summary["per_rank"]) == 2
    assert sum(rank["ns_matrices"] for rank in summary["per_rank"]) == 2 * 7  # each matrix of two layers once


@pytest.mark.slow
def test_two_runs_are_equal_bit_for_bit(muon_run: list[dict[str, Any]], tmp_path: Path) -> None:
    """By day test_resume compares interrupted runs with an unbroken one, bit for bit."""
    again = torchrun(tmp_path)
    assert numbers(again) == numbers(muon_run)


def test_the_baseline_trains_on_the_same_data_over_the_same_shards(
    muon_run: list[dict[str, Any]], tmp_path: Path
) -> None:
    adamw = torchrun(tmp_path, "--optimizer.name=adamw")
    train = [record for record in adamw if record["kind"] == "train"]
    assert set(train[0]["lr"]) == {"adamw"}
    assert train[-1]["loss"] < train[0]["loss"] - 0.3
    assert adamw[1:3] == muon_run[1:3]  # validation and sample before the first step
    assert train[0]["loss"] == muon_run[3]["loss"]  # the same weights, the same batch
    assert sum(rank["ns_matrices"] for rank in adamw[-1]["per_rank"]) == 0


def test_one_process_without_a_group_agrees_with_two(muon_run: list[dict[str, Any]], tmp_path: Path) -> None:
    """Same global batches, so the same run up to the order of sums."""
    arguments = [*TINY, *SHORT, "--train.steps=6", f"--log.dir={tmp_path}"]
    pretrain.main(["--config", str(ROOT / "configs/quickstart.yaml"), *arguments])
    one = [record["loss"] for record in records(tmp_path) if record["kind"] in ("train", "val")]
    two = [record["loss"] for record in muon_run if record["kind"] in ("train", "val")]
    assert one == pytest.approx(two, rel=2e-3)


def test_micro_batches_do_not_change_the_run(tmp_path: Path) -> None:
    arguments = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT, "--train.steps=4"]
    runs = []
    for micro_batch in (8, 2):
        folder = tmp_path / str(micro_batch)
        pretrain.main(
            [
                *arguments,
                f"--train.micro_batch={micro_batch}",
                f"--log.dir={folder}",
                "--optimizer.precision.newton_schulz=float32",
            ]
        )
        runs.append([record["loss"] for record in records(folder) if record["kind"] == "train"])
        assert records(folder)[0]["accumulation"] == 8 // micro_batch
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


GPT2 = [
    "--model.config.n_embd=32",
    "--model.config.n_layer=2",
    "--model.config.n_head=2",
    '--optimizer.routes=[{"pattern": "*.c_attn.weight", "rule": "muon", "split": [32, 32, 32], "split_dim": 1}]',
]
MOONLIGHT = [
    *TINY,
    "--model.config.moe_intermediate_size=16",
    "--model.config.kv_lora_rank=16",
    "--model.config.qk_nope_head_dim=8",
    "--model.config.qk_rope_head_dim=8",
    "--model.config.v_head_dim=16",
    "--model.config.n_routed_experts=4",
]


@pytest.mark.parametrize(
    ("name", "small", "num_matrices"),
    [
        ("gpt2", GPT2, 2 * (3 + 3)),  # a layer: Q, K, V of c_attn; c_proj, c_fc and the other c_proj
        # four of attention; a dense layer of three; then 4 experts of three and a shared one; the router is too small
        ("moonlight_tiny", MOONLIGHT, 2 * 4 + 3 + 4 * 3 + 3),
    ],
)
def test_other_architectures_train(name: str, small: list[str], num_matrices: int, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / f"{name}.yaml")
    pretrain.main(["--config", config, *small, *SHORT, "--train.steps=3", f"--log.dir={tmp_path}"])
    run = records(tmp_path)
    val = [record["loss"] for record in run if record["kind"] == "val"]
    assert val[-1] < val[0] - 0.1
    assert run[-1]["skipped_steps"] == 0
    assert run[-1]["per_rank"][0]["ns_matrices"] == num_matrices


def test_bfloat16_checkpointing_and_routes(tmp_path: Path) -> None:
    """The GPU recipe's options, on the CPU: bfloat16 weights, recomputed activations, the router sent to AdamW."""
    routes = '--optimizer.routes=[{"pattern": "*.mlp.gate.weight", "rule": "adamw"}]'
    options = ["--model.dtype=bfloat16", "--model.gradient_checkpointing=true", "--train.max_grad_norm=null", routes]
    config = str(ROOT / "configs/moonlight_tiny.yaml")
    arguments = [*MOONLIGHT, *SHORT, *options, "--train.steps=3", "--log.every=3", f"--log.dir={tmp_path}"]
    pretrain.main(["--config", config, *arguments])
    train = [record for record in records(tmp_path) if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 2, 3]
    assert train[-1]["loss"] < train[0]["loss"]
    assert train[0]["grad_norm"] > 0, "also where it is not clipped"
