"""Several models and optimizers under one accelerator or Fabric, on two ranks: each call reaches the optimizer whose
parameters are meant, whatever was prepared last; what cannot be told apart is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests import forks

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    pytest.importorskip("accelerate", reason="pip install distmuon[accelerate]")
    pytest.importorskip("lightning_fabric", reason="pip install distmuon[fabric]")
    folder = tmp_path_factory.mktemp("several")
    done = forks.torchrun("tests.integrations.several", str(folder), nproc=2, timeout=560)
    assert done.returncode == 0, done.stdout[-6000:]
    ranks: Ranks = json.loads((folder / "found.json").read_text())
    return ranks


@pytest.mark.supports("several models and optimizers", "accelerate")
@pytest.mark.parametrize("calls", ["one, in disorder", "theirs last", "theirs first"])
@pytest.mark.parametrize("kind", ["muon", "adamw", "external"])
def test_two_models_under_one_accelerator_equal_the_plain_loop(found: Ranks, kind: str, calls: str) -> None:
    """The last one prepared took every clip and every accumulation, and DDP was off for a model of torch's AdamW, so
    that its ranks drifted apart."""
    plain = found[0][f"plain {kind}"]
    assert len(plain["norms"]) == 6 and min(plain["norms"]) > 0.02, "or else nothing is clipped"
    for rank in found:
        assert rank[f"accelerate {kind} {calls}"] == plain == rank[f"plain {kind}"]


@pytest.mark.supports("several models and optimizers", "Fabric")
@pytest.mark.parametrize("kind", ["muon", "adamw", "external"])
def test_two_models_under_one_fabric_equal_the_plain_loop(found: Ranks, kind: str) -> None:
    for rank in found:
        assert rank[f"fabric {kind}"] == found[0][f"plain {kind}"]


@pytest.mark.supports('its own `prepare` with grad_reduction="external"', "accelerate")
def test_accelerates_own_prepare_serves_external_gradients(found: Ranks) -> None:
    """No line of ours: accumulation, clipping by norm and by value are accelerate's own."""
    for rank in found:
        assert rank["external"]["trainer"] == rank["external"]["plain"] == found[0]["external"]["plain"]


def test_a_prepared_model_has_a_no_sync_as_one_that_ddp_wraps(found: Ranks) -> None:
    for rank in found:
        assert rank["no_sync"] == {"steps": 1}


DOUBLE = r"runs the model, and averages the gradients.*integrations\.accelerate\.prepare instead of"
REFUSED = {
    "own_prepare": DOUBLE,
    "own_prepare_and_accumulation": DOUBLE,
    "own_prepare_then_ours": r"in DistributedDataParallel, in \(.*pass the unwrapped model to this function only",
    "local_sgd": r"within model\.no_sync\(\), as accelerate's LocalSGD does.*leave LocalSGD out",
    "uneven_inputs": r"join_uneven_inputs: a model that DistMuon reduces.*even_batches=True",
    "clip_of_both": r"one call for parameters of 2 DistMuons.*once for each optimizer",
    "clip_with_adamw": r"one call for parameters of a DistMuon and of none.*once for each optimizer",
    "clip_of_a_part": r"2 of the 4 parameters of a DistMuon.*pass all parameters",
    "fabrics_clip_of_values": r"clip_gradients: clip_val=1\.0.*use max_norm",
    "clip_of_values": r"clip_grad_value_: clip_value=.*clip_grad_norm_",
    "a_model_of_two_kinds": r"Sequential: 4 of 8 trainable parameters are not DistMuon's.*prepare the parts",
    "fabrics_model_first": r"set up before its DistMuon was made.*make the optimizer first",
}


@pytest.mark.refuses("clipping by value", "accelerate", use="`clip_grad_norm_`")
@pytest.mark.refuses("clipping by value", "Fabric", use="`clip_grad_norm_`")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_wrongly_is_refused_on_all_ranks(found: Ranks, name: str) -> None:
    """accelerate's own `prepare` named `no_sync` where micro-batches were accumulated."""
    messages = {rank["refused"][name] for rank in found}
    assert len(messages) == 1 and set(REFUSED) == set(found[0]["refused"])
    (message,) = messages
    assert re.search(f"^ValueError: .*{REFUSED[name]}", message), message
