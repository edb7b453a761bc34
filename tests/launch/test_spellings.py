"""The table of docs/options.md: the spelling of each face. All faces make the same policies of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distmuon import Precision, Sharding
from distmuon.cli import plan as cli
from distmuon.planning.plan import plan
from launch.config import parse

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
WANTED = {"sharding": Sharding(overlap="forward"), "precision": Precision(momentum=torch.int8)}


def spelling(where: str) -> str:
    """The code in the second column of the row."""
    (found,) = re.findall(rf"^\| {re.escape(where)} \| `(.*)` \|$", PAGE.read_text(), re.MULTILINE)
    return str(found)


def of_recipe(*arguments: str) -> dict[str, Any]:
    optimizer = parse([*arguments]).optimizer
    return {"sharding": optimizer.sharding, "precision": optimizer.precision}


def test_the_planners_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    start, arguments = "python -m distmuon plan llama-8b ", spelling("the planner's command line")
    assert arguments.startswith(start)
    assert cli.main(["gpt2", *arguments.removeprefix(start).split(), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found | json.loads(json.dumps(plan("gpt2", dp_size=64, **WANTED).to_dict())) == found


def test_the_recipes_command_line_and_yaml(tmp_path: Path) -> None:
    assert of_recipe(*spelling("the recipe's command line").split()) == WANTED
    (tmp_path / "run.yaml").write_text(spelling("the recipe's YAML"))
    assert of_recipe("--config", str(tmp_path / "run.yaml")) == WANTED


def _blocks() -> Iterator[str]:
    yield from re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_deepspeeds_json() -> None:
    integration = pytest.importorskip("distmuon.integrations.deepspeed", reason="deepspeed is not installed")
    params = json.loads("{" + spelling("DeepSpeed's JSON") + "}")["params"]
    assert integration._options(params) == WANTED


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"sharding": {"bucket_md": 3}},
            r"sharding\.bucket_md: Sharding has no such field; one of packing, .*needed",
        ),
        ({"precision": {"momentum_dtype": "int8"}}, r"precision\.momentum_dtype: Precision has no such field"),
        ({"precision": {"momentum": "int9"}}, r"precision\.momentum: found 'int9'; one of torch\.float32, "),
        ({"sharding": {"overlap": "backward"}}, r"sharding\.overlap: found 'backward'; one of False, True, forward"),
    ],
)
def test_what_a_json_cannot_say_is_named(params: dict[str, Any], message: str) -> None:
    integration = pytest.importorskip("distmuon.integrations.deepspeed", reason="deepspeed is not installed")
    with pytest.raises(ValueError, match=message):
        integration._options(params)


def test_python() -> None:
    """The snippet runs as it stands; a model is all that it needs."""
    import distmuon

    made: dict[str, Any] = {"torch": torch, "distmuon": distmuon, "model": torch.nn.Linear(4, 4)}
    (block,) = _blocks()
    exec(block, made)
    assert made["optimizer"].options.sharding == WANTED["sharding"]
    assert made["optimizer"].options.precision == WANTED["precision"]
