"""Runs made of records by code, whose every number is known; for the report and for `launch.tail`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launch.config import as_dict, parse
from tests.launch.test_pretrain import ROOT, TINY

Record = dict[str, Any]
STAGES = {
    "finish_reduce_scatter": 3.0,
    "guard": 1.0,
    "momentum": 2.0,
    "start_dp_gather": 0.5,
    "dp_gather": 1.5,
    "newton_schulz": 6.0,
    "start_scatter": 0.25,
    "scatter": 0.75,
    "apply": 4.0,
    "start_all_gather": 1.0,
}
SENT = {"reduce_scatter": 2000, "guard": 8, "dp_gather": 300, "scatter": 300, "all_gather": 2000}
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def header(steps: int, *arguments: str, **more: Any) -> Record:
    config = parse(["--config", str(ROOT / "configs/quickstart.yaml"), *TINY, f"--train.steps={steps}", *arguments])
    return {"kind": "run", "config": as_dict(config), "trainer": "pretrain", "world_size": 2, "device": "cpu"} | more


def train(step: int, **more: Any) -> Record:
    return {
        "kind": "train",
        "step": step,
        "loss": 2.0 + 3.0 / step,
        "lr": {"muon": 0.01 / step, "adamw": 0.002 / step},
        "grad_norm": 1.0 + math.sin(step),
        "tokens_per_s": 1000.0 + step,
        "step_ms": 40.0 + (300.0 if step == 1 else step % 3),
        "skipped_steps": 0,
        "bytes": SENT,
        "stage_ms": STAGES,
        "tokens": 4096 * step,
        "mfu": 0.4,
        "peak_bytes": 3 << 30,
        **more,
    }


def telemetry(step: int, layers: int = 3) -> Record:
    parameters: dict[str, Any] = {
        "model.embed_tokens.weight": {
            "rule": "adamw",
            "shape": [256, 32],
            "update_rms": 0.9,
            "weight_rms": 0.02,
            "update_to_weight": 0.04,
        }
    }
    for layer in range(layers):
        for place, name in enumerate(MATRICES):
            parameters[f"model.layers.{layer}.{name}.weight"] = {
                "rule": "muon",
                "shape": [32, 32],
                "update_rms": 0.19 + 0.001 * layer - (0.05 if name == "mlp.down_proj" else 0.0),
                "weight_rms": 0.02 + 0.001 * place,
                "update_to_weight": 0.003 * (layer + 1),
                "residual": 0.1 + 0.01 * layer,
                "update_singular_values": [0.6 - 0.01 * layer, 0.8, 0.9, 1.0, 1.1 + 0.01 * layer],
                "weight_singular_values": [0.01, 0.2, 0.5, 1.0, 2.0 + step / 100],
                "momentum_entropy": 0.4,
                "update_entropy": 0.99,
                "weight_entropy": 0.95 - step / 10_000,
            }
    return {
        "kind": "telemetry",
        "step": step,
        "parameters": parameters,
        "attention_logits": {f"model.layers.{layer}.self_attn": 10.0 + layer + step / 10 for layer in range(layers)},
        "output_rms": {f"model.layers.{layer}": 1.0 + layer for layer in range(layers)},
    }


def whole_run(steps: int = 40, layers: int = 3, **more: Any) -> list[Record]:
    """A finished run with everything in it; `more` goes into the header."""
    records = [header(steps, **more), {"kind": "val", "step": 0, "loss": 5.5}]
    for step in range(1, steps + 1):
        records.append(train(step))
        if step % 10 == 0:
            records.append({"kind": "val", "step": step, "loss": 2.5 + 3.0 / step})
            records.append({"kind": "sample", "step": step, "prompt": "def ", "text": f"main(): # {step}\n    pass"})
            records.append(telemetry(step, layers))
    per_rank = [
        {"state_bytes": 5000, "bytes": SENT, "calls": {}, "ns_matrices": 7},
        {"state_bytes": 6000, "bytes": {**SENT, "dp_gather": 400}, "calls": {}, "ns_matrices": 7},
    ]
    end: Record = {"kind": "summary", "steps": steps, "train_loss": 2.0 + 3.0 / steps, "val_loss": 2.5 + 3.0 / steps}
    end |= {"seconds": 100.0, "skipped_steps": 0, "peak_bytes": [3 << 30, 4 << 30], "per_rank": per_rank}
    return [*records, end]


def write(folder: Path, records: list[Record]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder
