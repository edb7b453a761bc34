"""The recipes under trainers: the loss curve on the embedded text is that of `launch.pretrain`, also after a change of
trainer in the middle of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import pretrain
from tests import forks
from tests.integrations.worker import without_shared_memory
from tests.launch.test_pretrain import ROOT, SHORT, TINY, records

PACKAGE = {
    "accelerate_train": "accelerate",
    "trainer_train": "accelerate",
    "deepspeed_train": "deepspeed",
    "fabric_train": "lightning_fabric",
    "lightning_train": "lightning",
}
LAUNCHERS = {
    "accelerate_train": (
        "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --module launch.accelerate_train"
    ),
    "deepspeed_train": "deepspeed --num_gpus 2 --module launch.deepspeed_train",
    "fabric_train": "fabric run --accelerator cpu --devices 2 launch/fabric_train.py",
}


RUN = [
    *TINY,
    *SHORT,
    "--train.steps=4",
    "--train.schedule=cosine",
    "--train.warmup_steps=2",
    "--checkpoint.every=2",
    "--optimizer.precision.newton_schulz=float32",
    "--optimizer.precision.exchange=bfloat16",
    "--train.verify_every=2",
]


def torchrun(recipe: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Four steps of two micro-batches on two ranks, or what is left of them; the records."""
    pytest.importorskip(PACKAGE.get(recipe, "torch"), reason=f"{recipe} needs more, see docs/integrations.md")
    given = ["--config", "configs/quickstart.yaml", *RUN, f"--log.dir={folder}", *arguments]
    before = without_shared_memory if recipe == "deepspeed_train" else None
    done = forks.torchrun(f"launch.{recipe}", *given, nproc=2, before=before)
    assert done.returncode == 0, done.stdout[-6000:]
    return records(folder)


def launched(command: list[str], folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The records of the recipe that `command` starts."""
    command = [*command, "--config", "configs/quickstart.yaml", *RUN, f"--log.dir={folder}", *arguments]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # launchers; ninja
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return records(folder)


def curve(run: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """All steps and validations, in order."""
    keys = {"train": ("step", "loss", "lr", "grad_norm"), "val": ("step", "loss")}
    return [tuple(record[key] for key in keys[record["kind"]]) for record in run if record["kind"] in keys]


def losses(run: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in run if record["kind"] == "train"]


def cut_in_two(whole: Path, folder: Path) -> Path:
    """A copy of the run as it was when only the first two of its four steps had been saved."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an unbroken run under a recipe, run once."""
    folders: dict[str, Path] = {}

    def run(recipe: str) -> Path:
        if recipe not in folders:
            folder = tmp_path_factory.mktemp(recipe)
            torchrun(recipe, folder)
            folders[recipe] = folder
        return folders[recipe]

    return run


Whole = Callable[[str], Path]


@pytest.mark.supports("recipe with the loss curve of `launch.pretrain`")
@pytest.mark.parametrize("recipe", PACKAGE)
def test_a_recipe_has_the_loss_curve_of_pretrain(recipe: str, whole: Whole) -> None:
    assert len((ROOT / "launch" / f"{recipe}.py").read_text().splitlines()) < 120
    assert curve(records(whole(recipe))) == curve(records(whole("pretrain")))


def verified(run: list[dict[str, Any]]) -> list[int]:
    """The steps before which the parameters were compared across ranks."""
    return [record["step"] for record in run if record["kind"] == "train" and record["bytes"].get("verify")]


@pytest.mark.parametrize("recipe", PACKAGE)
def test_a_recipe_drops_none_of_the_configs_options(recipe: str, whole: Whole) -> None:
    """The recipes under trainers once left `train.verify_every` out, and the Trainer's did not start with an exchange
    in another dtype."""
    assert verified(records(whole(recipe))) == verified(records(whole("pretrain"))) == [2, 4]


SLOW = pytest.mark.slow


@pytest.mark.supports("its recipe under its own launcher, two processes on CPUs")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", LAUNCHERS)
def test_a_frameworks_own_launcher_starts_its_recipe(recipe: str, whole: Whole, tmp_path: Path) -> None:
    """DeepSpeed's gives each process a --local_rank, which the command line did not know; `fabric run` has launched
    before Fabric.launch, which raised."""
    pytest.importorskip(PACKAGE[recipe], reason=f"{recipe} needs more, see docs/integrations.md")
    run = launched(LAUNCHERS[recipe].split(), tmp_path)
    assert [record["world_size"] for record in run if record["kind"] == "run"] == [2]
    assert curve(run) == curve(records(whole("pretrain")))


@pytest.mark.supports("a run begun here goes on under `launch.pretrain`, and back")
@pytest.mark.parametrize("recipe", [r if r == "accelerate_train" else pytest.param(r, marks=SLOW) for r in PACKAGE])
def test_what_a_recipe_began_goes_on_under_pretrain(recipe: str, whole: Whole, tmp_path: Path) -> None:
    """Bit for bit on as many ranks, up to the order of sums on one."""
    folders = [cut_in_two(whole(recipe), tmp_path / name) for name in ("two", "one")]
    assert curve(torchrun("pretrain", folders[0])) == curve(records(whole("pretrain")))
    assert [r["resumed_from"] for r in records(folders[0]) if r["kind"] == "run"] == [0, 2]
    pretrain.main(["--config", str(ROOT / "configs/quickstart.yaml"), *RUN, f"--log.dir={folders[1]}"])
    assert losses(records(folders[1])) == pytest.approx(losses(records(whole("pretrain"))), rel=1e-4)


@pytest.mark.supports("a run begun here goes on under `launch.pretrain`, and back")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", PACKAGE)
def test_what_pretrain_began_goes_on_under_a_recipe(recipe: str, whole: Whole, tmp_path: Path) -> None:
    run = torchrun(recipe, cut_in_two(whole("pretrain"), tmp_path / "run"))
    assert curve(run) == curve(records(whole("pretrain")))
    assert [record["resumed_from"] for record in run if record["kind"] == "run"] == [0, 2]
