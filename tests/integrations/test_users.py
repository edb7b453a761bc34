"""Scripts as users write them, on two ranks: the Trainer with all that people switch on, and a forgotten line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import forks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    pytest.importorskip("accelerate", reason="pip install distmuon[transformers]")
    folder = tmp_path_factory.mktemp("users")
    done = forks.torchrun("tests.integrations.user_worker", str(folder), nproc=2, timeout=560)
    assert done.returncode == 0, done.stdout[-6000:]
    ranks: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return ranks


def test_the_trainer_weighs_tokens_clips_and_logs_as_the_plain_loop(found: list[dict[str, Any]]) -> None:
    """Ranks and micro-batches hold different numbers of tokens; the Trainer divides by the tokens of all of them."""
    for rank in found:
        assert rank["whole"]["norms"] == rank["plain"]["norms"] and len(rank["plain"]["norms"]) == 6
        assert max(rank["plain"]["norms"].values()) > 0.5, "or else nothing was clipped"


@pytest.mark.supports("evaluation, `save_total_limit`, best model, `resume_from_checkpoint=True`", "Trainer")
def test_evaluations_saves_and_the_best_model_under_the_trainer(found: list[dict[str, Any]]) -> None:
    for rank in found:
        whole = rank["whole"]
        best = min(whole["evaluations"], key=lambda step: whole["evaluations"][step])
        assert sorted(whole["evaluations"]) == ["2", "4", "6"] and whole["best"] == f"checkpoint-{best}"
        assert whole["again"] == whole["evaluations"][best], "the best weights are in the model, and used by forward"
        assert whole["kept"] == sorted({whole["best"], "checkpoint-6", *whole["kept"][:1]}) and len(whole["kept"]) == 2
    assert found[0]["whole"]["weights"] == found[1]["whole"]["weights"]


@pytest.mark.supports("evaluation, `save_total_limit`, best model, `resume_from_checkpoint=True`", "Trainer")
def test_resume_from_checkpoint_true_goes_on_bit_for_bit(found: list[dict[str, Any]]) -> None:
    """Cut where a callback that was added after `attach` asked for a save."""
    for rank in found:
        whole, cut, resumed = rank["whole"], rank["cut"], rank["resumed"]
        assert "checkpoint-3" in cut["kept"] and sorted(cut["losses"]) == ["1", "2", "3"]
        for key in ("norms", "losses", "evaluations"):
            assert resumed[key] == whole[key], key
        assert resumed["weights"] == whole["weights"] and resumed["best"] == whole["best"]


@pytest.mark.refuses("its own `prepare`, on two ranks or more", "accelerate", use="`integrations.accelerate.prepare`")
def test_accelerates_own_prepare_raises_and_names_the_cure(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "DistributedDataParallel: it runs the model, and averages" in rank["own prepare"]
        assert "distmuon.integrations.accelerate.prepare instead of accelerator.prepare" in rank["own prepare"]
