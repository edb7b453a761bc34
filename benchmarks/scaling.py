"""Scaling evidence: counts measured at dp 1, 2, 4, 8 on this machine, and the planner's to dp 4096 for a real model.

    python -m benchmarks.scaling           writes benchmarks/results/scaling.json and docs/scaling.png; then
    python -m benchmarks.report            puts both into docs/benchmarks.md

Counts and bytes are exact whatever else the machine does. Times of eight processes on two cores say nothing about
eight GPUs: only the ratio of Muon's to AdamW's synchronisation and step is kept, both taken in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import distmuon
from benchmarks.processes import namespace
from benchmarks.setting import Setting, make_gradients, make_trainee
from distmuon.planning.plan import STAGES
from tests.distributed.loopback import bring_up_loopback, loopback_bytes
from tests.pool import Pool

ROOT = Path(__file__).parents[1]
OUT, PICTURE = ROOT / "benchmarks" / "results" / "scaling.json", ROOT / "docs" / "scaling.png"
MEASURED, PREDICTED = (1, 2, 4, 8), tuple(1 << k for k in range(13))
SMALL = Setting(d_model=256, layers=3, vocabulary=1024, seq_len=128)


def one_rank(group: dist.ProcessGroup, rounds: int, wire: bool) -> dict[str, Any]:
    """What this rank counts in a step, the wire's bytes a step of all ranks, and ms of sync + step by rule."""
    trainees = {rule: make_trainee(SMALL, torch.device("cpu")) for rule in ("muon", "adamw")}
    optimizers = {
        rule: distmuon.DistMuon(t, process_group=group, routes="adamw" if rule == "adamw" else None)
        for rule, t in trainees.items()
    }
    gradients = make_gradients(trainees["muon"], dist.get_rank(group))
    found: dict[str, Any] = {"ms": {rule: [] for rule in trainees}}
    for number in range(rounds + 1):  # the first builds
        for rule, optimizer in optimizers.items():
            loss = trainees[rule](torch.zeros(()), {fqn: grad.clone() for fqn, grad in gradients.items()})
            dist.barrier(group)
            before, start = loopback_bytes() if wire else 0, time.perf_counter()
            dist.barrier(group)
            loss.backward()
            optimizer.step()
            optimizer.synchronize()
            dist.barrier(group)
            if number:
                found["ms"][rule].append(1e3 * (time.perf_counter() - start))
            if rule == "muon":
                found["wire_bytes"] = loopback_bytes() - before if wire else None
    metrics = optimizers["muon"].metrics()
    return found | {key: metrics[key] for key in ("bytes", "calls", "ns_matrices", "state_bytes")}


def measure(rounds: int, wire: bool) -> list[dict[str, Any]]:
    """One entry a dp_size: counted and planned by rank, and whether they are equal to the byte."""
    pool, found = Pool(max(MEASURED)), []
    for dp_size in MEASURED:
        ranks = pool.spawn(one_rank, dp_size, timeout=300.0, rounds=rounds, wire=wire)
        planned = distmuon.plan(make_trainee(SMALL, torch.device("cpu")), dp_size=dp_size, hardware=None, compare=False)
        counted = [[r["bytes"], r["calls"], r["ns_matrices"], r["state_bytes"]] for r in ranks]
        expected = [[r.sent_bytes, r.calls, r.ns_matrices, r.state_bytes] for r in planned.ranks]
        ratios = [m / a for m, a in zip(ranks[0]["ms"]["muon"], ranks[0]["ms"]["adamw"])]
        found.append(
            {
                "dp_size": dp_size,
                "equal": counted == expected,
                "sent": [sum(r["bytes"].values()) for r in ranks],
                "planned_sent": [sum(r.sent_bytes.values()) for r in planned.ranks],
                "stages": {stage: max(r["bytes"].get(stage, 0) for r in ranks) for stage in STAGES},
                "wire": ranks[0]["wire_bytes"],
                "state": [r["state_bytes"] for r in ranks],
                "planned_state": [e[3] for e in expected],
                "matrices": [r["ns_matrices"] for r in ranks],
                "over_adamw": statistics.quantiles(ratios, n=4, method="inclusive"),
            }
        )
        print(f"dp {dp_size}: equal {found[-1]['equal']}", file=sys.stderr, flush=True)
    pool.close(patience_s=0.0)
    return found


def predict(model: str, dp_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The planner's figures of the busiest rank, bfloat16 parameters, float32 gradients."""
    found = []
    for dp_size in dp_sizes:
        start = time.perf_counter()
        p = distmuon.plan(model, dp_size=dp_size, hardware=None, param_dtype=torch.bfloat16)
        adamw = next(other for other in p.others if other.way == "adamw")
        found.append(
            {
                "dp_size": dp_size,
                "sent": p.sent,
                "adamw": adamw.sent,
                "state": max(r.state_bytes for r in p.ranks),
                "others": {other.way: other.sent for other in p.others},
                "ns_balance": p.ns_balance,
                "ns_flops": max(r.ns_flops for r in p.ranks),
                "straddlers": p.straddlers,
                "matrices": p.num_matrices,
            }
        )
        print(f"{model} dp {dp_size}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return found


def scaling_text(found: dict[str, Any]) -> list[str]:
    """The page's section."""
    lines = [
        "## Scaling",
        "",
        f"`{found['command']}`",
        "",
        f"{found['machine']}; {found['date']}; load average {found['load']}. Counts and bytes are exact; the time "
        "ratio is that of several processes on each core and says nothing about GPUs.",
        "",
        "![bytes and state by dp_size, measured and planned](scaling.png)",
        "",
        f"Measured: d_model {SMALL.d_model}, {SMALL.layers} layers, float32 parameters. Bytes, calls, matrices and "
        'state of every rank are compared with `distmuon.plan`; "wire" is the loopback device\'s count of all ranks '
        "over the counted sum, headers and barriers included.",
        "",
        "| dp | = plan | sent, busiest rank, MB | wire / counted | state, fullest rank, MB | matrices by rank "
        "| sync + step, Muon / AdamW |",
        "|---|---|---|---|---|---|---|",
    ]
    for at in found["measured"]:
        counted = sum(at["sent"])
        wire = f"{at['wire'] / counted:.3f}" if at["wire"] and counted else ""
        low, median, high = at["over_adamw"]
        lines.append(
            f"| {at['dp_size']} | {'yes' if at['equal'] else 'NO'} | {max(at['sent']) / 1e6:.3f} | {wire} "
            f"| {max(at['state']) / 1e6:.3f} | {'+'.join(map(str, at['matrices']))} "
            f"| {median:.2f} ({low:.2f}-{high:.2f}) |"
        )
    for model, entries in found["predicted"].items():
        lines += [
            "",
            f"Planned: {model}, bfloat16 parameters, float32 gradients. Traffic is the busiest rank's, relative to "
            f"ZeRO-1 AdamW of the same model. The model has {entries[0]['matrices']:,} matrices of several sizes, and "
            "one rank orthogonalizes each of them, so beyond some dp the busiest rank's Newton-Schulz shrinks no more.",
            "",
            "| dp | traffic | the paper's | whole matrices, padded | straddlers | Newton-Schulz balance "
            "| state, fullest rank, GB |",
            "|---|---|---|---|---|---|---|",
        ]
        for at in entries:
            over = [
                f"{n / at['adamw']:.4f}" if at["adamw"] else ""
                for n in (at["sent"], at["others"]["paper"], at["others"]["whole matrices"])
            ]
            lines.append(
                f"| {at['dp_size']} | {' | '.join(over)} | {at['straddlers']} | {at['ns_balance']:.3f} "
                f"| {at['state'] / 1e9:.3f} |"
            )
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Four panels: bytes and state of the small model, measured on planned; traffic and balance of the real ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((sent, state), (traffic, balance)) = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    sizes = [at["dp_size"] for at in found["measured"]]
    for axis, key, label in (
        (sent, "sent", "sent by the busiest rank, MB a step"),
        (state, "state", "state, MB a rank"),
    ):
        axis.plot(sizes, [max(at[f"planned_{key}"]) / 1e6 for at in found["measured"]], "-", label="planned")
        axis.plot(sizes, [max(at[key]) / 1e6 for at in found["measured"]], "o", label="counted in training")
        axis.set(ylabel=label, title=f"d_model {SMALL.d_model}, {SMALL.layers} layers: measured")
    if all(at["wire"] is not None for at in found["measured"]):
        wire = [at["wire"] / at["dp_size"] / 1e6 for at in found["measured"]]
        sent.plot(sizes, wire, "x", label="on the wire, mean a rank")
    for model, entries in found["predicted"].items():
        many = [at for at in entries if at["adamw"]]
        (line,) = traffic.plot(
            [at["dp_size"] for at in many], [at["sent"] / at["adamw"] for at in many], ".-", label=model
        )
        traffic.plot(
            [at["dp_size"] for at in many],
            [at["others"]["paper"] / at["adamw"] for at in many],
            ":",
            color=line.get_color(),
            label=f"{model}, the paper's placement",
        )
        balance.plot([at["dp_size"] for at in entries], [at["ns_balance"] for at in entries], ".-", label=model)
    traffic.set(ylabel="sent by the busiest rank / ZeRO-1 AdamW's", title="planned")
    balance.set(ylabel="Newton-Schulz FLOPs, busiest rank / mean", title="planned", yscale="log")
    for axis in (sent, state, traffic, balance):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("data-parallel ranks")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default="llama-8b,moonlight")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments, argv = parser.parse_args(), sys.argv[1:]
    prefix = [] if arguments.inside else namespace()[0]
    if prefix:
        raise SystemExit(
            subprocess.run([*prefix, sys.executable, "-m", "benchmarks.scaling", *argv, "--inside"]).returncode
        )
    if arguments.inside:
        bring_up_loopback()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.scaling", *(a for a in argv if a != "--inside")]),
        "machine": f"{os.cpu_count()} cores, gloo, 1 thread a process, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load": round(os.getloadavg()[0], 2),
    }
    found["measured"] = measure(arguments.rounds, wire=arguments.inside)
    found["predicted"] = {model: predict(model, PREDICTED) for model in arguments.models.split(",")}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, PICTURE)


if __name__ == "__main__":
    main()
