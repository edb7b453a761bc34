"""`python -m distmuon doctor`: check this machine for each trainer, before a run fails.

This module decides what counts as a fault: a package that is installed and cannot work does, an absent package does
not. It reads only versions and PATH, and imports no trainer (DeepSpeed's import takes seconds).
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from distmuon.integrations import TESTED


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report; `cure` is empty if there is no fault."""

    text: str
    cure: str = ""


def findings() -> list[Finding]:
    """Make all checks; return the findings in the order in which they are printed."""
    found = [_torch()]
    backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available", lambda: False)()]
    found.append(Finding(f"backends {', '.join(backends) or 'none'}; {torch.cuda.device_count()} GPUs"))
    for package in TESTED:
        found.append(_package(package))
    if _version("deepspeed") is not None:
        found += _deepspeed_tools()
    return found


def main() -> int:
    """Print the findings; return 1 if any needs a cure, else 0."""
    found = findings()
    for finding in found:
        print(f"{'FIX ' if finding.cure else 'ok  '}{finding.text}" + (f"\n    {finding.cure}" if finding.cure else ""))
    return int(any(finding.cure for finding in found))


def _torch() -> Finding:
    cure = "" if _numbers(torch.__version__) >= (2, 13) else 'pip install "torch>=2.13"'
    return Finding(f"Python {sys.version.split()[0]}, torch {torch.__version__}", cure)


def _package(package: str) -> Finding:
    extra, lowest, below = TESTED[package]
    installed = _version(package)
    if installed is None:
        return Finding(f"{package} is not installed (pip install distmuon[{extra}])")
    tested = lowest <= _numbers(installed) < below
    return Finding(
        f"{package} {installed}", "" if tested else f"not the version that was tested: pip install distmuon[{extra}]"
    )


def _deepspeed_tools() -> list[Finding]:
    """Look for the tools with which DeepSpeed builds an operator when it first starts on a CPU."""
    compiler = os.environ.get("CXX") or "g++"
    cures = {
        compiler: "install a C++ compiler (apt-get install g++): DeepSpeed builds deepspeed_shm_comm when it starts",
        "ninja": f"pip install ninja, and have {os.path.dirname(sys.executable)} on PATH",
    }
    return [
        Finding(f"{tool} for DeepSpeed: {shutil.which(tool) or 'not on PATH'}", "" if shutil.which(tool) else cure)
        for tool, cure in cures.items()
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:3] if part.isdigit())
