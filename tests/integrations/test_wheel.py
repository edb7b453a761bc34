"""The wheel is enough: it holds the library, the recipe's programs and its configs, and all commands work from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = "--train.steps=2 --train.warmup_steps=1 --train.eval_every=2 --train.eval_batches=1 --train.global_batch=2"
SHORT += " --train.micro_batch=1 --model.seq_len=32 --log.dir=run"


def _run(folder: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`distmuon` of the unpacked wheel, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distmuon", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_the_wheel_is_enough(tmp_path: Path) -> None:
    """Nothing of the clone is on the path: the folder is empty, and the wheel lies elsewhere."""
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    for name in ("distmuon", "launch", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "pip wheel --quiet --no-deps --no-build-isolation --disable-pip-version-check -w"
    subprocess.run([sys.executable, "-m", *build.split(), str(tmp_path), str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert "distmuon = distmuon.cli.main:main" in entry_points and "distmuon/py.typed" in names
    # setup.py lists packages by itself; a module that it misses would be missed here
    for part, at in (("distmuon", "distmuon"), ("launch", "distmuon/_recipe/launch")):
        assert {f"{at}/{file.relative_to(ROOT / part)}" for file in (ROOT / part).rglob("*.py")} <= names
    for part, pattern in (("configs", "*.*"), ("launch", "*.jinja"), ("launch", "*.css"), ("launch", "*.js")):
        for file in (ROOT / part).rglob(pattern):
            assert f"distmuon/_recipe/{file.relative_to(ROOT)}" in names
    assert {name.partition("/")[0] for name in names if not name.startswith("distmuon-")} == {"distmuon"}

    work.mkdir()
    planned = _run(work, site, "plan", "llama_1b_gpu", "--dp=8", "--json", "--compare=false")
    assert planned.returncode == 0 and json.loads(planned.stdout)[0]["model"] == "llama_1b_gpu", planned.stderr
    trained = _run(work, site, "pretrain", "--config", "quickstart", *SHORT.split())
    assert trained.returncode == 0 and (work / "run" / "metrics.jsonl").is_file(), trained.stderr
    shown = _run(work, site, "report", "run", "--out=run.html")
    assert shown.returncode == 0 and (work / "run.html").is_file(), shown.stderr
    swept = _run(work, site, "sweep", "--config=quickstart", "--nproc=1", "--set", "train.global_batch=0")
    assert swept.returncode == 2 and "train.global_batch: found 0" in swept.stderr
