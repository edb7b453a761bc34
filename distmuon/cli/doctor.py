"""`distmuon doctor`: check this machine for training, for each trainer and for the recipe, before a run fails.

This module decides what counts as a fault: a package that is installed and cannot work does, an absent package does
not, and neither does a machine without a GPU. It reads versions and PATH, imports no trainer (DeepSpeed's import takes
seconds), and takes a small step on two processes. The form for a bug report shows only the environment variables named
here; values that a user may keep secret are never among them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from distmuon.cli import parity
from distmuon.cli.arguments import Parser
from distmuon.integrations import TESTED, install_line
from distmuon.math import fused

RECIPE = (
    *("jsonargparse", "transformers", "numpy", "matplotlib", "tensorboard"),
    *("datasets", "tqdm", "jinja2", "plotly", "rich"),
)
VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_ALLOC_CONF"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_DEBUG"),
    *("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "WORLD_SIZE"),
)
LONGEST = 100  # characters of a variable in the form


@dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report; `cure` is empty if there is no fault."""

    text: str
    cure: str = ""


def findings(step: bool = True) -> list[Finding]:
    """Make all checks; return the findings in the order of the output. `step`: also the steps on two processes."""
    found = [_torch()]
    backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available", lambda: False)()]
    found.append(Finding(f"backends {', '.join(backends) or 'none'}; {torch.cuda.device_count()} GPUs"))
    found += _gpus()
    found.append(_threads())
    for package in TESTED:
        found.append(_package(package))
    found += [_recipe_package(package) for package in RECIPE if package not in TESTED]
    if _version("deepspeed") is not None:
        found += _deepspeed_tools()
    if step:
        found.append(_parity())
    return found


def main(argv: Sequence[str] = ()) -> int:
    """Print the findings; return 1 if any needs a cure, else 0."""
    parser = Parser(
        prog="distmuon doctor",
        description="Check this machine: torch, GPUs, threads, the trainers' packages, the recipe's, and two small "
        "steps on two gloo processes against one process.",
        epilog="examples: distmuon doctor; distmuon doctor --report > report.md. Exit status: 0; 1 if a line begins "
        "with FIX; 2 for bad input.",
    )
    parser.add_argument("--report", action="store_true", help="print the form for a bug report, in Markdown")
    parser.add_argument("--json", action="store_true", help="JSON instead of lines")
    parser.add_argument("--no-step", action="store_true", help="leave out the step on two processes (seconds)")
    given = parser.parse_args(argv)
    found = findings(step=not given.no_step)
    if given.report:
        print(report(found))
    elif given.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print("\n".join(_lines(found)))
    return int(any(finding.cure for finding in found))


def report(found: Sequence[Finding]) -> str:
    """The form for a bug report. It names no host, user or folder, and no variable that is not in `VARIABLES`."""
    variables = [f"{name}={os.environ[name][:LONGEST]}" for name in VARIABLES if name in os.environ]
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} processors"
    blocks = {
        "What happened, and what did you expect?": "(the whole message; of ranks that print different messages, each)",
        "The smallest program that shows it": "```python\n\n```",
        "How it was started": "```bash\ntorchrun --nproc_per_node=2 example.py\n```",
        "The optimizer": "(the call `DistMuon(...)`, and what `print(optimizer.report())` says)",
        "Does it also happen": "(with `sharding=Sharding(overlap=False)`? In one process? With torch.optim.Muon?)",
        "Environment": "\n".join(["```", f"distmuon {_own_version()}", system, *_lines(found), *variables, "```"]),
    }
    text = "\n\n".join(f"**{title}**\n{text}" for title, text in blocks.items())
    return text.replace(str(Path.home()), "~")


def _lines(found: Sequence[Finding]) -> Iterator[str]:
    for finding in found:
        yield f"{'FIX ' if finding.cure else 'ok  '}{finding.text}"
        if finding.cure:
            yield f"    {finding.cure}"


def _own_version() -> str:
    import distmuon

    return distmuon.__version__


def _torch() -> Finding:
    cure = "" if _numbers(torch.__version__) >= (2, 13) else 'pip install "torch>=2.13"'
    return Finding(f"Python {sys.version.split()[0]}, torch {torch.__version__}", cure)


def _gpus() -> Iterator[Finding]:
    """Yield the version of NCCL, the model and memory of each kind of GPU, and whether it has fused kernels."""
    if not torch.cuda.is_available():
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none"
    yield Finding(f"CUDA {torch.version.cuda}, NCCL {nccl}")
    kinds: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
        kinds[kind] = kinds.get(kind, 0) + 1
    for kind, count in kinds.items():
        yield Finding(f"{count} x {kind}")
    yield _kernels()


def _kernels() -> Finding:
    """Try Triton's kernels of math/fused.py on the first GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if fused.ready(torch.device("cuda", 0)):
            return Finding("Triton's kernels work")
    if find_spec("triton") is None:
        return Finding("Triton is not installed; with it a step moves less memory (pip install triton)")
    why = str(caught[0].message) if caught else "Triton's kernels did not work when they were first tried"
    return Finding(why, "update Triton, and install a C compiler if there is none (apt-get install gcc)")


def _threads() -> Finding:
    """Several processes of a machine share its cores; torchrun gives each a single thread if nothing is said."""
    stated = os.environ.get("OMP_NUM_THREADS")
    text = (
        f"OMP_NUM_THREADS {stated or 'is not set'}, {os.cpu_count()} processors, torch uses {torch.get_num_threads()}"
    )
    is_number = stated is None or all(part.isdigit() and int(part) > 0 for part in stated.split(","))
    return Finding(text, "" if is_number else "set OMP_NUM_THREADS to a whole number of threads")


def _package(package: str) -> Finding:
    extra, lowest, below = TESTED[package]
    installed = _version(package)
    if installed is None:
        return Finding(f"{package} is not installed ({install_line(extra)})")
    tested = lowest <= _numbers(installed) < below
    return Finding(
        f"{package} {installed}", "" if tested else f"not the version that was tested: {install_line(extra)}"
    )


def _recipe_package(package: str) -> Finding:
    installed = _version(package)
    if installed is not None:
        return Finding(f"{package} {installed}")
    line = f"pip install {package}" if package == "datasets" else install_line("recipes")
    return Finding(f"{package} is not installed; the recipe uses it ({line})")


def _deepspeed_tools() -> list[Finding]:
    """Look for the tools with which DeepSpeed builds an operator when it first starts on a CPU."""
    compiler = os.environ.get("CXX") or "g++"
    cures = {
        compiler: "install a C++ compiler (apt-get install g++): DeepSpeed builds deepspeed_shm_comm when it starts",
        "ninja": f"pip install ninja, and have {os.path.dirname(sys.executable)} on PATH",
    }
    return [
        Finding(
            f"{tool} for DeepSpeed: {'found' if shutil.which(tool) else 'not on PATH'}",
            "" if shutil.which(tool) else cure,
        )
        for tool, cure in cures.items()
    ]


def _parity() -> Finding:
    """Train on two processes and compare with one."""
    what = f"{parity.STEPS} steps on {parity.RANKS} gloo processes"
    try:
        difference = parity.compare()
    except (OSError, RuntimeError) as error:
        cure = "look whether processes may be started here, and whether GLOO_SOCKET_IFNAME names the interface to use"
        return Finding(f"{what}: {str(error)[:300]}", cure)
    if difference <= parity.TOLERANCE:
        return Finding(f"{what} equal one process (largest difference of a weight {difference:.1g})")
    return Finding(
        f"{what} differ from one process by {difference:.3g}", "please report it, with `distmuon doctor --report`"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("+")[0].split(".")[:3] if part.isdigit())
