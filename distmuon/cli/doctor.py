"""`python -m distmuon doctor`: what this machine lacks for which trainer, before a run finds out.

Reads versions and PATH only; imports no trainer (DeepSpeed's import alone takes seconds). A package that is not
installed is no fault; one that is installed and cannot work is.
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
    """One line; `cure` is empty where nothing is wrong."""

    text: str
    cure: str = ""


def findings() -> list[Finding]:
    """What was looked at, in the order in which it is printed."""
    found = [_torch()]
    backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available", lambda: False)()]
    found.append(Finding(f"backends {', '.join(backends) or 'none'}; {torch.cuda.device_count()} GPUs"))
    for package in TESTED:
        found.append(_package(package))
    if _version("deepspeed") is not None:
        found += _deepspeed_tools()
    return found


def main() -> int:
    """Print the findings; 1 if something needs a cure."""
    found = findings()
    for one in found:
        print(f"{'FIX ' if one.cure else 'ok  '}{one.text}" + (f"\n    {one.cure}" if one.cure else ""))
    return int(any(one.cure for one in found))


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
    """DeepSpeed builds an operator when it first starts on a CPU, and has no way around it."""
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
