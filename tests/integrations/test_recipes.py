"""The recipes under trainers: the loss curve on the embedded text is that of `launch.pretrain`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_pretrain import ROOT, SHORT, TINY

PACKAGE = {
    "accelerate_train": "accelerate", "trainer_train": "accelerate", "deepspeed_train": "deepspeed",
    "fabric_train": "lightning_fabric",
}  # fmt: skip


def torchrun(recipe: str, folder: Path) -> list[dict[str, Any]]:
    """Four steps of two micro-batches on two ranks, with clipping and a schedule."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", f"launch.{recipe}", "--config", "configs/quickstart.yaml", *TINY, *SHORT]
    command += ["--train.steps=4", "--train.schedule=cosine", "--train.warmup_steps=2", f"--log.dir={folder}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return torchrun("pretrain", tmp_path_factory.mktemp("plain"))


@pytest.mark.supports("recipe with the loss curve of `launch.pretrain`")
@pytest.mark.parametrize("recipe", PACKAGE)
def test_a_recipe_has_the_loss_curve_of_pretrain(recipe: str, plain: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip(PACKAGE[recipe], reason=f"{PACKAGE[recipe]} is not installed, see docs/integrations.md")
    assert len((ROOT / "launch" / f"{recipe}.py").read_text().splitlines()) < 120
    run = torchrun(recipe, tmp_path)
    for key in ("step", "loss", "lr", "grad_norm"):
        ours, wanted = ([r[key] for r in records if r["kind"] == "train"] for records in (run, plain))
        assert ours == wanted, key
    assert [r["loss"] for r in run if r["kind"] == "val"][-1] == [r["loss"] for r in plain if r["kind"] == "val"][-1]
