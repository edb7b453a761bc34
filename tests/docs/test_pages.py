"""The pages for readers in a hurry: their blocks run, their links lead somewhere, their numbers are right.

docs/coming_from.md has tests of its own (tests/unit/test_coming_from.py, tests/distributed/test_loop_lines.py), and so
have docs/options.md (tests/launch/test_spellings.py) and docs/integrations.md (tests/integrations).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distmuon
from distmuon.math.coefficients import coefficient_schedule
from launch.config import parse

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RUN = ["index", "routing", "troubleshooting"]
"""Pages whose Python blocks run in order, in one namespace, with a model and its optimizer."""


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 80)
        self.router = nn.Linear(24, 12)
        self.out = nn.Linear(24, 24)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.qkv(hidden)[..., :24] + self.router(hidden).sum(-1, keepdim=True)
        return hidden + first.relu() + self.out(hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(24, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        loss: torch.Tensor = nn.functional.cross_entropy(self.head(hidden), ids)
        return loss


@pytest.mark.parametrize("page", RUN)
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_the_blocks_of_a_page_run(page: str) -> None:
    model = Model()
    optimizer = distmuon.DistMuon(model, lr=4e-4)
    names: dict[str, Any] = {"torch": torch, "distmuon": distmuon, "model": model, "optimizer": optimizer}
    found = blocks(f"docs/{page}.md", "python")
    assert found
    try:
        for block in found:
            exec(block, names)
            if names["model"] is model:
                model(torch.arange(8)).backward()
                names["optimizer"].step()
                names["optimizer"].zero_grad()
        if page == "troubleshooting":
            assert {row.key.partition("/")[0] for row in names["rows"]} >= {
                "distmuon::guard",
                "distmuon::newton_schulz",
            }
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_hook_of_the_page_names_the_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    """The block under "NaN within the first hundred steps"."""
    model = Model()
    (block,) = [block for block in blocks("docs/troubleshooting.md", "python") if "isfinite" in block]
    exec(block, {"model": model})
    model(torch.arange(8)).backward()
    assert capsys.readouterr().out == ""
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    model(torch.arange(8)).backward()
    assert capsys.readouterr().out.splitlines()[0].startswith("not finite: head.")


def test_the_readme_shows_the_whole_script() -> None:
    assert (ROOT / "launch" / "minimal.py").read_text() in blocks("README.md", "python")


def test_the_whole_script_runs_on_two_ranks_and_learns(tmp_path: Path) -> None:
    """Copied alone into a folder, as a reader copies it."""
    (tmp_path / "minimal.py").write_text((ROOT / "launch" / "minimal.py").read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "minimal.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    losses = [float(found) for found in re.findall(r"^step \d+  loss ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3, done.stdout
    assert "layers.layers.0.linear1.weight" in done.stdout and "Muon: " in done.stdout
    saved = torch.load(tmp_path / "minimal.pt", weights_only=True)
    assert saved["head.weight"].shape == (256, 128)


RECIPE = re.compile(r"(?:-m launch\.(?:pretrain|ray_train)|sbatch .*launch/slurm\.sbatch) (.*)")


def commands(page: Path) -> list[str]:
    """The lines of the page's bash blocks, continued lines as one."""
    found = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.replace("\\\n", " ").splitlines()]


def test_the_recipes_keys_on_the_pages_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the recipe in a bash block is parsed by the recipe."""
    monkeypatch.chdir(ROOT)
    given = [found[1] for page in PAGES for line in commands(page) if (found := RECIPE.search(line))]
    assert len(given) >= 9
    for arguments in given:
        of_recipe = re.sub(r"--workers \d+|--gpu|<option>", "", arguments)
        assert parse(shlex.split(re.sub(r"^(?=configs/)", "--config ", of_recipe), comments=True)).train.steps > 0


def slug(heading: str) -> str:
    """The anchor that forges and the site make of a heading."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", plain))


def anchors(page: Path) -> set[str]:
    plain = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(found) for found in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)} | set(
        re.findall(r'<a id="([\w-]+)">', plain)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    plain = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


def test_the_table_of_newton_schulz_steps() -> None:
    """FAQ, "Why five steps?": the values in exact numbers, the band, and the table that settles at 1."""
    rows = re.findall(r"^\| (0\.0\d*1) \|(.*)\|$", text("docs/faq.md"), re.MULTILINE)
    assert len(rows) == 2
    for start, cells in rows:
        value = float(start)
        for (a, b, c), cell in zip(coefficient_schedule("jordan", 8), cells.split("|"), strict=True):
            value = a * value + b * value**3 + c * value**5
            assert float(cell) == pytest.approx(value, abs=6e-5)
    values = torch.linspace(0.002, 1.0, 100_000, dtype=torch.float64)
    for table, steps, low, high in (
        ("jordan", 5, 0.66, 1.21),
        ("jordan", 9, 0.66, 1.21),
        ("polar_express", 8, 0.98, 1.02),
    ):
        found = values.clone()
        for a, b, c in coefficient_schedule(table, steps):
            found = a * found + b * found**3 + c * found**5
        assert low < found.min() and found.max() < high, (table, steps, found.min(), found.max())


def test_what_pages_repeat_of_the_quickstart() -> None:
    """Its share of the steps stands on other pages, and its steps in the command that advises."""
    for page in ("README.md", "docs/quickstart.md"):
        ((muon, share, adamw),) = re.findall(r"\| (\d+) \(([\d.]+)x\) \| (\d+) \|", text(page))
        said = re.findall(r"(0\.\d+) of the steps", text("docs/faq.md") + text("docs/should_i.md"))
        assert len(said) == 2 and set(said) == {share}
        assert f"{muon} steps where AdamW took {adamw}" in text("distmuon/cli/advise.py")


def llama_8b(dp_size: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The planner's counts for distmuon and for AdamW."""
    found = distmuon.plan("llama-8b", dp_size=dp_size, **{"param_dtype": torch.bfloat16, **options}).to_dict()
    (adamw,) = [other for other in found["others"] if other["way"] == "adamw"]
    return found, adamw


def test_the_fullest_ranks_of_the_readme() -> None:
    said = re.search(
        r"at 2 ranks\s+\(([\d.]+)\s+against\s+([\d.]+) GB\).*\(([\d.]+) against ([\d.]+)\)",
        text("README.md"),
        re.DOTALL,
    )
    assert said is not None
    counted = [way["fullest_held_bytes"]["total"] / 1e9 for ranks in (2, 64) for way in llama_8b(ranks)]
    assert [float(figure) for figure in said.groups()] == [round(figure, 1) for figure in counted]
    at_8 = [way["fullest_held_bytes"]["total"] / 1e9 for way in llama_8b(8)]
    assert at_8[0] == pytest.approx(at_8[1], rel=2e-3)


def test_the_table_beside_whole_matrices() -> None:
    """docs/should_i.md: where the other placement is estimated to be faster, the page says so."""
    rows = re.findall(
        r"^\| (\d+) \| (\d+) / (\d+) \| ([\d.]+) / ([\d.]+) \| ([\d.]+) / ([\d.]+) \|$",
        text("docs/should_i.md"),
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["8", "32", "64", "256"]
    for ranks, *said in rows:
        found, _ = llama_8b(int(ranks))
        (whole,) = [other for other in found["others"] if other["way"] == "whole matrices"]
        counted = [round(1e3 * way["time"]["step_s"]) for way in (found, whole)]
        counted += [round(way["fullest_held_bytes"]["total"] / 1e9, 1) for way in (found, whole)]
        counted += [round(way["busiest_sent_bytes"]["total"] / 1e9, 1) for way in (found, whole)]
        assert [float(figure) for figure in said] == counted, ranks


def test_the_table_of_what_options_save() -> None:
    """docs/options.md, and the gigabytes that docs/troubleshooting.md takes from it."""
    held, gib = ("parameters", "gradients", "state", "transient", "total"), 2**30
    names = {"Sharding": distmuon.Sharding, "Precision": distmuon.Precision, "torch": torch}
    totals = {}
    rows = re.findall(r"^\| (bf16|fp32) \| (none|`.*?`) \|(.*)\|$", text("docs/options.md"), re.MULTILINE)
    assert len(rows) == 11
    for dtype, option, cells in rows:
        options: dict[str, Any] = {"param_dtype": torch.bfloat16 if dtype == "bf16" else torch.float32}
        for spelled in re.findall("`(.*?)`", option):
            policy = eval(spelled, names)
            options[type(policy).__name__.lower()] = policy
        found, _ = llama_8b(8, **options)
        counted = [found["fullest_held_bytes"][name] / gib for name in held]
        counted.append(found["busiest_sent_bytes"]["total"] / gib)
        figures = [*(f"{figure:.2f}" for figure in counted), f"{found['traffic']:.4f}"]
        assert [cell.strip() for cell in cells.split("|")] == figures, option
        totals[dtype, option] = counted[4]
    for option, saved in re.findall(
        r"^\| (`(?:Sharding|Precision)\(.*?\)`) \| ([\d.]+)", text("docs/troubleshooting.md"), re.MULTILINE
    ):
        if option == "`Sharding(bucket_mb=64)`":
            smaller, _ = llama_8b(8, sharding=distmuon.Sharding(bucket_mb=64))
            total = smaller["fullest_held_bytes"]["total"] / gib
            assert f"{smaller['traffic']:.2f}" == "1.07"
        else:
            total = totals["bf16", option]
        assert float(saved) == pytest.approx(totals["bf16", "none"] - total, abs=0.051), option


def test_the_job_for_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun and the recipe read what the pod runs, with the variables that the operator sets."""
    yaml = pytest.importorskip("yaml", reason="pip install distmuon[recipes]")
    from torch.distributed.run import config_from_args, parse_args

    monkeypatch.chdir(ROOT)
    job = yaml.safe_load(text("launch/kubernetes.yaml"))
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch" and container["command"][0] == "torchrun"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    nodes, policy = worker["replicas"], job["spec"]["elasticPolicy"]
    assert job["spec"]["nprocPerNode"] == str(gpus) and policy["minReplicas"] == policy["maxReplicas"] == nodes
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    for name, value in {
        "PET_NNODES": f"{nodes}:{nodes}",
        "PET_NPROC_PER_NODE": gpus,
        "PET_MAX_RESTARTS": policy["maxRestarts"],
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": "distmuon-worker-0:29400",
        "PET_RDZV_ID": "distmuon",
    }.items():
        monkeypatch.setenv(name, str(value))
    arguments: Namespace = parse_args(container["command"][1:])
    launch, _, _ = config_from_args(arguments)
    assert (launch.min_nodes, launch.max_nodes, launch.nproc_per_node) == (nodes, nodes, gpus)
    assert (launch.max_restarts, launch.rdzv_backend) == (3, "c10d") and arguments.module
    config = parse(arguments.training_script_args)
    assert arguments.training_script == "launch.pretrain" and config.checkpoint.every == 500
    assert config.train.accumulation(nodes * gpus) == 2
    assert config.log.dir.startswith("/runs/") and config.data.train.startswith("data/")
