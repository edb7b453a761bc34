"""`distmuon doctor` sees what is missing, says how to get it, and takes a step on two processes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

from distmuon.cli import doctor, parity
from distmuon.integrations import TESTED
from distmuon.math import fused

NO_STEP = ["--no-step"]


def _versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: installed.get(package.replace("-", "_")))


def test_missing_packages_are_named_with_their_extra_and_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch)
    found = doctor.findings(step=False)
    assert not any(one.cure for one in found)
    for extra in ("accelerate", "transformers", "deepspeed", "fabric", "recipes"):
        assert any(f'pip install "distmuon[{extra}]"' in one.text for one in found)
    for package in ("jsonargparse", "matplotlib", "tensorboard", "datasets"):
        assert any(one.text.startswith(f"{package} is not installed; the recipe uses it") for one in found)


def test_deepspeed_without_ninja_or_compiler_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _versions(monkeypatch, deepspeed="0.19.8")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    assert doctor.main(NO_STEP) == 0
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "ninja" else f"/bin/{tool}")
    assert doctor.main(NO_STEP) == 1 and "FIX ninja for DeepSpeed: not on PATH" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert doctor.main(NO_STEP) == 1 and "install a C++ compiler" in capsys.readouterr().out


@pytest.mark.parametrize(("installed", "fault"), [("0.19.8", False), ("0.19.7", True), ("0.20.0", True)])
def test_another_version_than_the_tested_ones_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, installed: str, fault: bool
) -> None:
    _versions(monkeypatch, deepspeed=installed)
    (found,) = [one for one in doctor.findings(step=False) if one.text.startswith("deepspeed ")]
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
    """With the step on two processes, which equals one process."""
    done = subprocess.run(
        [sys.executable, "-m", "distmuon", "doctor"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode in (0, 1) and done.stdout.startswith("ok  Python"), done.stdout + done.stderr
    assert "ok  2 steps on 2 gloo processes equal one process" in done.stdout


def test_a_step_that_differs_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in the process that compares."""
    train = parity.train
    monkeypatch.setattr(parity, "train", lambda shares: [param + 1e-3 for param in train(shares)])
    found = doctor._parity()
    assert "differ from one process by 0.001" in found.text and "distmuon doctor --report" in found.cure


def test_processes_that_fail_or_hang_are_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    python.write_text("#!/bin/sh\necho no library of that kind >&2\nexit 3\n")
    python.chmod(0o755)
    found = doctor._parity()
    assert found.text.endswith("2 gloo processes: no library of that kind") and "GLOO_SOCKET_IFNAME" in found.cure
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RuntimeError, match=r"no answer within 1 s"):
        parity.compare(seconds=1)


def test_threads_that_are_no_number_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, fault in (("4", False), ("4,2", False), ("many", True), ("0", True)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert bool(doctor._threads().cure) is fault
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor._threads().text.startswith("OMP_NUM_THREADS is not set") and not doctor._threads().cure


def test_gpus_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA H100 80GB HBM3", 85_520_809_984

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(fused, "ready", lambda device: True)
    texts = [finding.text for finding in doctor._gpus()]
    assert texts[0].endswith("NCCL 2.27.5") and texts[1] == "8 x NVIDIA H100 80GB HBM3, 85.5 GB"


def test_kernels_that_do_not_compile_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def broken(device: torch.device) -> list[str]:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused, "ready", fused.ready.__wrapped__)
    monkeypatch.setattr(fused, "differing", broken)
    found = doctor._kernels()
    assert "no C compiler" in found.text and "apt-get install gcc" in found.cure
    monkeypatch.setattr(fused, "differing", lambda device: [])
    assert doctor._kernels() == doctor.Finding("Triton's kernels work")
    monkeypatch.setattr(fused, "ready", lambda device: False)
    assert doctor._kernels().cure, "it had been tried before"
    monkeypatch.setattr(doctor, "find_spec", lambda package: None)
    assert "Triton is not installed" in doctor._kernels().text and not doctor._kernels().cure


def test_the_form_for_a_report_keeps_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Only variables that are named in the module are shown, and the home folder is not."""
    secret = "hf_do_not_show_this"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "NCCL_SECRET"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    _versions(monkeypatch, deepspeed="0.19.8")
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    assert doctor.main(["--report", "--no-step"]) == 1
    out = capsys.readouterr().out
    assert secret not in out and str(tmp_path) not in out and "have ~/venv/bin on PATH" in out
    assert "NCCL_DEBUG=INFO" in out and "distmuon 0." in out and "FIX ninja" in out
    assert out.count("**") >= 12 and "The smallest program that shows it" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(["--json", "--no-step"])
    found = json.loads(capsys.readouterr().out)
    assert found[0]["text"].startswith("Python ") and status == int(any(finding["cure"] for finding in found))
