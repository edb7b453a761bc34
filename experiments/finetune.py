"""Does it hurt to change the optimizer between pretraining and fine-tuning? The four cells, on a model of 0.14 M.

    OMP_NUM_THREADS=1 python -m experiments.finetune     # resumes; writes experiments/results/finetune.json
    python -m tests.integrations.matrix                  # puts the table on docs/integrations.md

arXiv 2502.16982, section 3.5, asks this of models of billions; here everything is small enough for one core and six
seeds. A byte-level Llama is pretrained on Python source and fine-tuned on the English of Python's own help texts, each
time with Muon and with AdamW. The first seed tries every learning rate of a grid; the others, which count, take its
best one. Model, data order, schedule, step and loss are those of
`launch.pretrain`; this file only says what is run, and writes it down.
"""

from __future__ import annotations

import json
import statistics
import sysconfig
import textwrap
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import distmuon
from launch.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from launch.corpora import BYTE_VOCAB_SIZE, SEPARATOR, is_validation, stdlib_files
from launch.data import ShuffledWindows, TokenWindows
from launch.models import build_model, num_parameters
from launch.pretrain import train_step
from launch.ranks import Ranks
from launch.run import optimizer_options, validate
from launch.schedules import lr_lambda

RESULTS = Path(__file__).parent / "results" / "finetune.json"
OPTIMIZERS = {"distmuon": "Muon", "adamw": "AdamW"}
SEEDS = (0, 1, 2, 3, 4, 5)
TUNING_SEED, COUNTED = SEEDS[0], SEEDS[1:]
MODEL = ModelConfig(
    config={
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    seq_len=128,
)
BATCH = {"global_batch": 8, "micro_batch": 8, "max_grad_norm": 1.0, "min_lr_ratio": 0.1}
PRETRAIN: dict[str, Any] = {"steps": 300, "warmup_steps": 20, **BATCH}
FINETUNE: dict[str, Any] = {"steps": 60, "warmup_steps": 5, **BATCH}
PRETRAIN_LRS = {"distmuon": (8e-3, 1.6e-2, 3.2e-2), "adamw": (2e-3, 4e-3, 8e-3)}
FINETUNE_LRS = {
    "distmuon": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}
VAL_WINDOWS = 96
HERE = Ranks(device=torch.device("cpu"))

Data = tuple[TokenWindows, TokenWindows]
Row = dict[str, Any]


def windows(texts: list[tuple[Path, bytes]]) -> Data:
    """Training and validation windows of byte-level documents; `launch.corpora` says which is which."""
    both = [
        b"".join(text + SEPARATOR for path, text in texts if is_validation(path) == split) for split in (False, True)
    ]
    train, val = (TokenWindows([np.frombuffer(part, dtype=np.uint8)], MODEL.seq_len) for part in both)
    return train, val


def corpora() -> dict[str, Data]:
    """Python source without the help texts' module, and the help texts."""
    root = Path(sysconfig.get_path("stdlib"))
    source = [(path, (root / path).read_bytes()) for path in stdlib_files(root) if path.parts[0] != "pydoc_data"]
    prose = [(Path(name), text.encode()) for name, text in sorted(topics.items())]
    return {"code": windows(source), "prose": windows(prose)}


def loss_on(model: nn.Module, data: Data) -> float:
    return validate(model, data[1], data[1].spread(VAL_WINDOWS), BATCH["micro_batch"], HERE)  # type: ignore[arg-type]


def trained(model: nn.Module, name: str, lr: float, cfg: TrainConfig, data: Data) -> nn.Module:
    """`model` after a run of `cfg` with the optimizer `name`; in place."""
    config = Config(optimizer=OptimizerConfig(name=name, lr=lr))  # type: ignore[arg-type]
    optimizer = distmuon.DistMuon(model, **optimizer_options(config))
    scheduler = LambdaLR(optimizer, lr_lambda(cfg))
    order = ShuffledWindows(data[0], cfg.seed)
    for _ in range(cfg.steps):
        train_step(model, optimizer, [order.next_batch(cfg.global_batch, 0, 1)], cfg.max_grad_norm)
        scheduler.step()
    optimizer.synchronize()
    return model


def fresh_copy(model: nn.Module) -> nn.Module:
    """The same weights in storages of their own, without the hooks of the optimizer before."""
    fresh = build_model(MODEL, BYTE_VOCAB_SIZE)
    fresh.load_state_dict(model.state_dict())
    return fresh


def best_lr(rows: list[Row], **wanted: str) -> float:
    """The learning rate with which the first seed has the lowest loss on what was trained for."""
    tried = [row for row in rows if {**wanted, "seed": TUNING_SEED}.items() <= row.items()]
    return float(min(tried, key=lambda row: row["prose" if "tuned" in row else "code"])["lr"])


def counted(rows: list[Row], **wanted: str) -> list[Row]:
    """The rows at that rate of the seeds that did not choose it, by seed."""
    at = {**wanted, "lr": best_lr(rows, **wanted)}
    found = [row for row in rows if at.items() <= row.items() and row["seed"] in COUNTED]
    return sorted(found, key=lambda row: row["seed"])


def one_seed(found: dict[str, Any], name: str, seed: int, data: dict[str, Data]) -> None:
    """Pretrain with `name` and fine-tune the best of it with both; the first seed tries all rates."""
    is_first = seed == TUNING_SEED
    rates = PRETRAIN_LRS[name] if is_first else (best_lr(found["pretrain"], pretrained=name),)
    models = {}
    for lr in rates:
        torch.manual_seed(seed)
        model = build_model(MODEL, BYTE_VOCAB_SIZE)
        models[lr] = trained(model, name, lr, TrainConfig(seed=seed, **PRETRAIN), data["code"])
        note(found["pretrain"], models[lr], data, pretrained=name, seed=seed, lr=lr)
    model = models[best_lr(found["pretrain"], pretrained=name)]
    for tuner in OPTIMIZERS:
        known = () if is_first else (best_lr(found["finetune"], pretrained=name, tuned=tuner),)
        for lr in known or FINETUNE_LRS[tuner]:
            tuned = trained(fresh_copy(model), tuner, lr, TrainConfig(seed=100 + seed, **FINETUNE), data["prose"])
            note(found["finetune"], tuned, data, pretrained=name, tuned=tuner, seed=seed, lr=lr)


def note(rows: list[Row], model: nn.Module, data: dict[str, Data], **row: Any) -> None:
    rows.append({**row, **{name: round(loss_on(model, both), 5) for name, both in data.items()}})
    print(rows[-1], flush=True)


def run() -> None:
    """All of it. Each seed of each optimizer is written down when it is done and not run again."""
    torch.set_num_threads(1)
    data = corpora()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "parameters": num_parameters(build_model(MODEL, BYTE_VOCAB_SIZE)),
        "bytes": {name: [len(split) * MODEL.seq_len for split in both] for name, both in data.items()},
        "steps": [PRETRAIN["steps"], FINETUNE["steps"]],
        "cpu_seconds": 0,
        "pretrain": [],
        "finetune": [],
    }
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())
    for name in OPTIMIZERS:
        for seed in SEEDS:
            if any(row["pretrained"] == name and row["seed"] == seed for row in found["finetune"]):
                continue
            start = time.process_time()
            one_seed(found, name, seed, data)
            found["cpu_seconds"] += round(time.process_time() - start)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def table() -> str:
    """Markdown: the four cells, each at its best learning rate, nats a byte, mean over the seeds (lowest-highest); then
    the conditions."""
    found = json.loads(RESULTS.read_text())
    lines = [
        "| pretrained with | prose before | fine-tuned with | best lr | prose after | code before | code after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shown in OPTIMIZERS.items():
        lr = best_lr(found["pretrain"], pretrained=name)
        before = counted(found["pretrain"], pretrained=name)
        for tuner, tuner_shown in OPTIMIZERS.items():
            best = best_lr(found["finetune"], pretrained=name, tuned=tuner)
            after = counted(found["finetune"], pretrained=name, tuned=tuner)
            lines.append(
                f"| {shown} (lr {_shown(lr, PRETRAIN_LRS[name])}) | {_seeds(before, 'prose')} | {tuner_shown} "
                f"| {_shown(best, FINETUNE_LRS[tuner])} "
                f"| **{_seeds(after, 'prose')}** | {_seeds(before, 'code')} | {_seeds(after, 'code')} |"
            )
    tokens = BATCH["global_batch"] * MODEL.seq_len
    read = "; ".join(
        f"{name} {sizes[0]:,} bytes to train, {sizes[1]:,} to validate" for name, sizes in found["bytes"].items()
    )
    conditions = (
        f"`OMP_NUM_THREADS=1 python -m experiments.finetune`: {found['parameters']:,} parameters; {read}; "
        f"{found['steps'][0]} steps of {tokens:,} tokens, then {found['steps'][1]}; "
        f"seed {TUNING_SEED} chooses the rates, seeds {COUNTED[0]} to {COUNTED[-1]} count; "
        f"torch {found['torch']}, one thread, {found['cpu_seconds']} s of processor time on a busy machine."
    )
    lines += ["", *textwrap.wrap(conditions, 110, break_on_hyphens=False)]
    return "\n".join(lines)


def _shown(lr: float, grid: tuple[float, ...]) -> str:
    return f"{lr:g}, edge of the grid" if lr in (grid[0], grid[-1]) else f"{lr:g}"


def _seeds(rows: list[Row], key: str) -> str:
    losses = [row[key] for row in rows]
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})"


if __name__ == "__main__":
    run()
    print(table())
