"""Default routing over the public models there are: how many it refuses, and that none of their heads is Muon's."""

from __future__ import annotations

import pytest

from benchmarks.routing_survey import survey


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("which", "package", "at_most"),
    [("causal", "transformers", 16), ("masked", "transformers", 2), ("image", "transformers", 0), ("timm", "timm", 4)],
)
def test_few_public_models_are_refused(which: str, package: str, at_most: int) -> None:
    """39 of 98 families of timm and 24 of 180 causal language models were, for class tokens, positions and biases."""
    pytest.importorskip(package)
    found = survey(which)
    assert len(found.refused) <= at_most, found.refused
    assert len(found.accepted) > 3 * len(found.unbuilt)
    assert all("routes=[distmuon.Route(" in error for error in found.refused.values())
    for name, routed in found.accepted.items():
        wrong = [spec.fqn for spec, _ in routed if _is_called_head(spec.fqn) and spec.rule == "muon"]
        assert not wrong, f"{name}: {wrong}"


def _is_called_head(fqn: str) -> bool:
    """Outside blocks, for a router may be called a classifier."""
    called = f".{fqn}".endswith((".head.weight", ".lm_head.weight", ".classifier.weight", ".head.fc.weight"))
    return called and not any(part.isdigit() for part in fqn.split("."))
