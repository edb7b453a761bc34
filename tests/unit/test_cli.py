"""`python -m distmuon plan`: what it prints, and one line and status 2 for what it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch

from distmuon.cli import plan as cli
from distmuon.options import Precision, Sharding
from distmuon.planning.plan import plan

GOLDEN = """\
gpt2, dp_size 2: 124,439,808 parameters, 72 matrices; 8 buckets, the largest 31.0%; staged 0.0%
                                          distmuon           adamw           paper  whole matrices
sent, reduce_scatter                    248.880 MB      248.880 MB      248.880 MB      251.239 MB
sent, guard                               1.216 kB        1.216 kB        1.216 kB        1.216 kB
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(status, stdout, stderr)"""
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return (status, *capsys.readouterr())


def test_golden_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "gpt2", "--dp", "2,8")
    assert (status, err) == (0, "")
    assert out.startswith(GOLDEN), out
    assert out.count("\n\n") == 1 and out.count("estimated ms: step") == 2


def test_the_module_runs(tmp_path: Path) -> None:
    """As users call it, from anywhere, with a drawing."""
    pytest.importorskip("matplotlib")
    drawing = tmp_path / "out.png"
    command = [sys.executable, "-m", "distmuon", "plan", "llama-1b", "--dp", "8,16", "--hardware", "b200"]
    ran = subprocess.run([*command, "--plot", str(drawing)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    assert "relative to AdamW's own ZeRO-1" in ran.stdout
    assert drawing.read_bytes().startswith(b"\x89PNG") and drawing.stat().st_size > 10_000


def test_json_holds_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, "gpt2", "--dp", "4", "--json", "--ranks", "--precision.reduce=bfloat16", "--param_dtype=float32"
    )
    (found,) = json.loads(out)
    wanted = plan("gpt2", dp_size=4, precision=Precision(reduce=torch.bfloat16), param_dtype=torch.float32)
    assert status == 0 and found == json.loads(json.dumps(wanted.to_dict(ranks=True)))
    assert len(found["ranks"]) == 4 and found["fullest_held_bytes"]["master"] == 0
    assert json.loads(run(capsys, "gpt2", "--dp", "4", "--json", "--compare=false")[1])[0]["ranks"] is None


# A field of a policy or an argument of `plan`: another value, and what else it needs to make a difference.
OPTIONS = {
    "sharding.packing": ["contiguous"],
    "sharding.placement": ["replicated", "--sharding.packing=contiguous"],
    "sharding.bucket_mb": ["40"],
    "sharding.param_gather": ["updates", "--param_dtype=float32"],
    "sharding.release_grads": ["true"],
    "sharding.overlap": ["forward"],
    "precision.reduce": ["bfloat16"],
    "precision.momentum": ["int8"],
    "precision.newton_schulz": ["float32"],
    "precision.exchange": ["float32"],
    "precision.master": ["remainder"],
    "shard": ["fsdp2"],
    "replicas": ["2", "--shard=hsdp", "--replicas=4"],
    "tp": ["2", "--shard=fsdp2"],
    "routes": ["adamw"],
    "grad_reduction": ["external"],
    "auto_bucket": ["true"],
    "ns_steps": ["3"],
    "param_dtype": ["float32"],
    "exchange_group": ["true"],
    "hardware": ["h200"],
    "compare": ["true"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reaches_the_plan(capsys: pytest.CaptureFixture[str], name: str) -> None:
    value, *also = OPTIONS[name]
    arguments = ("gpt2", "--dp=8", "--compare=false")
    plain = run(capsys, *arguments, *also)
    changed = run(capsys, *arguments, *also, f"--{name}={value}")
    assert (plain[0], plain[2], changed[0], changed[2]) == (0, "", 0, "") and changed[1] != plain[1]


def test_the_command_line_has_all_that_plan_takes() -> None:
    """It once lacked three of its arguments."""
    policies = {"sharding": Sharding, "precision": Precision}
    given = set(signature(plan).parameters) - {"model", "dp_size"} - policies.keys()
    assert given | {f"{name}.{field.name}" for name, kind in policies.items() for field in fields(kind)} == set(OPTIONS)


def test_no_times_without_hardware_and_ranks_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    assert "estimated ms" not in run(capsys, "gpt2", "--dp", "8", "--hardware=null")[1]
    assert "rank 7: sends reduce_scatter" in run(capsys, "gpt2", "--dp", "8", "--ranks")[1]


def test_a_hugging_face_config_by_path_and_by_type(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The file and its folder give one plan, which is the shipped table's where the shapes are."""
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    texts = []
    for name in (str(tmp_path), str(tmp_path / "config.json"), "gpt2-124m"):
        status, out, _ = run(capsys, name, "--dp", "8", "--param_dtype=bfloat16")
        texts.append(out.replace(name, "MODEL"))
        assert status == 0
    assert texts[0] == texts[1] == texts[2]
    status, out, _ = run(capsys, "gpt_neox", "--dp", "2", "--compare=false")
    assert status == 0 and "gpt_neox, dp_size 2: 20,5" in out


def test_a_config_that_transformers_cannot_build(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Whatever its own code raises for such numbers."""
    pytest.importorskip("transformers")
    for number, entries in enumerate(
        (
            {"model_type": "gpt2", "n_embd": -1},
            {"model_type": "gpt2", "n_embd": "many"},
            {"model_type": "llama", "hidden_size": 0},
            {"model_type": "llama", "num_attention_heads": 7},
            {"model_type": "clip"},
        )
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(entries))
        status, out, err = run(capsys, str(path), "--dp", "2")
        assert status == 2 and out == "" and len(err.splitlines()) == 1, err
        assert f"{path}: transformers makes no causal language model of it" in err and "; correct it" in err


def test_without_transformers_only_tables_are_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(capsys, "gpt2", "--dp", "2")[0] == 0
    status, _, err = run(capsys, "gpt_neox", "--dp", "2")
    assert status == 2 and "model: found 'gpt_neox'; one of " in err and "pip install transformers" in err


def test_bad_input_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken, unknown = tmp_path / "broken.json", tmp_path / "unknown.json"
    broken.write_text("{")
    unknown.write_text('{"model_type": "abacus"}')
    for arguments, word in (
        (("nonsense", "--dp", "8"), "'nonsense'"),
        (("gpt2",), "required: dp"),
        (("gpt2", "--dp", "8,zero"), "8,zero"),
        (("gpt2", "--dp", "0"), "dp_size: found 0"),
        (("gpt2", "--dp", "8", "--sharding.bucket_mb", "big"), "sharding.bucket_mb"),
        (("gpt2", "--dp", "8", "--sharding.bucket_mb", "-3"), "sharding.bucket_mb: found -3"),
        (("gpt2", "--dp", "8", "--precision.reduce", "int8"), "precision.reduce: found torch.int8"),
        (("gpt2", "--dp", "8", "--precision.reduce", "neat"), "'neat'"),
        (("gpt2", "--dp", "8", "--sharding.nope", "3"), "--sharding.nope"),
        (("gpt2", "--dp", "8", "--hardware", "abacus"), "abacus"),
        (("gpt2", "--dp", "8", "--auto_bucket=true", "--hardware=null"), "auto_bucket"),
        (("gpt2", "--dp", "8", "--ns_steps", "0"), "ns_steps"),
        (("gpt2", "--dp", "2", "--plot", str(tmp_path / "no" / "where.png")), "where.png"),
        ((str(broken), "--dp", "8"), "broken.json"),
        ((str(unknown), "--dp", "8"), "abacus"),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == "" and word in err, (arguments, err)
        assert err.count("\n") == 1 and "Traceback" not in err


def test_a_missing_jsonargparse_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    status, out, err = run(capsys, "gpt2", "--dp", "2")
    assert status == 2 and out == "" and "pip install distmuon[recipes]" in err and err.count("\n") == 1


def test_an_unknown_command_is_one_line() -> None:
    ran = subprocess.run([sys.executable, "-m", "distmuon", "paln"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.startswith("usage: ") and ran.stderr.count("\n") == 1


def test_a_missing_matplotlib_names_the_cure(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(capsys, "gpt2", "--dp", "2", "--plot", str(tmp_path / "out.png"))
    assert status == 2 and "pip install matplotlib" in err and err.count("\n") == 1
