"""Samples: what the model writes, and nothing of the training changes. `test_parallel` has them under each sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch import pretrain
from launch.config import parse
from launch.corpora import TextStream
from launch.ranks import Ranks
from launch.samples import sample
from launch.tokenization import byte_tokenizer
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

RUN = ["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, *SHORT, "--train.steps=4", "--train.eval_every=2"]
ONE = Ranks(device=torch.device("cpu"))


def samples(folder: Path) -> list[tuple[int, str]]:
    return [(record["step"], record["text"]) for record in records(folder) if record["kind"] == "sample"]


def test_a_run_with_samples_and_telemetry_is_the_run_without_bit_for_bit(tmp_path: Path) -> None:
    """Dropout draws from the random state that sampling must leave alone."""
    gpt2 = ["--model.arch=gpt2", "--model.config={n_embd: 32, n_layer: 2, n_head: 2, resid_pdrop: 0.3}"]
    arguments = [*SHORT, *gpt2, "--train.steps=4", "--train.eval_every=2"]
    losses = []
    for tokens in (0, 40):
        folder = tmp_path / str(tokens)
        given = [f"--log.sample_tokens={tokens}", f"--log.telemetry_every={tokens and 2}", "--log.sample_prompt=if"]
        pretrain.main([*arguments, *given, f"--log.dir={folder}"])
        losses.append([record["loss"] for record in records(folder) if record["kind"] in ("train", "val")])
    assert losses[0] == losses[1]
    assert samples(tmp_path / "0") == []
    measured = [record for record in records(tmp_path / "40") if record["kind"] == "telemetry"]
    assert [record["step"] for record in measured] == [2, 4]
    assert 0.1 < measured[0]["parameters"]["transformer.h.1.mlp.c_fc.weight"]["update_rms"] < 0.3
    assert measured[0]["attention_logits"].keys() == {"transformer.h.0.attn", "transformer.h.1.attn"}
    assert set(measured[0]) == {"kind", "step", "parameters", "attention_logits", "output_rms"}
    assert [step for step, _ in samples(tmp_path / "40")] == [0, 2, 4]
    assert [record["prompt"] for record in records(tmp_path / "40") if record["kind"] == "sample"] == ["if"] * 3


class Alphabet(nn.Module):
    """Sure that each letter is followed by the next one; "d" ends the document. Has ids that are no bytes."""

    def __init__(self, diverged: bool = False) -> None:
        super().__init__()
        self.diverged = diverged
        self.longest = 0

    def forward(self, input_ids: Tensor) -> Any:
        self.longest = max(self.longest, input_ids.shape[1])
        following = torch.where(input_ids == ord("d"), 0, input_ids + 1)
        logits = 1e4 * nn.functional.one_hot(following, 300).float()
        logits[..., 256:] = 1e6
        self.logits = torch.full_like(logits, torch.nan) if self.diverged else logits
        return self


@pytest.mark.parametrize(
    ("prompt", "tokens", "wanted"), [("a", 2, "bc"), ("a", 9, "bcd"), ("xyza", 9, "bcd"), ("", 2, "\x01\x02")]
)
def test_a_sample_goes_on_with_the_prompt_up_to_the_end_of_the_document(prompt: str, tokens: int, wanted: str) -> None:
    config = parse([f"--log.sample_prompt={prompt}", f"--log.sample_tokens={tokens}", "--model.seq_len=3"])
    model = Alphabet()
    assert sample(model, byte_tokenizer(), config, ONE) == wanted
    assert model.longest <= 3 and model.training


def test_a_model_that_has_diverged_writes_nothing() -> None:
    assert sample(Alphabet(diverged=True), byte_tokenizer(), parse([]), ONE) == ""


def test_shards_have_no_samples_and_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.arange(4000, dtype=torch.int16).remainder(256).numpy().tofile(tmp_path / "a.bin")
    data = ["--data.source=bin", f"--data.train={tmp_path}/a.bin", f"--data.val={tmp_path}/a.bin"]
    folder = tmp_path / "run"
    pretrain.main([*RUN, *data, "--model.config.vocab_size=256", "--train.steps=1", f"--log.dir={folder}"])
    assert samples(folder) == []
    with pytest.raises(SystemExit):
        parse([*data, "--log.sample_prompt=a"])
    assert "log.sample_prompt: found 'a' with data.source bin" in capsys.readouterr().err


def test_bytes_are_the_tokens_of_the_byte_tokenizer(tmp_path: Path) -> None:
    """The tokenizer that decodes samples and is exported, and the encoding of the corpus, are two pieces of code."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    config = parse(["--data.source=hf", "--data.dataset=json", f"--data.files={tmp_path}/a.jsonl"]).data
    stream = TextStream(config)
    text = "def f():\n\treturn  'ä€😀' Ā Ġ  <|"
    assert stream.encode(text) == [*byte_tokenizer().encode(text), byte_tokenizer().eos_token_id]
    assert byte_tokenizer().decode(stream.encode(text)[:-1]) == text
    assert stream.vocab_size == 256
