"""`distmuon plan`: what it prints, and one line and status 2 for what it cannot."""

from __future__ import annotations

import json
import re
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
gpt2-124m, dp_size 2: 124,439,808 parameters, 72 matrices; h100
memory   fits in 80 GB: the fullest rank holds 1.493 GB, most of it gradients 497.759 MB, parameters 248.880
         MB, master 248.880 MB; 78.507 GB are left for activations
time     Muon makes a step +0.2% longer than AdamW (estimate): optimizer 2.76 ms, AdamW's 1.24 ms, forward and
         backward 989.52 ms (6 x 124,439,808 parameters x 524,288 tokens a rank, 1,048,576 a step, at 40% of
         the peak)
traffic  373.321 MB a step from the busiest rank, 1.0000 of AdamW's
faster   by this estimate: whole matrices, 2.71 ms instead of 2.76 ms; its fullest rank holds 1.533 GB

8 buckets, the largest 31.0%; staged 0.0%
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
    assert out.count("\n\ngpt2-124m, dp_size 8: ") == 1 and out.count("estimated ms: step") == 2


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
    assert status == 0 and (found.pop("model"), found.pop("verdict")["fits"]) == ("gpt2-124m", True)
    assert found == json.loads(json.dumps(wanted.to_dict(ranks=True)))
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
    "sharding.gpus_per_node": ["2"],
    "precision.reduce": ["bfloat16"],
    "precision.momentum": ["int8"],
    "precision.newton_schulz": ["float32"],
    "precision.exchange": ["float32"],
    "precision.updates": ["int8", "--sharding.param_gather=updates", "--param_dtype=float32"],
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
        (("gpt2", "--dp", "2", "--plot", str(tmp_path / "no" / "where.png")), "where.png, whose folder does not exist"),
        (("gpt2", "--dp", "2", "--plot", str(tmp_path)), "a folder"),
        (("gpt2", "--dp", "2", "--plot", str(tmp_path / "where.xyz")), "a .png, .svg or .pdf is needed"),
        (("gpt2", "--dp", "8", "--hardware", "tflops=400"), "without memory_tbs, nvlink_gbs"),
        (("gpt2", "--dp", "8", "--hardware", "h100,speed=3"), "found 'speed=3'; one of tflops, "),
        (("gpt2", "--dp", "8", "--hardware", "h100,hbm_gb=much"), "found 'hbm_gb=much'"),
        (("gpt2", "--dp", "8", "--tokens", "0"), "tokens: found 0"),
        (("gpt2", "--dp", "8", "--mfu", "1.5"), "mfu: found 1.5"),
        (("gpt2", "--dp", "8", "--hbm", "-1"), "hbm: found -1"),
        (("kimi", "--dp", "8", "--experts_per_token", "0"), "--experts_per_token: found 0"),
        (("gpt2", "--dp", "8", "--token", "5"), "--token"),
        (("llama", "--dp", "8"), "found 'llama', the beginning of llama-1b, llama-8b, llama-70b; a single model"),
        (("llama-", "--dp", "8"), "write more of its name"),
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
    assert status == 2 and out == "" and 'pip install "distmuon[recipes]"' in err and err.count("\n") == 1


def test_a_missing_matplotlib_names_the_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(capsys, "gpt2", "--dp", "2", "--plot", str(tmp_path / "out.png"))
    assert status == 2 and "pip install matplotlib" in err and err.count("\n") == 1


def test_a_model_that_does_not_fit_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Only if the memory was given: without, the answer is printed and the status is 0."""
    status, out, _ = run(capsys, "gpt2", "--dp=2", "--compare=false", "--hbm=1.4")
    assert (
        status == 1 and "memory   does not fit in 1.4 GB: the fullest rank holds 1.493 GB" in out and "too many" in out
    )
    assert run(capsys, "gpt2", "--dp=2", "--compare=false", "--hbm=2")[0] == 0
    status, out, _ = run(capsys, "llama-70b", "--dp=2", "--compare=false")
    assert status == 0 and "does not fit in 80 GB" in out
    assert "--hbm GB says whether it fits" in run(capsys, "gpt2", "--dp=2", "--compare=false", "--hardware=cpu")[1]


def test_a_recipe_brings_model_options_and_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`plan configs/llama_1b_gpu.yaml` once said "no JSON". Flags win over the file."""
    pytest.importorskip("transformers")
    (tmp_path / "mine.yaml").write_text(
        "model: {arch: llama, config: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}, dtype: "
        "bfloat16, seq_len: 128}\ntrain: {global_batch: 32}\nparallel: {shard: hsdp, replicas: 2}\n"
        "optimizer: {ns_steps: 3, sharding: {bucket_mb: 40}, precision: {momentum: bfloat16}, "
        'routes: [{pattern: "*.up_proj.weight", rule: adamw}]}\n'
    )
    arguments = (str(tmp_path / "mine.yaml"), "--dp=4", "--json", "--compare=false")
    (found,) = json.loads(run(capsys, *arguments)[1])
    assert found["verdict"]["tokens"] == 32 * 128 and found["num_matrices"] == 12
    assert found["given"]["mesh"] == {"replicas": 2, "shards": 2, "tp": 1}
    assert found["num_elements"] == 2 * 256 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 11008) + 5 * 64
    momentum = found["fullest_held_bytes"]["momentum"]
    plain = json.loads(run(capsys, *arguments, "--precision.momentum=float32", "--tokens=7")[1])[0]
    assert plain["fullest_held_bytes"]["momentum"] == 2 * momentum and plain["verdict"]["tokens"] == 7
    slower = json.loads(run(capsys, *arguments, "--ns_steps=6")[1])[0]
    assert slower["busiest_ns_flops"] == 2 * found["busiest_ns_flops"]


def test_shipped_recipes_are_known_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    status, out, err = run(capsys, "llama_1b_gpu", "--dp=8", "--hardware=a100", "--compare=false")
    assert (status, err) == (0, "") and "1,048,576" not in out.partition("\n")[0] and "; a100" in out.partition("\n")[0]


def test_a_recipe_with_an_unknown_key_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "mine.yaml").write_text("train: {stepz: 3}")
    status, out, err = run(capsys, str(tmp_path / "mine.yaml"), "--dp=4")
    assert status == 2 and out == "" and "did you mean train.steps?" in err and err.count("\n") == 1


def test_a_row_of_hardware_in_text(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the row of that name with other entries, or a whole one; `plan` takes it too."""
    row = "tflops=989,memory_tbs=3.35,nvlink_gbs=450,network_gbs=50,hbm_gb=80"
    own, named = (run(capsys, "gpt2", "--dp=16", "--hardware", name)[1] for name in (row, "h100"))
    assert own.partition("\n")[2] == named.partition("\n")[2] and f"; {row}" in own
    slow = plan("gpt2", dp_size=16, hardware="h100,network_gbs=5,node_size=4", compare=False)
    fast = plan("gpt2", dp_size=16, compare=False)
    assert slow.time and fast.time and slow.time.communication_s > 5 * fast.time.communication_s
    assert slow.time.newton_schulz_s == fast.time.newton_schulz_s


def test_every_option_has_a_help_text() -> None:
    """Four had none."""
    actions = cli._parser()._actions
    assert len(actions) > 25
    missing = [action.option_strings for action in actions if not action.help]
    assert not missing


def test_lines_that_coincide_stay_visible_and_ticks_are_plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """distmuon lay exactly under AdamW, and ticks were 2^3; there was no panel of memory."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    assert cli.main(["gpt2", "--dp=16,8", "--hardware=a100", "--plot", str(tmp_path / "out.png")]) == 0
    figure = pyplot.gcf()
    assert figure.get_suptitle() == "gpt2-124m, a100" and len(figure.axes) == 4
    for axis in figure.axes:
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["8", "16"] and axis.get_ylabel()
        widths = [line.get_linewidth() for line in axis.lines[:4]]
        assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4
    assert [line.get_label() for line in figure.axes[1].lines][-1] == "80 GB"
    monkeypatch.undo()
    pyplot.close(figure)


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The answers, as they stand."""
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text()
    (command, shown) = re.findall(r"^`distmuon plan (.*?)` prints first.*?\n```\n(.*?)\n```", page, re.M | re.S)[0]
    status, out, _ = run(capsys, *command.split())
    assert status == 0 and out.partition("\n\n")[0] == shown
