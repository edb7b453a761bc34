"""FSDP2 under accelerate, the Trainer, Fabric and Lightning: the bits of `fully_shard` and a loop by hand, which the
oracle confirms; save and resume; what is refused. All run in the ranks of one `fsdp2_worker`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distmuon.math.newton_schulz import processor_of
from tests import forks
from tests.reference import Reference
from tests.standing import SPLITS, STACKS, loss_fn, make_batches, rules
from tests.training import EXACT, assert_equals_reference

TRAINERS = ["accelerate", "trainer", "fabric", "lightning"]
CLIPPED: dict[str, Any] = {"num_micro": 3, "clip": 1.0, "tied": False}
BEGIN, GO_ON = {"last": 2, "save": True}, {"first": 2}
ROUNDED = {"num_micro": 3, "clip": 1.0, "autocast": True}
EFFICIENT = {"how": "efficient", "tied": False}
Found = tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]


def cases(*, nightly: bool) -> dict[str, list[dict[str, Any]]]:
    """Each trainer saves whole state or sharded state by day, and the other by night."""
    found = {}
    for trainer in TRAINERS:
        how = "sharded" if (trainer in ("accelerate", "lightning")) != nightly else "full"
        found[trainer] = [{**CLIPPED, **BEGIN, "how": how}, {**CLIPPED, **GO_ON, "how": how}]
        if nightly:
            found[trainer] += [{}, {"dtype": "bfloat16", "tied": False}]
    found["accelerate" if nightly else "trainer"] += [EFFICIENT]
    found["trainer" if nightly else "accelerate"] += [ROUNDED]
    return found


def run(folder: Path, wanted: dict[str, list[dict[str, Any]]], facts: bool) -> Found:
    for package in ("accelerate", "transformers", "lightning_fabric", "lightning.pytorch"):
        pytest.importorskip(package, reason="pip install distmuon[transformers,fabric,lightning]")
    given = (str(folder), json.dumps(wanted), str(int(facts)))
    done = forks.torchrun("tests.integrations.fsdp2_worker", *given, nproc=2, timeout=560)
    assert done.returncode == 0, done.stdout[-6000:]
    return torch.load(folder / "results.pt"), json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("fsdp2"), cases(nightly=False), facts=True)


def expected(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The oracle's weights and those of the start, by the names of the model that is trained."""
    from tests.integrations.worker import WithLoss

    model = WithLoss(0, case.get("tied", True)).standing
    start = {f"standing.{fqn}": param.detach().clone() for fqn, param in model.named_parameters()}
    of = {**rules(model), **({} if case.get("tied", True) else {"head.weight": "adamw"})}
    oracle = Reference(model, of, splits=SPLITS, stacks=STACKS, lr=EXACT["lr"], max_norm=case.get("clip"))
    for step in range(case.get("last", 3)):
        oracle.step(loss_fn, make_batches(step, 2, case.get("num_micro", 1)))
    return {f"standing.{fqn}": weight for fqn, weight in oracle.weights.items()}, start


def check(trainer: str, results: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for result, case in zip(results, wanted, strict=True):
        ours, by_hand = result[trainer], result["by hand"]
        of_weights, of_state, norms, calls = zip(*ours["ranks"])
        assert set(of_weights) == {rank[0] for rank in by_hand["ranks"]} and len(set(of_weights)) == 1, "weights"
        assert set(of_state) == {rank[1] for rank in by_hand["ranks"]} and len(set(of_state)) == 1, "optimizer state"
        assert norms == tuple(rank[2] for rank in by_hand["ranks"])
        assert len(norms[0]) == case.get("last", 3) - case.get("first", 0)
        assert all(set(step) == {"guard", "dp_gather", "scatter"} and step["guard"] == 1 for step in calls[0])
        if case.get("dtype", "float32") == "float32" and not case.get("autocast"):
            assert_equals_reference(ours["weights"], *expected(case))


@pytest.mark.supports("FSDP2: bit-equal to `fully_shard` and a loop by hand; accumulation, clipping, the true norm")
@pytest.mark.supports("FSDP2: save and resume, bit-equal, whole or sharded files")
@pytest.mark.supports("FSDP2: the plugin's mixed precision policy", "accelerate")
@pytest.mark.supports("FSDP2: a unit a layer, `cpu_ram_efficient_loading`", "Trainer")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_fsdp2_under_a_trainer_equals_the_loop_by_hand(found: Found, trainer: str) -> None:
    check(trainer, found[0][trainer], cases(nightly=False)[trainer])


@pytest.mark.supports("FSDP2: the plugin's mixed precision policy", "Trainer")
@pytest.mark.slow
def test_the_other_cases_of_fsdp2_under_trainers(tmp_path: Path) -> None:
    """Without a clip, with tied weights, in bfloat16, and state in the other sort of files."""
    wanted = cases(nightly=True)
    results, _ = run(tmp_path, wanted, facts=False)
    for trainer in TRAINERS:
        check(trainer, results[trainer], wanted[trainer])


def test_prepare_makes_the_same_optimizer_of_the_shards(found: Found) -> None:
    """A schedule and a hook that were made before `prepare` are heard, routes and splits stay, and no whole parameter
    is held while the model is cut, or each device would hold the whole model."""
    for rank in found[1]:
        fact = rank["the_same_object"]
        left, left_by_torchs = fact.pop("left whole")
        assert left == left_by_torchs == [1]
        lrs = fact.pop("lrs")  # groups: the route's matrix, Muon, AdamW, in the order of the model
        assert sorted(lrs[0]) == [0.0025, 0.005, 0.005] and sorted(lrs[1]) == [0.000625, 0.00125, 0.00125]
        assert all(fact.values()) and len(fact) == 4, fact


@pytest.mark.supports("FSDP2: a unit a layer, `cpu_ram_efficient_loading`", "accelerate")
def test_units_a_layer_with_checkpointing_and_rank_0s_values_equal_zero_1(found: Found) -> None:
    for rank in found[1]:
        no_bfloat16 = processor_of(torch.device("cpu")) == "no_bfloat16"  # AVX2, whose products round otherwise: 1.9e-6
        assert max(rank["units_a_layer"]) <= (5e-6 if no_bfloat16 else 1e-6)


@pytest.mark.supports("FSDP2: evaluation, best model, `train` called twice", "Trainer")
def test_evaluations_and_the_best_model_under_the_trainers_fsdp2(found: Found) -> None:
    """`save_strategy="best"` is refused without FSDP2, where a single rank saves."""
    facts = [rank["trainers_evaluations"] for rank in found[1]]
    assert facts[0] == facts[1]
    losses, second = facts[0]["losses"], facts[0]["second"]
    assert losses[0] > losses[1] == facts[0]["best"] > second[0] > second[1]
    assert facts[0]["same"] and facts[0]["steps"] == 4


def test_the_blocks_of_the_page_train(found: Found) -> None:
    for rank in found[1]:
        assert list(rank["of_the_page"].values()) == [1] * 5, rank["of_the_page"]


REFUSED = {
    "own_prepare": r"fully_shard was called after DistMuon was made",
    "own_prepare_of_pairs": r"param_groups: they hold 6 parameters that are not the 6 of construction",
    "with_state": r"accelerator\.prepare: a DistMuon that has state; .*prepare it before the first forward",
    "of_a_part": r"Sequential: 4 of 6 trainable parameters are not DistMuon's; .*give DistMuon the whole model",
    "cut_without_the_plugin": r"the model of a DistMuon that fully_shard has cut, in \(FSDPSequential, DistMuon\); .*"
    r"FullyShardedDataParallelPlugin\(fsdp_version=2\)",
    "an_option": r"sharding\.overlap: set for a model that .* has cut; its default is needed",
    "fabrics_own_setup": r"fully_shard was called after DistMuon was made, .*call fully_shard\(model\) first",
    "fabrics_setup": r"Fabric: strategy ModelParallelStrategy; .*setup_optimizers\(DistMuon\(model\)\), instead of",
}


@pytest.mark.refuses("FSDP2: its own `prepare` or `setup`", "accelerate", use="`integrations.accelerate.prepare`")
@pytest.mark.refuses("FSDP2: its own `prepare` or `setup`", "Fabric", use="`setup_module`, then `setup_optimizers`")
@pytest.mark.parametrize("name", REFUSED)
def test_what_fsdp2_would_train_wrongly_is_refused_on_all_ranks(found: Found, name: str) -> None:
    messages = {rank["refusals"][name] for rank in found[1]}
    assert len(messages) == 1 and set(REFUSED) == set(found[1][0]["refusals"])
    assert re.search(f"^ValueError: .*{REFUSED[name]}", *messages)
