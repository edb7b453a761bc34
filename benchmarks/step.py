"""distmuon against every peer: one model, one rule, the same batches, rounds in random order in the same processes.

    python -m benchmarks.step --ranks 2 --d-model 512 --layers 4 --rounds 15 --out benchmarks/results/step_512.json
    torchrun --nproc_per_node=8 -m benchmarks.step --d-model 2048 --layers 24 --batch 8 --seq-len 1024

Without torchrun it starts its own processes, one thread each, on gloo, in a network namespace of their own where the
kernel allows it, so that the loopback device's counters are the wire's bytes. Under torchrun with CUDA: NCCL.
`python -m benchmarks.report` makes docs/benchmarks.md of the JSON files. What the columns mean: `measure.COLUMNS`.
Packages of peers: `pip install -e .[recipes,bench]`; a row that cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distmuon  # noqa: F401  (before the process group, see its [Note: clean exit])
from benchmarks.measure import LEFT_OUT, measure
from benchmarks.peers import Peer, all_peers
from benchmarks.processes import namespace, run_ranks
from benchmarks.setting import Setting
from distmuon.math.newton_schulz import processor_of
from tests.distributed.loopback import bring_up_loopback

SWITCH = "ONEDNN_MAX_CPU_ISA"  # of oneDNN's instructions: AVX512_CORE_BF16 leaves out AMX
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "dion",
    "muon-optimizer",
    "pytorch_optimizer",
    "muon-fsdp2",
    "optimuon",
    "heavyball",
    "muonium",
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start; under torchrun its own number")
    parser.add_argument("--threads", type=int, default=1, help="of each process on the CPU")
    for name in ("d_model", "layers", "vocabulary", "batch", "seq_len"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Setting, name))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no further round after so long")
    parser.add_argument("--check-steps", type=int, default=3, help="before the rounds, compared to the oracle; 0: none")
    parser.add_argument("--rows", default="", help="comma-separated; a row runs if its name is one; empty: all")
    parser.add_argument("--skip", default="", help="comma-separated names of rows to leave out, listed as such")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--stage", choices=("outside", "inside", "worker"), default="outside", help=argparse.SUPPRESS)
    parser.add_argument("--wire", default="", help=argparse.SUPPRESS)  # why the wire is not measured
    return parser.parse_args(argv)


def start(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Outside: go into a namespace. Inside: start the workers and wait for them."""
    again = ["-m", "benchmarks.step", *argv]
    if arguments.stage == "outside":
        prefix, why_not = namespace()
        return subprocess.run([*prefix, sys.executable, *again, "--stage", "inside", "--wire", why_not]).returncode
    if not arguments.wire:
        bring_up_loopback()
    return run_ranks([*again, "--stage", "worker"], arguments.ranks, arguments.threads)


def conditions(arguments: argparse.Namespace, device: torch.device, argv: list[str]) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    switched = os.environ.get(SWITCH)
    kinds = {"amx": "with AMX", "no_bfloat16": "without bfloat16 products (AVX2)"}
    return {
        "command": (f"{SWITCH}={switched} " if switched else "")
        + shlex.join(["python", "-m", "benchmarks.step", *argv]),
        "kind": kinds.get(processor_of(device), f"without AMX ({SWITCH})" if switched else ""),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {os.cpu_count()} cores",
        "backend": dist.get_backend(),
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "packages": versions,
        "check_steps": arguments.check_steps,
        "wire": arguments.wire,
    }


def choose(arguments: argparse.Namespace) -> tuple[list[Peer], list[dict[str, str]]]:
    """(rows to run, rows that --rows and --skip leave out)."""
    rows, skip = (set(filter(None, text.split(","))) for text in (arguments.rows, arguments.skip))
    named = {peer.name.replace(",", ""): peer for peer in all_peers()}
    if unknown := (rows | skip) - named.keys():
        raise SystemExit(f"--rows, --skip: no row is called {sorted(unknown)}; without commas: {', '.join(named)}")
    out = {name for name in named if name in skip or (rows and name not in rows)}
    left_out = [{"name": named[name].name, "reason": LEFT_OUT, "note": ""} for name in named if name in out]
    return [peer for name, peer in named.items() if name not in out], left_out


def work(arguments: argparse.Namespace, argv: list[str]) -> None:
    """One rank."""
    warnings.simplefilter("ignore")  # the peers' own
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        arguments.wire = arguments.wire or "NCCL does not use the loopback device"
    else:
        torch.set_num_threads(arguments.threads)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        os.environ.get("BENCH_RENDEZVOUS"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(minutes=10),
    )
    setting = Setting(
        **{name: getattr(arguments, name) for name in ("d_model", "layers", "vocabulary", "batch")},
        seq_len=arguments.seq_len,
    )
    peers, left_out = choose(arguments)
    found: dict[str, Any] = {"conditions": conditions(arguments, device, argv), "setting": setting.to_dict()}
    first = dist.get_rank() == 0
    found |= measure(
        peers,
        setting,
        rounds=arguments.rounds,
        minutes=arguments.minutes,
        check_steps=arguments.check_steps,
        device=device,
        wire=not arguments.wire,
        say=lambda line: print(line, file=sys.stderr, flush=True) if first else None,
    )
    found["not_run"] += left_out
    found["conditions"]["load_after"] = round(os.getloadavg()[0], 2)
    if first:
        from benchmarks.report import tables

        print(tables(found))
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.6g}"))
            text = re.sub(
                r"\[\s+([^][{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", json.dumps(rounded, indent=1)
            )
            arguments.out.write_text(text + "\n")  # a list of numbers on one line
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # engines and compilers leave threads behind that have nothing to say


def main() -> None:
    argv = sys.argv[1:]
    arguments = parse(argv)
    if arguments.stage == "worker" or "TORCHELASTIC_RUN_ID" in os.environ:
        if arguments.stage != "worker":
            arguments.wire = "torchrun started the processes outside a network namespace"
        shown = argv[: argv.index("--stage")] if "--stage" in argv else argv
        work(arguments, shown)
    else:
        raise SystemExit(start(arguments, argv))


if __name__ == "__main__":
    main()
