"""What a run leaves: a config that runs again, where it comes from, and a model that others can use and that writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

from launch import export, generate, pretrain
from launch.config import parse
from launch.data import open_corpus
from launch.ranks import Ranks
from launch.run import validate
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

RUN = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT, "--train.steps=2", "--checkpoint.every=2"]


@pytest.mark.parametrize(
    ("sinks", "last"), [("[]", "see it: python -m distmuon report {}"), ("[report]", "look at {}/report.html")]
)
def test_the_end_of_a_run_says_where_to_look(
    sinks: str, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main([*RUN[:-1], "--train.steps=1", f"--log.sinks={sinks}", f"--log.dir={tmp_path}"])
    assert capsys.readouterr().out.splitlines()[-1] == last.format(tmp_path)
    assert (tmp_path / "report.html").exists() == (sinks == "[report]")


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
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("aé") == [*"aé".encode()]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0, "byte 0 ends a document"
    writer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert len(writer("AB", max_new_tokens=3, return_full_text=False)[0]["generated_text"]) > 0


def test_a_run_and_its_exported_folder_write_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.main([str(folder), "--out", str(tmp_path / "hf")])
    texts = []
    for given in (folder, tmp_path / "hf"):
        for options in (["--temperature=0"], ["--seed=1"], ["--seed=2"]):
            capsys.readouterr()
            generate.main([str(given), "--prompt=def ", "--tokens=12", *options])
            texts.append(capsys.readouterr().out)
    assert texts[:3] == texts[3:]
    assert len(set(texts[:3])) == 3 and all(text.startswith("def ") for text in texts)
    generate.main([str(folder), "--tokens=1"])  # from the beginning of a document
    with pytest.raises(ValueError, match=r"--tokens: found 29 behind a prompt of 4 tokens; .* 32; ask for at most 28"):
        generate.main([str(folder), "--prompt=def ", "--tokens=29"])


def test_a_model_of_shards_needs_a_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.main([str(folder), "--out", str(tmp_path / "hf")])
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as a model of shards has none
        (tmp_path / "hf" / name).rename(tokenizer / name)
    with pytest.raises(ValueError, match=r"found a model of token shards.*--tokenizer gpt2"):
        generate.main([str(tmp_path / "hf")])
    generate.main([str(tmp_path / "hf"), "--tokens=1", "--prompt=x", f"--tokenizer={tokenizer}"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("x")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no config\.yaml; the folder of a run with checkpoints is needed"):
        export.export(tmp_path, tmp_path / "hf")
    (tmp_path / "config.yaml").write_text("train: {steps: 1}")
    with pytest.raises(ValueError, match="found no complete checkpoint"):
        export.export(tmp_path, tmp_path / "hf")
