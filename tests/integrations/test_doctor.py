"""`python -m distmuon doctor` sees what is missing, and says how to get it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from distmuon.cli import doctor
from distmuon.integrations import TESTED


def _versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: installed.get(package.replace("-", "_")))


def test_missing_packages_are_named_with_their_extra_and_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch)
    found = doctor.findings()
    assert not any(one.cure for one in found)
    for extra in ("accelerate", "transformers", "deepspeed", "fabric"):
        assert any(f"pip install distmuon[{extra}]" in one.text for one in found)


def test_deepspeed_without_ninja_or_compiler_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _versions(monkeypatch, deepspeed="0.19.8")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    assert doctor.main() == 0
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "ninja" else f"/bin/{tool}")
    assert doctor.main() == 1 and "FIX ninja for DeepSpeed: not on PATH" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert doctor.main() == 1 and "install a C++ compiler" in capsys.readouterr().out


@pytest.mark.parametrize(("installed", "fault"), [("0.19.8", False), ("0.19.7", True), ("0.20.0", True)])
def test_another_version_than_the_tested_ones_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, installed: str, fault: bool
) -> None:
    _versions(monkeypatch, deepspeed=installed)
    (found,) = [one for one in doctor.findings() if one.text.startswith("deepspeed ")]
    assert bool(found.cure) is fault


@pytest.mark.parametrize("package", TESTED)
def test_an_extra_installs_the_versions_that_were_tested(package: str) -> None:
    """setup.cfg cannot import the table, which source trees on PYTHONPATH need without any metadata."""
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    extra, lowest, below = TESTED[package]
    (line,) = re.findall(rf"^{package}>=(.*)$", setup["options.extras_require"][extra], re.MULTILINE)
    assert line == f"{'.'.join(map(str, lowest))},<{'.'.join(map(str, below))}"


def test_the_command_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distmuon", "doctor"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (0, 1) and done.stdout.startswith("ok  Python"), done.stdout + done.stderr
