"""DeepSpeed's engines as others launch them: the plain loop's bits, each refusal, what an engine reports of a step.

One run of `tests.integrations.engines` on two ranks brings it all (`engine_facts.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forks
from tests.integrations.test_recipes import torchrun as recipe
from tests.integrations.test_trainers import ROOT, check_case
from tests.integrations.worker import without_shared_memory

CONFIGS = ROOT / "configs" / "deepspeed"
SAVE, RESUME = {"last": 2, "save": True, "tied": False}, {"first": 2, "tied": False}
CASES: list[dict[str, Any]] = [
    {"how": "registered", "dtype": "bfloat16", "num_micro": 3, "clip": 1.0},
    {"how": "client"},
    {"how": "unmanaged", "num_micro": 3, "clip": 1.0},
    {"how": "no_sync", "num_micro": 3, "clip": 1.0},
    {"how": "plugin", "num_micro": 3, "clip": 1.0},
    {"how": "trainer", "num_micro": 3, "clip": 1.0},
]
LONG = [
    *({"how": how, "dtype": "bfloat16", "clip": 1.0, "tied": False} for how in ("client", "plugin", "trainer")),
    {"how": "registered", "num_micro": 3},
    *({"how": how, **part} for how in ("plugin", "trainer") for part in (SAVE, RESUME)),
]
Facts = list[dict[str, dict[str, Any]]]


def torchrun(folder: Path, cases: list[dict[str, Any]], nproc: int = 2, facts: bool = False) -> list[dict[str, Any]]:
    """What each case came to; facts.json in `folder` if asked for."""
    pytest.importorskip("deepspeed", reason="pip install distmuon[deepspeed]")
    pytest.importorskip("accelerate", reason="pip install distmuon[accelerate]")
    given = ("tests.integrations.engines", str(folder), json.dumps(cases), str(int(facts)))
    done = forks.torchrun(*given, nproc=nproc, before=without_shared_memory, timeout=560)
    assert done.returncode == 0, done.stdout[-6000:]
    results: list[dict[str, Any]] = torch.load(folder / "results.pt")
    return results


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("engines")
    results = torchrun(folder, CASES, facts=True)
    return json.loads((folder / "facts.json").read_text()), results


@pytest.mark.supports("a DeepSpeed engine that a launcher or trainer makes", "accelerate", "Trainer", "DeepSpeed")
@pytest.mark.supports("`managed_gradient_accumulation: false`, `engine.no_sync()`", "DeepSpeed")
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case["how"] for case in CASES])
def test_an_engine_of_somebody_else_equals_the_plain_loop(ran: tuple[Facts, Any], number: int) -> None:
    """`deepspeed.initialize` after `register`, by name and as optimizer=; accelerate's plugin; Trainer(deepspeed=)."""
    check_case("engines", ran[1][number], CASES[number])


@pytest.mark.supports("the `bf16` block of the JSON", "accelerate", "Trainer")
@pytest.mark.slow
def test_more_ways_equal_the_plain_loop(tmp_path: Path) -> None:
    """bfloat16 by each engine's bf16 block, and runs cut in two that end as the unbroken plain one."""
    for result, case in zip(torchrun(tmp_path, LONG), LONG, strict=True):
        check_case("engines", result, case)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plugin", "trainer"])
def test_a_run_under_a_plugin_goes_on_with_another_number_of_ranks(how: str, tmp_path: Path) -> None:
    """Saved by 2 ranks, loaded by 3: the plain loop's case saves and loads in the same folder."""
    torchrun(tmp_path, [{"how": how, **SAVE}])
    rest = {"how": how, **RESUME}
    (result,) = torchrun(tmp_path, [rest], nproc=3)
    check_case("engines", result, rest)


REFUSED = {
    **{f"stage {n}": rf"stage {n}: DeepSpeed would cut the parameters.*\"stage\": 0" for n in (1, 2, 3)},
    "stage 1, client": "stage 1: DeepSpeed would cut",
    "pipeline": "a PipelineModule, whose engine reduces gradients itself.*use the plain engine",
    "pipeline, bf16": "a PipelineModule",
    "fp16": r"fp16, which scales the loss.*use bfloat16 \(\"bf16\": \{\"enabled\": true\}\)",
    "fp16, client": "fp16, which scales the loss",
    "autocast fp16": "fp16, which scales the loss",
    "moe": r"deepspeed\.moe layers.*expert stacks",
    "mpu": r"averages over other ranks than the 2 .*process_group=",
    "sum": 'gradient_allreduce_op "sum"; .*use "mean"',
    "two clips": r"gradient_clipping 1\.0 .*max_grad_norm 0\.5.*set only \"gradient_clipping\"",
    "accumulated in bf16": 'grad_accum_dtype \'bf16\'.*"precision": {"reduce": ',
    **{
        name: rf"scheduler {name}, which sets one lr for groups of lr \[0\.001, 0\.02\].*lists with an entry"
        for name in ("WarmupLR", "WarmupDecayLR", "OneCycle", "LRRangeTest")
    },
    "groups of their own": r"model_parameters: groups with their own weight_decay.*write them as routes",
    "part of the model": "2 of the model's 4 trainable parameters.*leave model_parameters out",
    "wrapped": "SimpleNamespace around DistMuon.*remove the setting that asks for the wrapper",
    "not registered": r"DeepSpeed: an engine that the integration does not manage.*register\(\) before",
}


@pytest.mark.refuses("ZeRO stage >= 1", "DeepSpeed", use="stage 0")
@pytest.mark.refuses("the trainer's pipelines and expert groups", "DeepSpeed", use="the plain engine, expert stacks")
@pytest.mark.refuses("fp16 with a loss scaler", "DeepSpeed", use="bf16")
@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_that_would_train_wrongly_is_refused(ran: tuple[Facts, Any], name: str) -> None:
    """Real engines, before anything is trained; the same message on both ranks."""
    import re

    for rank in ran[0]:
        assert re.search(f"^ValueError .*{REFUSED[name]}", rank["refusals"][name]), rank["refusals"][name]
    assert set(ran[0][0]["refusals"]) == set(REFUSED)


def test_infinity_on_one_rank_is_a_skipped_step_of_every_engine(ran: tuple[Facts, Any]) -> None:
    for rank in ran[0]:
        seen = rank["infinity_on_one_rank"]
        assert seen["skipped"] == [0, 1, 1] and seen["applied"] == [True, False, True] and seen["untouched"]
        assert seen["asked twice"] == [False, True, False], "accelerate asks after the engine has"
        first, second, third = seen["norms"]
        assert first == third > 0 and second not in (first, float("inf"))  # NaN: both ranks', by the reduction
        assert seen["lrs"] == [[0.0, 0.0], [0.0, 0.0], [0.02, 0.001]], "the schedule waits with the step"


def test_schedules_of_the_config_keep_the_ratio_of_both_learning_rates(ran: tuple[Facts, Any]) -> None:
    for name, steps in ran[0][0]["schedules"].items():
        moved = [lrs for lrs in steps if lrs[0] > 0]
        assert len(moved) >= 3 and len({lrs[0] for lrs in moved}) >= 2, name
        assert all(abs(muon / adamw - 20.0) < 1e-9 for muon, adamw in moved), (name, steps)


def test_deepspeeds_own_muon_never_sees_our_class(ran: tuple[Facts, Any]) -> None:
    """Its stages go by tags and by "muon" in the class's name, which is ours, too: tags go, stages are refused."""
    seen = ran[0][0]["own_muon"]
    assert seen["theirs"] == "MuonWithAuxAdam" and seen["tagged"] == ["0.weight", "2.weight"]
    assert seen["takes ours"] is True, "the fault that is guarded against"
    assert seen["ours"] == "DistMuon" and seen["left"] == []


@pytest.mark.supports("the `bf16` block of the JSON", "DeepSpeed")
def test_the_bf16_block_casts_parameters_and_leaves_buffers_and_is_told_to_scripts(ran: tuple[Facts, Any]) -> None:
    wanted = "torch.bfloat16 torch.float32 True DistMuon"  # the engine says what its config says, and wraps nothing
    assert ran[0][0]["float32_buffers"] == {"register": wanted, "initialize": wanted}


def test_every_config_trains(ran: tuple[Facts, Any]) -> None:
    trained = ran[0][0]["configs"]
    assert set(trained) == {file.name for file in CONFIGS.glob("*.json")}
    assert trained == {
        "distmuon.json": "DistMuon torch.float32 1.0",
        "distmuon_bf16.json": "DistMuon torch.bfloat16 1.0",
        "engine.json": "DistMuon torch.float32 0.5",
    }


@pytest.mark.slow
def test_the_recipe_in_bfloat16_has_the_loss_curve_of_pretrain(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install distmuon[deepspeed]")
    ours, plain = (recipe(name, tmp_path / name, "--model.dtype=bfloat16") for name in ("deepspeed_train", "pretrain"))
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [r[key] for r in ours if r["kind"] == "train"] == [r[key] for r in plain if r["kind"] == "train"], key


@pytest.mark.parametrize("missing", ["_configure_optimizer", "its arguments", "0.19.7", "0.20.0"])
def test_deepspeed_without_its_seams_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="pip install distmuon[deepspeed]")
    from distmuon.integrations.deepspeed import register

    def seam(self: Any, client_optimizer: Any, model_parameters: Any) -> None: ...

    def moved(self: Any, optimizer: Any) -> None: ...

    engine_class = deepspeed.DeepSpeedEngine
    monkeypatch.setattr(engine_class, "_configure_optimizer", moved if missing == "its arguments" else seam)
    if missing == "_configure_optimizer":
        monkeypatch.delattr(engine_class, "_configure_optimizer")
    if missing[0].isdigit():
        for part, value in zip(("major", "minor", "patch"), missing.split("."), strict=True):
            monkeypatch.setattr(deepspeed, f"__version_{part}__", int(value))
    with pytest.raises(ValueError, match=r"_configure_optimizer\(.*seams of 0\.19\.8 are needed; pip install"):
        register()
