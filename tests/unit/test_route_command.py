"""`distmuon route`: its tables for well-known models, and what it says of a model that routing refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import distmuon
from distmuon.cli.main import main
from distmuon.cli.route import make_table
from distmuon.planning.shapes import TABLES as SHIPPED
from distmuon.planning.shapes import shape_table
from tests.route_tables import TABLES, golden, shown

GOLDEN = golden((Path(__file__).parent / "golden_route_tables.txt").read_text())


class Odd(nn.Module):
    """Two raw weights that nothing decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.mixing, self.strange = nn.Parameter(torch.zeros(32, 32)), nn.Parameter(torch.zeros(4, 32, 32))


def make_odd() -> nn.Module:
    return Odd()


def fails() -> nn.Module:
    raise KeyError("weights")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    return (main(["route", *arguments]), *capsys.readouterr())


def test_every_model_has_a_golden_table() -> None:
    assert set(GOLDEN) == set(TABLES) and len(TABLES) == 8


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls a name of transformers that has a successor
def test_the_golden_tables(name: str) -> None:
    """Read `tests/route_tables.py` before you renew them."""
    pytest.importorskip("peft" if name == "LoRA" else "transformers")
    assert shown(name) == GOLDEN[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_table_keeps_its_rules(name: str) -> None:
    """Names give the reasons; rules and matrices are the table's."""
    table, specs = make_table(shape_table(name)), shape_table(name)
    assert [(s.rule, s.matrices) for s in table.specs] == [(s.rule, s.matrices) for s in specs]
    assert table.proposed == () and table.elements() == sum(spec.numel for spec in specs)
    assert all(row.why != "shape table" for row in table.rows)


def test_undecided_weights_are_marked_and_the_line_to_paste_decides_them(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, f"{__name__}:make_odd")
    assert (status, err) == (1, "") and "\n? mixing " in out and "\n? strange " in out and "? layers" not in out
    assert "2 weights are undecided" in out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("DistMuon(model, routes=[")]
    model = Odd()
    optimizer = eval(line.strip(), {"distmuon": distmuon, "DistMuon": distmuon.DistMuon, "model": model})
    assert {group["rule"] for group in optimizer.param_groups} == {"muon", "adamw"}


def test_a_line_for_each_parameter_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    short, full = (run(capsys, "llama-1b", *more)[1] for more in ((), ("--full",)))
    assert "model.layers.*.mlp.up_proj.weight" in short and "model.layers.15.mlp.up_proj.weight" in full
    assert len(full.splitlines()) > 146 > len(short.splitlines())
    status, out, _ = run(capsys, "llama-1b", "--json")
    found = json.loads(out)
    assert status == 0 and found["model"] == "llama-1b" and found["routes"] is None
    assert found["elements"] == sum(row["elements"] for row in found["rows"]) == 1_235_814_400
    assert found["shares"]["muon"] == pytest.approx(973_078_528 / 1_235_814_400) and sum(found["shares"].values()) == 1
    (up,) = [row for row in found["rows"] if row["parameter"].endswith("up_proj.weight")]
    assert up["matrices"] == [[8192, 2048]] and up["lr_factor"][0] == pytest.approx(0.2 * 8192**0.5)


def test_a_config_names_its_class_and_a_recipe_its_routes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A ViT is no language model, and `architectures` says so."""
    pytest.importorskip("transformers")
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, _ = run(capsys, str(tmp_path))
    assert status == 0 and "input: first convolution" in out and "output head: called 'classifier'" in out
    recipe = tmp_path / "mine.yaml"
    text = "model: {arch: llama, config: {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4}}\n"
    recipe.write_text(
        text + 'optimizer: {adjust_lr_fn: original, routes: [{pattern: "*.up_proj.weight", rule: adamw}]}\n'
    )
    status, out, _ = run(capsys, str(recipe))
    assert "11008x64  11008x64  Muon   13.11" in out  # sqrt(11008 / 64)
    assert status == 0 and re.search(r"AdamW +1\.00 +route '\*\.up_proj\.weight'", out)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("llama", "the beginning of llama-1b, llama-8b, llama-70b"),
        ("", "model: found ''"),
        ("docs", "a folder without config.json"),
        ("no_such_module_here:make", "ModuleNotFoundError"),
        ("tests.unit.test_route_command:absent", "AttributeError"),
        ("tests.unit.test_route_command:fails", "KeyError"),
        ("tests.unit.test_route_command:run", "TypeError"),
        ("tests.unit.test_route_command:GOLDEN", "it returns dict"),
    ],
)
def test_bad_names_are_one_line(capsys: pytest.CaptureFixture[str], name: str, word: str) -> None:
    status, out, err = run(capsys, name)
    assert status == 2 and out == "" and word in err and err.count("\n") == 1 and err.count("; ") >= 2
