"""Every trainer against the plain loop: the same bits, norms and collectives; save and resume, also elsewhere.

Each trainer runs all its cases in the ranks of one `tests.integrations.worker`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forks
from tests.integrations.worker import without_shared_memory

ROOT = Path(__file__).parents[2]
PACKAGE = {
    "ddp": "torch",
    "accelerate": "accelerate",
    "trainer": "accelerate",
    "deepspeed": "deepspeed",
    "fabric": "lightning_fabric",
}
FIRST, REST = {"last": 2, "save": True, "tied": False}, {"first": 2, "tied": False}
CASES: list[dict[str, Any]] = [
    {"num_micro": 3, "clip": 1.0},
    {"dtype": "bfloat16", "tied": False},
    FIRST,
    REST,
]
AUTOCAST = {"autocast": True, "num_micro": 3, "clip": 1.0}
FLOAT16 = {"scale": 128.0, "num_micro": 3, "clip": 1.0}
ROUNDED = {"rounded": True}  # see [Note: rounded inputs] in integrations/fabric.py
MIXED: dict[str, list[dict[str, Any]]] = {
    "ddp": [AUTOCAST],
    "accelerate": [AUTOCAST, FLOAT16],
    "trainer": [AUTOCAST, FLOAT16],
    "fabric": [{**AUTOCAST, **ROUNDED}, {**FLOAT16, **ROUNDED}],
}
MATRIX = [
    {"dtype": dtype, "num_micro": num_micro, "clip": clip}
    for dtype in ("float32", "bfloat16")
    for num_micro in (1, 3)
    for clip in (0.0, 1.0)
]


def torchrun(trainer: str, folder: Path, cases: list[dict[str, Any]], nproc: int) -> list[dict[str, Any]]:
    """What the worker found, a dict a case."""
    pytest.importorskip(
        PACKAGE[trainer], reason=f"{PACKAGE[trainer]} is not installed: pip install distmuon[{trainer}]"
    )
    given = ("tests.integrations.worker", trainer, str(folder), json.dumps(cases))
    before = without_shared_memory if trainer == "deepspeed" else None
    done = forks.torchrun(*given, nproc=nproc, before=before, timeout=560)
    assert done.returncode == 0, done.stdout[-6000:]
    results: list[dict[str, Any]] = torch.load(folder / "results.pt")
    return results


def check_case(trainer: str, result: dict[str, Any], case: dict[str, Any]) -> None:
    ours, plain = result[trainer], result["plain"]
    of_weights, of_state, norms, calls, all_reduces = zip(*ours["ranks"])
    wanted_weights, wanted_state, wanted_norms, *_ = zip(*plain["ranks"])
    assert set(of_weights) == set(wanted_weights) and len(set(of_weights)) == 1, "weights, bit for bit, on all ranks"
    assert set(of_state) == set(wanted_state) and len(set(of_state)) == 1, "optimizer state, bit for bit"
    assert norms == wanted_norms and len(norms[0]) == case.get("last", 3) - case.get("first", 0)
    for step in calls[0]:
        assert step["reduce_scatter"] == ours["num_buckets"], "one reduction of each bucket a step"
        assert step["guard"] == 1
    assert all_reduces == (0,) * len(all_reduces), "no gradient is all-reduced"
    if (scale := case.get("scale")) and not case.get("first"):
        assert norms[0][0] == f"nan, scale {scale / 2}", "one rank overflowed, all skipped and halved the scale"
        assert not any("nan" in norm for norm in norms[0][1:]), "and trained on"


@pytest.mark.supports("weights, state and logged norms bit-equal to the plain loop")
@pytest.mark.supports("accumulation, clipping, bf16 weights")
@pytest.mark.supports("bf16 autocast", "DDP", "accelerate", "Trainer", "Fabric")
@pytest.mark.supports("one reduction a step, no gradient all-reduced")
@pytest.mark.supports("save and resume, bit-equal", "accelerate", "Trainer", "DeepSpeed", "Fabric")
@pytest.mark.supports("the `bf16` block of the JSON", "DeepSpeed")
@pytest.mark.supports("its saved optimizer state loads into the plain loop", "accelerate", "Trainer", "Fabric")
@pytest.mark.parametrize("trainer", PACKAGE)
def test_a_trainer_equals_the_plain_loop(trainer: str, tmp_path: Path) -> None:
    """Accumulation, clipping, bfloat16, autocast, loss scaling; and a run cut in two that must end as the unbroken."""
    cases = (CASES if trainer != "ddp" else CASES[:2]) + MIXED.get(trainer, [])
    if trainer in ("accelerate", "trainer", "fabric"):  # the plain loop reads what they have saved
        cases = [case if case is not REST else {**REST, "saved_by": trainer} for case in cases]
    results = torchrun(trainer, tmp_path, cases, nproc=2)
    for result, case in zip(results, cases, strict=True):
        check_case(trainer, result, case)


@pytest.mark.supports("accumulation, clipping, bf16 weights")
@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("trainer", PACKAGE)
def test_the_whole_matrix(trainer: str, nproc: int, tmp_path: Path) -> None:
    """fp32 and bf16, accumulation 1 and 3, clip off and on; and what was saved goes on, on as many ranks."""
    cases = MATRIX + ([FIRST, REST] if trainer != "ddp" else [])
    for result, case in zip(torchrun(trainer, tmp_path, cases, nproc), cases, strict=True):
        check_case(trainer, result, case)


@pytest.mark.supports("bf16 autocast")
@pytest.mark.supports("fp16 with a loss scaler", "accelerate", "Trainer", "Fabric")
@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("trainer", MIXED)
def test_the_whole_matrix_of_mixed_precision(trainer: str, nproc: int, tmp_path: Path) -> None:
    """bfloat16 autocast and float16 with a scaler; the scaler's state is saved and goes on."""
    cases = []
    for mixed in MIXED[trainer]:
        cases += [{**mixed, "num_micro": num_micro, "clip": clip} for num_micro in (1, 3) for clip in (0.0, 1.0)]
        cases += [{**mixed, **FIRST}, {**mixed, **REST}] if trainer != "ddp" else []
    for result, case in zip(torchrun(trainer, tmp_path, cases, nproc), cases, strict=True):
        check_case(trainer, result, case)


@pytest.mark.supports("resume with another number of ranks")
@pytest.mark.slow
@pytest.mark.parametrize("trainer", [name for name in PACKAGE if name != "ddp"])
def test_a_run_goes_on_with_another_number_of_ranks(trainer: str, tmp_path: Path) -> None:
    """Saved by 2 ranks, loaded by 3: the same weights as the plain loop that does the same."""
    torchrun(trainer, tmp_path, [FIRST], nproc=2)
    (result,) = torchrun(trainer, tmp_path, [REST], nproc=3)
    check_case(trainer, result, REST)


def test_the_counter_sees_an_all_reduce_by_ddp() -> None:
    """The zero that `check_case` wants must be able to be another number."""
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from tests.integrations.worker import Seen

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(64, 64))
        seen = Seen()
        with seen.watching():
            model(torch.ones(1, 64)).sum().backward()
        assert seen.all_reduces > 0
        # DDP must not be the last holder of the group: torch would destroy it under the GIL, for which gloo's thread
        # may be waiting to drop the all-reduce, and both would wait forever. That thread gets its turn here.
        del model
        time.sleep(0.2)
    finally:
        dist.destroy_process_group()


def test_ddp_is_not_silenced_where_it_is_to_average() -> None:
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from distmuon import DistMuon
    from distmuon.integrations.ddp import silence

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(64, 64))
        with pytest.raises(
            ValueError,
            match='silenced with grad_reduction="external"; DDP or distmuon must average the gradients; leave',
        ):
            silence(model, DistMuon(model, grad_reduction="external"))
        optimizer = DistMuon(model.module, routes="adamw")
        with pytest.raises(ValueError, match=r"silence: \(DistMuon, DistributedDataParallel\).*in this order"):
            silence(optimizer, model)  # type: ignore[arg-type]
        both = DistributedDataParallel(nn.Sequential(model.module, nn.Linear(64, 2)))
        with pytest.raises(
            ValueError, match="silence: 2 of the wrapper's 4 trainable parameters are not the optimizer"
        ):
            silence(both, optimizer)
    finally:
        dist.destroy_process_group()
