"""Run the trials of the experiments that have not run yet; write one line a trial to a JSONL file, and the page.

    python -m experiments.runner                       # all experiments, size small
    python -m experiments.runner weight_decay --jobs 4 # one of them
    python -m experiments.runner --size full           # what the whole suite asks for
    python -m experiments.runner --quick               # a few steps of everything, to see that it runs; keeps nothing

A trial whose line is there is not run again, whichever experiment asked for it, so a killed run goes on by the same
command. A trial is a run of the recipe (`launch.sweep` makes its command line); experiments/grids.py says what a grid
is, experiments/grids/*.yaml what is tried and why.

[Note: processes of trials] A trial of one process is forked from a server that has imported everything, for importing
would take a third of a short trial. Each has a process of its own, so what a variant changes ends with it. A trial of
several processes starts them itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch
from torch import nn

from distmuon.errors import problem
from distmuon.math import spectra
from experiments.grids import FOLDER, SEED, Experiment, Settings, Wanted, key_of, read, read_all
from experiments.variants import VARIANTS
from launch import pretrain, sweep
from launch.config import parse
from launch.failures import run_program
from launch.logs import METRICS_FILE, duration, open_log, read_records
from launch.ranks import launched_ranks
from launch.resume import StopRequest
from launch.run import make_run

RESULTS = Path(__file__).parent / "results" / "trials.jsonl"
WORK = Path("runs/experiments")
POINTS = 6
"""Measurements of weights and outputs a run."""
Row = dict[str, Any]


class Results:
    """The lines of finished trials."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows: dict[str, Row] = {key_of(row["settings"], row["variant"], row["nproc"]): row for row in rows}

    def row(self, wanted: Wanted) -> Row | None:
        return self.rows.get(wanted.key)

    def loss(self, wanted: Wanted) -> float | None:
        """The final validation loss: inf if it diverged, None if it has not run."""
        row = self.row(wanted)
        if row is None:
            return None
        return float("inf") if row["val_loss"] is None else float(row["val_loss"])

    def add(self, wanted: Wanted, row: Row) -> None:
        self.rows[wanted.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file, flush=True)


# ---- one trial


def trial_of(wanted: Wanted) -> sweep.Trial:
    """The command line of a trial, parsed. Leaves with the reason if it describes no run."""
    every = measured_every(wanted.settings["train.steps"])
    overrides = [f"{key}={_text(value)}" for key, value in wanted.settings.items() if key != SEED]
    overrides += [f"log.telemetry_every={every}", "log.progress=false"]
    folder = WORK / hashlib.sha256(wanted.key.encode()).hexdigest()[:16]
    (trial,) = sweep.trials(Path(wanted.config), [{SEED: [wanted.seed]}], overrides, folder)
    return trial


def measured_every(steps: int) -> int:
    """Steps between measurements: the last step is one of them."""
    return steps // POINTS if steps % POINTS == 0 else steps


def run_trial(trial: sweep.Trial, variant: str, nproc: int, environment: dict[str, str]) -> Row:
    """Train it, and say what came out. In a process of its own."""
    os.environ.update(environment)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    began = _processor_seconds()
    entropy: dict[str, float] = {}
    if nproc > 1:
        trial.run(nproc, environment)
    else:
        shutil.rmtree(trial.folder, ignore_errors=True)
        trial.folder.mkdir(parents=True)
        with (trial.folder / "output.txt").open("w", encoding="utf-8") as output:
            with redirect_stdout(output), redirect_stderr(output):
                entropy = entropies(train(trial.arguments, variant))
    return {**measured(read_records(trial.folder / METRICS_FILE)), "cpu_s": _processor_seconds() - began, "entropy": entropy}


def train(arguments: Sequence[str], variant: str) -> nn.Module:
    """`launch.pretrain` with the variant's run; the trained model."""
    config = parse(list(arguments))
    with (
        launched_ranks(config.parallel) as ranks,
        open_log(config.log, rank=ranks.rank, steps=config.train.steps) as log,
        StopRequest().listening(False) as stop,
    ):
        run = VARIANTS[variant](make_run(config, ranks, log, stop, "pretrain"))
        pretrain.train(run)
    return run.model


def entropies(model: nn.Module) -> dict[str, float]:
    """SVD entropy of the hidden matrices; of a stack of experts the mean over it."""
    found = {}
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
            stack = weight.detach().double().reshape(-1, *weight.shape[-2:])
            values = [float(spectra.svd_entropy(torch.linalg.svdvals(matrix))) for matrix in stack]
            found[short_name(name)] = round(fmean(values), 4)
    return found


def short_name(name: str) -> str:
    """Without what all names have in common."""
    parts = [part for part in name.split(".") if part not in ("model", "transformer", "layers", "h", "weight")]
    return ".".join(parts)


def measured(records: Sequence[Row]) -> Row:
    """What a row keeps of a run's records."""
    by_kind: dict[str, list[Row]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    run, train, summary = by_kind["run"][-1], by_kind["train"], by_kind["summary"][-1]
    tail = [record["loss"] for record in train[-max(1, len(train) // 20) :]]
    times = [record["step_ms"] for record in train]
    return {
        "val_loss": _round(summary["val_loss"]),
        "train_loss": None if None in tail else _round(fmean(tail)),
        "val": [[record["step"], _round(record["loss"])] for record in by_kind["val"]],
        "tokens": train[-1]["tokens"],
        "parameters": run["num_parameters"],
        "skipped_steps": summary["skipped_steps"],
        "step_ms": round(quantiles(times, n=10)[0] if len(times) > 1 else times[0], 2),
        "telemetry": [_telemetry(record) for record in by_kind.get("telemetry", [])],
        "date": date.today().isoformat(),
        "commit": str(run["commit"])[:7],
        "torch": run["versions"]["torch"],
        "python": run["versions"]["python"],
        "machine": run["gpus"][0] if run["gpus"] else processor(),
        "data": {key: run["data"].get(key) for key in ("source", "train_tokens", "val_tokens")},
    }


def _telemetry(record: Row) -> Row:
    """Means by kind of matrix, and the largest of what forwards showed."""
    kinds: dict[str, list[Row]] = {}
    for name, numbers in record["parameters"].items():
        kinds.setdefault(short_name(name).rpartition(".")[2], []).append(numbers)
    means = {
        key: {kind: _round(fmean(numbers[key] for numbers in found)) for kind, found in kinds.items()}
        for key in ("update_rms", "weight_rms")
    }
    largest = {key: _round(max(record[key].values(), default=0.0)) for key in ("output_rms", "attention_logits") if key in record}
    return {"step": record["step"], **means, **largest}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def processor() -> str:
    """The model name of the processor, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {os.cpu_count()} cores"


def _processor_seconds() -> float:
    """Of this process and of those that it waited for: a busy machine does not change it."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(time.process_time() + children.ru_utime + children.ru_stime, 2)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- many trials


def run_all(experiment: Experiment, results: Results, jobs: int) -> list[str]:
    """Run what is missing, tuning first; return the reasons of trials that failed."""
    failed: dict[str, str] = {}
    while True:
        missing = [wanted for wanted in experiment.missing(results.loss) if wanted.key not in failed]
        if not missing:
            return list(failed.values())
        print(f"{experiment.name}: {len(missing)} trials", flush=True)
        for wanted, row, reason in _run(missing, jobs):
            if row is None:
                failed[wanted.key] = reason
            else:
                results.add(wanted, row)
            said = reason or f"validation loss {row and row['val_loss']}, {row and row['cpu_s']} s of processor time"
            print(f"  {label(wanted)}: {said}", flush=True)


def label(wanted: Wanted) -> str:
    keys = ("optimizer.name", "optimizer.lr", "optimizer.weight_decay", "train.steps", SEED)
    words = [f"{key.rpartition('.')[2]} {wanted.settings[key]}" for key in keys if key in wanted.settings]
    return ", ".join([*([wanted.variant] if wanted.variant else []), *words])


def _run(missing: Sequence[Wanted], jobs: int) -> Any:
    """(trial, its row or None, the reason if it failed), as they end."""
    trials = [trial_of(wanted) for wanted in missing]  # all are parsed before the first is run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # one process of trials with several takes their cores
    nproc = max(wanted.nproc for wanted in missing)
    at_once = max(1, jobs // nproc)
    gpus = sweep.visible_gpus(nproc, at_once)
    with ProcessPoolExecutor(at_once, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {
            pool.submit(
                run_trial,
                trial,
                wanted.variant,
                wanted.nproc,
                sweep.environment(number % at_once, nproc=wanted.nproc, jobs=at_once, gpus=gpus),
            ): wanted
            for number, (wanted, trial) in enumerate(zip(missing, trials))
        }
        for future in as_completed(futures):
            error = future.exception()
            reason = "" if error is None else f"{type(error).__name__}: {error}"
            yield futures[future], None if error is not None else _complete(futures[future], future.result()), reason


def _complete(wanted: Wanted, row: Row) -> Row:
    settings: Settings = wanted.settings
    return {"settings": settings, "variant": wanted.variant, "nproc": wanted.nproc, **row}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of experiments/grids without .yaml; all if left out")
    parser.add_argument("--size", default="small", help="small, full, quick or gpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="size quick, in a temporary folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: the cores)")
    parser.add_argument("--list", action="store_true", help="say what is missing, and run nothing")
    options = parser.parse_args(argv)
    size = "quick" if options.quick else options.size
    found = [read(name, size) for name in options.names] or read_all(size)
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder) / "trials.jsonl" if options.quick else RESULTS)
        if options.list:
            for experiment in found:
                missing = experiment.missing(results.loss)
                print(f"{experiment.name}: {len(missing)} trials that can be run now")
            return
        began = time.monotonic()
        failed = [reason for experiment in found for reason in run_all(experiment, results, options.jobs)]
        print(f"{len(results.rows)} trials in {results.path.name}, {duration(time.monotonic() - began)}")
        return

        if options.quick:
            page.write(results, Path(folder), size)
        elif size != "gpu":
            page.main()
    if failed:
        raise problem(
            "experiments",
            found=f"found {len(failed)} trials that failed; the first: {failed[0]}",
            needed="every trial must end",
            cure="the same command runs them again",
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server of the trials starts
    run_program(main)
