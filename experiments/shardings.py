"""The cut does not matter, and where it would: one model under every sharding, and Newton-Schulz on the shard alone.

    OMP_NUM_THREADS=1 python -m experiments.shardings    # resumes; writes experiments/results/shardings.json

Hypothesis: in float32 the loss curves of one process, ZeRO-1, FSDP2, HSDP and tensor parallelism are one line to 1e-4,
for a Llama and for a Qwen3-MoE, because every matrix is orthogonalized whole. Control: each of four ranks
orthogonalizes the rows that it holds, as an optimizer does that takes local tensors for matrices; that curve must leave
the line. The picture is docs/shardings.png.
Every run is `launch.pretrain` with other options, in processes of its own, on gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "shardings.json"
PICTURE = Path(__file__).parents[1] / "docs" / "shardings.png"
SEEDS = (0, 1, 2)
NUM_RANKS = 4
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 176, "num_hidden_layers": 3, "tie_word_embeddings": False},
    "qwen3_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
}
SHARDINGS = {  # (ranks, shard, replicas, tp)
    "one process": (1, "zero1", 1, 1),
    "ZeRO-1, 2 ranks": (2, "zero1", 1, 1),
    "ZeRO-1, 4 ranks": (4, "zero1", 1, 1),
    "FSDP2, 4 ranks": (4, "fsdp2", 1, 1),
    "HSDP, 2 x 2": (4, "hsdp", 2, 1),
    "FSDP2 x TP, 2 x 2": (4, "fsdp2", 1, 2),
}
CONTROL = "each shard alone, 4 ranks"
TOLERANCE = 1e-4
_ON_THE_SHARD = "EXPERIMENT_ON_THE_SHARD"


def options(model: str, sharding: str, seed: int, folder: str) -> list[str]:
    """The command line of a run."""
    _, shard, replicas, tp = SHARDINGS.get(sharding, SHARDINGS["FSDP2, 4 ranks"])
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, **MODELS[model]}
    said = {
        "model.arch": model,
        "model.config": json.dumps(config),
        "model.seq_len": 64,
        "train.steps": 50,
        "train.global_batch": 16,
        "train.micro_batch": 4,
        "train.warmup_steps": 5,
        "train.eval_every": 50,
        "train.seed": seed,
        "optimizer.lr": 1e-2,
        "optimizer.precision.newton_schulz": "float32",
        "parallel.shard": shard,
        "parallel.replicas": replicas,
        "parallel.tp": tp,
        "log.dir": folder,
    }
    return [f"--{name}={value}" for name, value in said.items()]


def run(model: str, sharding: str, seed: int) -> list[float]:
    """Train; return the loss of each step."""
    num_ranks = SHARDINGS.get(sharding, (NUM_RANKS,))[0]
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
        command = [*launch, "-m", "experiments.shardings", "worker", *options(model, sharding, seed, folder)]
        environment = {**os.environ, _ON_THE_SHARD: "1" if sharding == CONTROL else ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{model}, {sharding}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if record["kind"] == "train"]


def orthogonalize_the_shard_alone() -> None:
    """Plant the error: Newton-Schulz on each rank's rows by themselves."""
    from distmuon.math.newton_schulz import orthogonalize
    from distmuon.step.bucket import Bucket

    def alone(bucket: Bucket, key: Any, stack: Tensor, step: Any) -> Tensor:
        group = step.param_groups[key.group]
        how = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "dtype": torch.float32}
        return torch.cat([orthogonalize(rows.contiguous(), **how) for rows in stack.chunk(NUM_RANKS, dim=1)], dim=1)

    Bucket._orthogonalize = alone  # type: ignore[assignment, method-assign]


def differences(curves: dict[str, list[float]]) -> list[tuple[str, str, float, float]]:
    """(model, sharding, largest, last) difference of the loss from one process, over the seeds."""
    found = []
    for model in MODELS:
        for sharding in [*SHARDINGS, CONTROL]:
            pairs = [
                (curves[f"{model}/{sharding}/{seed}"], curves[f"{model}/one process/{seed}"])
                for seed in SEEDS
                if f"{model}/{sharding}/{seed}" in curves
            ]
            if pairs:
                largest = max(abs(a - b) for curve, alone in pairs for a, b in zip(curve, alone, strict=True))
                last = sum(curve[-1] - alone[-1] for curve, alone in pairs) / len(pairs)
                found.append((model, sharding, largest, last))
    return found


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and below them their distance from one process."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(MODELS), figsize=(10, 6), sharex=True, height_ratios=(3, 2))
    for column, model in enumerate(MODELS):
        top, bottom = axes[0][column], axes[1][column]
        alone = curves[f"{model}/one process/0"]
        for number, sharding in enumerate([*SHARDINGS, CONTROL]):
            curve = curves.get(f"{model}/{sharding}/0")
            if curve is None:
                continue
            style = {"color": "black", "linestyle": "--"} if sharding == CONTROL else {"color": f"C{number}"}
            steps = range(1, len(curve) + 1)
            top.plot(steps, curve, label=sharding, **style)
            if sharding != "one process":
                bottom.semilogy(steps, [max(abs(a - b), 1e-8) for a, b in zip(curve, alone)], **style)
        bottom.axhline(TOLERANCE, color="gray", linewidth=0.8)
        top.set(title=f"{model}, {50} steps", ylabel="training loss")
        bottom.set(xlabel="step", ylabel="|difference from one process|")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    curves: Any = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in SEEDS:
        for model in MODELS:
            for sharding in [*SHARDINGS, CONTROL]:
                name = f"{model}/{sharding}/{seed}"
                if name in curves or (model == "qwen3_moe" and "TP" in sharding):  # transformers has no plan for it
                    continue
                curves[name] = run(model, sharding, seed)
                RESULTS.write_text(json.dumps(curves, indent=0) + "\n")
                print(name, curves[name][-1], flush=True)
    failed = 0
    for model, sharding, largest, last in differences(curves):
        agrees = (largest > TOLERANCE) if sharding == CONTROL else (largest <= TOLERANCE)
        failed += not agrees
        verdict = "as expected" if agrees else "NOT as expected"
        print(f"{model:10} {sharding:26} largest {largest:.1e}, last step {last:+.4f}  {verdict}")
    draw(curves, PICTURE)
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        from launch import pretrain

        if os.environ.get(_ON_THE_SHARD):
            orthogonalize_the_shard_alone()
        pretrain.main(sys.argv[2:])
    else:
        sys.exit(main())
