"""The same small grid of learning rates for Muon and for AdamW, so that neither is compared untuned.

    python -m launch.sweep --config configs/quickstart.yaml --out runs/sweep
    python -m launch.sweep --config configs/quickstart.yaml --lrs 1e-3 2e-3 --set train.steps=100

Every run has the same seed, data and steps; only optimizer and lr differ. Runs go one after the other, each under its
own `torchrun`. A run that finished with exactly this configuration is not repeated, so a killed sweep is started again
with the same command. The table is written anew after every run.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmuon.errors import problem
from launch.config import as_dict, parse
from launch.failures import run_program
from launch.logs import METRICS_FILE, Record, read_records

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
OPTIMIZERS = ("distmuon", "adamw")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of the grid."""

    optimizer: str
    lr: float
    folder: Path
    arguments: tuple[str, ...]
    """For launch.pretrain."""

    def final_val(self, nproc: int) -> float | None:
        """Its final validation loss; inf for a diverged run, None if it has not finished with this configuration."""
        path = self.folder / METRICS_FILE
        if not path.is_file():
            return None
        records = read_records(path)
        if not records or records[-1]["kind"] != "summary" or not self._describes(records[0], nproc):
            return None
        loss: float | None = records[-1]["val_loss"]
        return math.inf if loss is None else loss

    def run(self, nproc: int) -> None:
        """Train it; its output goes to `output.txt` in its folder. Raises ValueError with its last line if it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torchrun = [sys.executable, "-m", "launch.torchrun", f"--nproc_per_node={nproc}"]
        path = self.folder / "output.txt"
        with path.open("w", encoding="utf-8") as output:
            command = [*torchrun, "-m", "launch.pretrain", *self.arguments]
            status = subprocess.run(command, check=False, stdout=output, stderr=subprocess.STDOUT).returncode
        if status:
            last = path.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            raise problem(
                str(self.folder),
                found=f"found exit status {status}: {last}",
                needed="every run must end",
                cure=f"see {path}",
            )

    def _describes(self, run_record: Record, nproc: int) -> bool:
        wanted: dict[str, Any] = as_dict(parse([*self.arguments]))
        return bool(run_record["config"] == wanted and run_record["world_size"] == nproc)


def trials(config: Path, lrs: Sequence[float], overrides: Sequence[str], out: Path) -> list[Trial]:
    """The grid, optimizer by optimizer. `overrides` are `key=value` of any other option of launch.pretrain."""
    grid: list[Trial] = []
    for optimizer in OPTIMIZERS:
        for lr in lrs:
            folder = out / f"{optimizer}-lr{lr:g}"
            # a rate at which every step is skipped is an answer here, not an error
            arguments = ["--config", str(config), "--train.max_skipped=0", *(f"--{override}" for override in overrides)]
            arguments += ["--optimizer.name", optimizer, "--optimizer.lr", repr(lr), "--log.dir", str(folder)]
            grid.append(Trial(optimizer=optimizer, lr=lr, folder=folder, arguments=tuple(arguments)))
    return grid


def table(losses: dict[tuple[str, float], float | None]) -> str:
    """Markdown: one row a learning rate, one column an optimizer, the best of each column in bold."""
    lrs = sorted({lr for _, lr in losses})
    best = {
        optimizer: min(
            (loss for (name, _), loss in losses.items() if name == optimizer and loss is not None), default=None
        )
        for optimizer in OPTIMIZERS
    }

    def cell(optimizer: str, lr: float) -> str:
        loss = losses.get((optimizer, lr))
        if loss is None:
            return "not run"
        if math.isinf(loss):
            return "diverged"
        return f"**{loss:.4f}**" if loss == best[optimizer] else f"{loss:.4f}"

    lines = ["| lr | " + " | ".join(OPTIMIZERS) + " |", "|---:|" + "---:|" * len(OPTIMIZERS)]
    lines += [f"| {lr:g} | " + " | ".join(cell(optimizer, lr) for optimizer in OPTIMIZERS) + " |" for lr in lrs]
    for optimizer, loss in best.items():
        tried = [lr for lr in lrs if losses.get((optimizer, lr)) is not None]
        at = next((lr for lr in tried if losses[optimizer, lr] == loss), None)
        if len(tried) == len(lrs) > 1 and at in (lrs[0], lrs[-1]):
            lines += ["", f"The best of {optimizer}, {at:g}, lies on the edge of the grid: widen it with --lrs."]
    return "Final validation loss; the best of each optimizer in bold.\n\n" + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description="Sweep the learning rate of Muon and AdamW over one grid.")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--lrs", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--nproc", type=int, default=2, help="processes of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args(argv)

    grid = trials(options.config, options.lrs, options.overrides, options.out)
    for trial in grid:
        parse([*trial.arguments])  # leaves with the reason, before the first run
    options.out.mkdir(parents=True, exist_ok=True)
    for number, trial in enumerate(grid, start=1):
        name = f"[{number}/{len(grid)}] {trial.optimizer} lr {trial.lr:g}"
        if trial.final_val(options.nproc) is None:
            print(f"{name}: running", flush=True)
            trial.run(options.nproc)
        print(f"{name}: validation loss {trial.final_val(options.nproc):.4f}", flush=True)
        losses = {(other.optimizer, other.lr): other.final_val(options.nproc) for other in grid}
        (options.out / "sweep.md").write_text(table(losses), encoding="utf-8")
    print(table(losses), end="")


if __name__ == "__main__":
    run_program(main)
