"""`python -m distmuon plan`: what it prints, and one line and status 2 for what it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distmuon.cli import plan as cli
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
        status = cli.main(["plan", *arguments])
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
    status, out, _ = run(capsys, "gpt2", "--dp", "4", "--json", "--ranks", "--grad-bytes", "2", "--param-dtype", "fp32")
    (found,) = json.loads(out)
    import torch

    wanted = plan("gpt2", dp_size=4, reduce_dtype=torch.bfloat16, param_dtype=torch.float32)
    assert status == 0 and found == json.loads(json.dumps(wanted.to_dict(ranks=True)))
    assert len(found["ranks"]) == 4 and found["fullest_held_bytes"]["master"] == 0
    assert json.loads(run(capsys, "gpt2", "--dp", "4", "--json", "--no-compare")[1])[0]["ranks"] is None


def test_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(capsys, "gpt2", "--dp", "8", "--no-compare")[1]
    for option in (
        ("--packing", "contiguous"), ("--bucket-mb", "40"), ("--grad-bytes", "2"), ("--param-dtype", "fp32"),
        ("--hardware", "h200"), ("--hardware", "none"), ("--ns-steps", "3"), ("--routes", "adamw"), ("--ranks",),
        ("--bucket-mb", "auto"), ("--exchange-group",),
        ("--release-grads",), ("--param-gather", "updates", "--param-dtype", "fp32"), ("--master-format", "remainder"),
        ("--momentum-dtype", "int8"), ("--overlap", "forward"), ("--overlap", "none"),
    ):  # fmt: skip
        status, out, err = run(capsys, "gpt2", "--dp", "8", "--no-compare", *option)
        assert (status, err) == (0, "") and out != plain, option
    contiguous = run(capsys, "gpt2", "--dp", "8", "--packing", "contiguous", "--no-compare")[1]
    replicated = run(capsys, "gpt2", "--dp", "8", "--packing", "contiguous", "--placement", "replicated",
                     "--no-compare")[1]  # fmt: skip
    assert replicated != contiguous
    assert "rank 7: sends reduce_scatter" in run(capsys, "gpt2", "--dp", "8", "--ranks")[1]


def test_a_hugging_face_config_by_path_and_by_type(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The file and its folder give one plan, which is the shipped table's where the shapes are."""
    pytest.importorskip("transformers")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    texts = []
    for name in (str(tmp_path), str(tmp_path / "config.json"), "gpt2-124m"):
        status, out, _ = run(capsys, name, "--dp", "8")
        texts.append(out.replace(name, "MODEL"))
        assert status == 0
    assert texts[0] == texts[1] == texts[2]
    status, out, _ = run(capsys, "gpt_neox", "--dp", "2", "--no-compare")
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
        (("gpt2",), "--dp"),
        (("gpt2", "--dp", "8,zero"), "8,zero"),
        (("gpt2", "--dp", "0"), "'0'"),
        (("gpt2", "--dp", "8", "--bucket-mb", "big"), "'big'"),
        (("gpt2", "--dp", "8", "--bucket-mb", "-3"), "-3"),
        (("gpt2", "--dp", "8", "--grad-bytes", "3"), "3"),
        (("gpt2", "--dp", "8", "--hardware", "abacus"), "abacus"),
        (("gpt2", "--dp", "8", "--bucket-mb", "auto", "--hardware", "none"), "auto"),
        (("gpt2", "--dp", "8", "--ns-steps", "0"), "ns_steps"),
        (("gpt2", "--dp", "2", "--plot", str(tmp_path / "no" / "where.png")), "where.png"),
        ((str(broken), "--dp", "8"), "broken.json"),
        ((str(unknown), "--dp", "8"), "abacus"),
    ):
        status, out, err = run(capsys, *arguments)
        assert status == 2 and out == "" and word in err, (arguments, err)
        assert err.count("\n") == 1 and "Traceback" not in err


def test_a_missing_matplotlib_names_the_cure(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(capsys, "gpt2", "--dp", "2", "--plot", str(tmp_path / "out.png"))
    assert status == 2 and "pip install matplotlib" in err and err.count("\n") == 1
