"""What a run leaves: a config that runs again, where it comes from, and a model that others can use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

from launch import export, pretrain
from launch.config import parse
from launch.data import open_corpus
from launch.ranks import Ranks
from launch.run import validate
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

RUN = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT, "--train.steps=2", "--checkpoint.every=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("run")
    pretrain.main([*RUN, f"--log.dir={found}"])
    return found


def test_the_folder_says_how_to_run_it_again_and_where_it_comes_from(folder: Path) -> None:
    assert parse(["--config", str(folder / "config.yaml")]) == parse([*RUN, f"--log.dir={folder}"])
    routing = (folder / "routing.txt").read_text()
    assert "model.layers.1.mlp.up_proj.weight" in routing and "lm_head.weight" in routing
    run = records(folder)[0]
    assert run["command"] == sys.orig_argv and run["versions"]["torch"] == torch.__version__
    assert run["versions"]["transformers"] == transformers.__version__ and run["host"]
    assert run["commit"] is None or len(run["commit"]) == 40
    assert records(folder)[-1]["peak_bytes"] == [None]  # no GPU


def test_an_exported_model_is_the_one_that_was_trained(folder: Path, tmp_path: Path) -> None:
    export.main([str(folder), "--out", str(tmp_path / "hf")])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config = parse([*RUN])
    val = open_corpus(config).val
    loss = validate(model, val, val.spread(8), 2, Ranks(device=torch.device("cpu")))
    assert loss == pytest.approx(records(folder)[-1]["val_loss"], rel=1e-6)
    assert model.generate(torch.tensor([[65, 66]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no config\.yaml; the folder of a run with checkpoints is needed"):
        export.export(tmp_path, tmp_path / "hf")
    (tmp_path / "config.yaml").write_text("train: {steps: 1}")
    with pytest.raises(ValueError, match="found no complete checkpoint"):
        export.export(tmp_path, tmp_path / "hf")
