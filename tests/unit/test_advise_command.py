"""`distmuon advise`: the answer for each task and model, and rules that say how strong they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from distmuon.cli.advise import Strength, Task
from distmuon.cli.main import main

ROOT = Path(__file__).parents[2]


def narrow() -> nn.Module:
    """No hidden matrix: a table and a head."""
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(99, 32), nn.Linear(32, 99)
    model.raw = nn.Parameter(torch.zeros(3, 1))
    return model


def odd() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    model.register_parameter("strange", nn.Parameter(torch.zeros(64, 64)))
    return model


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main(["advise", *arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return (status, *capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "answer", "why"),
    [
        (("llama-1b", "--task=pretrain"), "Muon", "fewer steps"),
        (("llama-1b", "--task=pretrain", "--tokens=40000"), "try both", "larger batches"),
        (("llama-1b", "--task=pretrain", "--tokens=4096"), "AdamW", "of forward and backward"),
        (("llama-1b", "--task=continue"), "try both", "AdamW pretrained"),
        (("llama-1b", "--task=continue", "--pretrained-with=muon"), "Muon", "fewer steps"),
        (("llama-1b", "--task=finetune"), "AdamW", "AdamW pretrained"),
        (("llama-1b", "--task=finetune", "--pretrained-with=muon"), "Muon", "Muon pretrained"),
        (("llama-1b", "--task=lora"), "AdamW", "Adapters"),
        (("tests.unit.test_advise_command:narrow", "--task=pretrain"), "AdamW", "no hidden matrix"),
    ],
)
def test_the_answer(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], answer: str, why: str) -> None:
    status, out, err = run(capsys, *arguments)
    first = out.partition("\n")[0]
    assert err == "" and f": {answer}. " in first and why in first and status == int(answer == "AdamW")


def test_the_cost_is_that_of_the_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    """5*side/tokens for square weights: 512 x 512 with 2**20 tokens, in a model of such weights and little else."""
    found = json.loads(run(capsys, "tests.unit.test_advise_command:odd", "--task=pretrain", "--json")[1])
    texts = {rule["topic"]: rule["advice"] for rule in found["rules"]}
    share = float(re.findall(r"It is ([\d.]+)%", texts["Cost of Newton-Schulz"])[0]) / 100
    assert share == pytest.approx(5 * 512 / (1 << 20) * 2 / 3, rel=0.05)  # two of three: the last layer is a head
    assert "Route('strange', 'muon')" in texts["Undecided weights"]


def test_experts_count_as_far_as_a_token_uses_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Of Kimi K2's 1,026 B parameters a token uses 33 B, so that Newton-Schulz weighs more than in a dense model."""
    out = run(capsys, "kimi", "--task=pretrain", "--tokens=4000000")[1]
    share = float(re.findall(r"It is ([\d.]+)%", " ".join(out.split()))[0])
    dense = float(
        re.findall(
            r"It is ([\d.]+)%", " ".join(run(capsys, "llama-70b", "--task=pretrain", "--tokens=4000000")[1].split())
        )[0]
    )
    assert share > 5 * dense and "Experts [paper]" in out


@pytest.mark.parametrize("task", get_args(Task))
def test_each_rule_has_a_strength_and_evidence_that_exists(capsys: pytest.CaptureFixture[str], task: str) -> None:
    found = json.loads(run(capsys, "gpt2", "--task", task, "--json")[1])
    assert {rule["strength"] for rule in found["rules"]} <= set(get_args(Strength))
    assert "contradicted here" in {rule["strength"] for rule in found["rules"]}
    for rule in found["rules"]:
        assert rule["advice"].endswith(".") and rule["evidence"].endswith(".")
        for page in re.findall(r"docs/\w+\.md", rule["evidence"]):
            assert (ROOT / page).is_file(), page
    assert len({rule["topic"] for rule in found["rules"]}) == len(found["rules"])


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in (
        (("gpt2",), "--task"),
        (("gpt2", "--task=sleep"), "sleep"),
        (("gpt2", "--task=pretrain", "--tokens=0"), "--tokens: found 0"),
        (("gpt2", "--task=pretrain", "--tok=1"), "--tok"),
        (("llama", "--task=pretrain"), "the beginning of"),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == "" and word in err and err.count("\n") == 1
