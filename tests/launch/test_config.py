"""One vocabulary: YAML, then the command line; what nobody knows is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distmuon import Precision, Sharding
from launch.config import Config, DataConfig, OptimizerConfig, RouteConfig, TrainConfig, as_dict, parse
from launch.models import build_model, num_parameters

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_builds_its_model(path: Path) -> None:
    config = parse(["--config", str(path)])
    with torch.device("meta"):
        model = build_model(config.model, 256 if config.data.source == "stdlib" else None)
    low, high = {"llama_1b_gpu": (1.0e9, 1.3e9)}.get(path.stem, (1e6, 3e6))
    assert low < num_parameters(model) < high
    assert all(config.train.accumulation(world_size) >= 1 for world_size in (1, 2))


def test_the_four_recipes_are_there() -> None:
    assert [path.stem for path in CONFIGS] == ["gpt2", "llama_1b_gpu", "moonlight_tiny", "quickstart"]


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {arch: gpt2, config: {n_layer: 2, n_embd: 64}}\n"
        "optimizer:\n"
        "  lr: 1.0e-3\n"
        "  adamw_betas: [0.8, 0.9]\n"
        "  sharding: {packing: contiguous}\n"
        "  precision: {momentum: int8, exchange: float32}\n"
        "  routes: [{pattern: '*.c_attn.*', rule: muon, split: [4, 4, 4]}]\n"
    )
    config = parse(
        [
            "--config",
            str(path),
            "--optimizer.lr=2e-3",
            "--optimizer.precision.momentum=bfloat16",
            "--model.config.n_layer=3",
        ]
    )
    assert config.model.arch == "gpt2"
    assert config.model.config == {"n_layer": 3, "n_embd": 64}
    assert config.optimizer.lr == 2e-3
    assert config.optimizer.adamw_betas == (0.8, 0.9)
    assert config.optimizer.routes == [RouteConfig(pattern="*.c_attn.*", rule="muon", split=[4, 4, 4])]
    assert config.optimizer.sharding == Sharding(packing="contiguous", overlap="forward"), "the recipe's default stays"
    assert config.optimizer.precision == Precision(momentum=torch.bfloat16, exchange=torch.float32)
    assert as_dict(config)["optimizer"]["precision"]["momentum"] == "bfloat16"
    assert config.train == TrainConfig()
    assert json.loads(json.dumps(as_dict(config))) == as_dict(config)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--optimizer.learning_rate", "1e-3"], "optimizer.learning_rate"),
        (["--optimizer.momentum_dtype", "int8"], "optimizer.momentum_dtype"),
        (["--optimizer.sharding.pakcing", "balanced"], "optimizer.sharding.pakcing"),
        (["--optimizer.sharding.packing", "neat"], "optimizer.sharding.packing"),
        (["--optimizer.sharding.bucket_mb", "0"], "sharding.bucket_mb: found 0.0; a positive number is needed"),
        (["--optimizer.precision.exchange", "floot"], "optimizer.precision.exchange"),
        (["--optimizer.precision.reduce", "int8"], "precision.reduce: found torch.int8; one of torch.float32"),
        (["--trian.steps", "3"], "trian.steps"),
        (["--optimizer.name", "adam"], "optimizer.name"),
        (["--train.steps", "many"], "train.steps"),
        (["--train.steps", "0"], "train.steps: found 0"),
        (
            [
                "--train.schedule=three_stage",
                "--train.steps=120",
                "--train.warmup_steps=19",
                "--train.cooldown_steps=101",
            ],
            "found 120 with 19 steps of warmup and 101 of cooldown",
        ),
        (["--train.max_skipped", "-1"], "train.max_skipped: found -1; a count from 0 on is needed; 0 switches it off"),
        (["--train.step", "5"], "unrecognized arguments: --train.step 5; did you mean train.steps?"),
        (["--train.schedule", "three_stage"], "train.cooldown_steps: found 0 with a rise of 100"),
        (["--data.source", "bin", "--data.train", "x"], "data.val: found nothing"),
        (
            ["--train.verify_every", "-1"],
            "train.verify_every: found -1; a count from 0 on is needed; 0 switches it off",
        ),
        (["--checkpoint.every", "-5"], "checkpoint.every: found -5; a count from 0 on is needed"),
        (["--train.warmup_steps", "-3"], "train.warmup_steps: found -3; a count from 0 on is needed"),
        (["--train.min_lr_ratio", ".nan"], "train.min_lr_ratio: found nan; a ratio from 0 on is needed"),
        (["--train.cooldown_lr_ratio", "-0.1"], "train.cooldown_lr_ratio: found -0.1; a ratio from 0 on"),
        (["--train.max_grad_norm", "-1"], "train.max_grad_norm: found -1.0; a norm above 0 is needed; null clips none"),
        (["--config", "no-such-file.yaml"], "no-such-file.yaml"),
    ],
)
def test_a_bad_argument_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 3, wamup_steps: 1}\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(path)])
    assert "wamup_steps" in capsys.readouterr().err


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch: found 16 for 3 ranks of micro_batch 8; a multiple of 24"):
        TrainConfig().accumulation(3)
    assert TrainConfig(global_batch=48).accumulation(3) == 2
    with pytest.raises(ValueError, match=r"optimizer\.routes: found 1 routes with optimizer.name adamw"):
        OptimizerConfig(name="adamw", routes=[RouteConfig(pattern="*", rule="adamw")])
    with pytest.raises(ValueError, match=r"data\.dataset: found nothing"):
        Config(data=DataConfig(source="hf"))


def test_misspelt_model_keys_and_small_vocabularies_are_refused() -> None:
    from launch.config import ModelConfig

    with pytest.raises(
        ValueError, match=r"model\.config: found hiden_size \(did you mean hidden_size\?\) for arch llama"
    ):
        build_model(ModelConfig(config={"hiden_size": 64}))
    with pytest.raises(ValueError, match=r"model\.config: found values for which transformers says: .*\(64\) is not a"):
        build_model(ModelConfig(config={"hidden_size": 64, "num_attention_heads": 6}))  # it was 20 lines of theirs
    with pytest.raises(ValueError, match="vocab_size: found 100 for data with 256 tokens"):
        build_model(ModelConfig(config={"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}), 256)
