"""The experiment on shardings: what its page says is in its results, and a row made again falls on the same line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import shardings

ROOT = Path(__file__).parents[2]


def _curves() -> Any:
    return json.loads(shardings.RESULTS.read_text())


def test_the_results_hold_what_the_page_says() -> None:
    curves = _curves()
    wanted = {
        f"{model}/{sharding}/{seed}"
        for model in shardings.MODELS
        for sharding in [*shardings.SHARDINGS, shardings.CONTROL]
        for seed in shardings.SEEDS
        if model == "llama" or "TP" not in sharding
    }
    assert curves.keys() == wanted and {len(curve) for curve in curves.values()} == {50}
    found = shardings.differences(curves)
    equal = max(largest for _, sharding, largest, _ in found if sharding != shardings.CONTROL)
    control = [(largest, last) for _, sharding, largest, last in found if sharding == shardings.CONTROL]
    page = (ROOT / "docs" / "sharding.md").read_text()
    (bound,) = re.findall(r"differs from that of one process by more than (\S+)\.\s", page)
    assert equal <= float(bound) < shardings.TOLERANCE
    (off, low, high) = re.findall(r"off by up to (\S+), .*?last loss is (\S+) to (\S+)\s", page, re.DOTALL)[0]
    assert round(max(largest for largest, _ in control), 2) == float(off) > 100 * shardings.TOLERANCE
    assert [round(last, 3) for _, last in sorted(control, key=lambda pair: pair[1])] == [float(low), float(high)]


@pytest.mark.slow
def test_a_row_made_again_is_on_the_line() -> None:
    alone, cut = (shardings.run("llama", name, 0) for name in ("one process", "HSDP, 2 x 2"))
    assert max(abs(a - b) for a, b in zip(alone, cut, strict=True)) <= shardings.TOLERANCE
    control = shardings.run("llama", shardings.CONTROL, 0)
    assert max(abs(a - b) for a, b in zip(alone, control, strict=True)) > 100 * shardings.TOLERANCE
