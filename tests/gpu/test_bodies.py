"""The promises of DistMuon on CUDA, on as many ranks as there are wanted; and the same bodies on CPUs, dry.

On a machine with a GPU: ``python -m pytest -m gpu``. What each body holds is said in `bodies.py`. One GPU is enough:
ranks share it (`world.py`). `python -m benchmarks.prove_gpu` runs these and more, with a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.bodies import BODIES, SAME_BITS
from tests.gpu.world import Ranks, sizes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DRY: dict[str, dict[str, Any]] = {
    "parity": {"ways": 3},
    "newton_schulz": {"k": 96},
    "compiled": {"backend": "eager"},
    "disturbed": {"cases": ["all", "released"], "seeds": (1,)},
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Ranks on GPUs."""
    made = Ranks(max(sizes()), dry=False)
    print(f"\n{made.why}")
    yield made
    made.close()


def run(ranks: Ranks, body: str, dp_size: int, folder: Path, **given: Any) -> None:
    kwargs = {"folder": str(folder)} if body == "saved" else {}
    by_rank = ranks.run(BODIES[body], dp_size, **kwargs, **given)
    assert all(result == by_rank[0] for result in by_rank), "ranks end with different bits"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dp_size", sizes())
@pytest.mark.parametrize("body", BODIES)
def test_on_gpus(ranks: Ranks, body: str, dp_size: int, tmp_path: Path) -> None:
    run(ranks, body, dp_size, tmp_path)


@pytest.fixture(scope="module")
def dry_ranks() -> Iterator[Ranks]:
    """The same on CPUs."""
    made = Ranks(2, dry=True)
    yield made
    made.close()


def test_the_probe_on_cpus(dry_ranks: Ranks) -> None:
    dry_ranks.verbs(2)


@pytest.mark.parametrize("body", ["scaled", "external"])
def test_dry(dry_ranks: Ranks, body: str, tmp_path: Path) -> None:
    run(dry_ranks, body, 2, tmp_path)


def test_two_of_the_options_dry(dry_ranks: Ranks, tmp_path: Path) -> None:
    assert set(SAME_BITS) >= {"all", "two streams"}
    run(dry_ranks, "same_bits", 2, tmp_path, cases=["default", "all"])


@pytest.mark.slow
@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("body", BODIES)
def test_all_dry(dry_ranks: Ranks, body: str, dp_size: int, tmp_path: Path) -> None:
    run(dry_ranks, body, dp_size, tmp_path, **DRY.get(body, {}))
