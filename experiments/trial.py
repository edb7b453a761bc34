"""One trial: a run in a process of its own, and what is kept of it: a row, which is a line of a file.

A run is the recipe's, or that of experiments.images for a model of images.

[Note: processes of trials] A trial is forked from a server that has imported everything, for importing would take a
third of a short trial. Each has a process of its own, so what a variant changes ends with it. A trial of several
processes is started by that process, by torchrun.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from distmuon.errors import problem
from distmuon.math import spectra
from experiments import images
from experiments.grids import ROOT, SEED, Wanted, key_of
from experiments.variants import VARIANTS
from launch import pretrain, sweep
from launch.config import parse
from launch.logs import METRICS_FILE, open_log, read_records
from launch.ranks import launched_ranks
from launch.resume import StopRequest
from launch.run import make_run

RESULTS = Path(__file__).parent / "results" / "trials.jsonl"
WORK = ROOT / "runs" / "experiments"
"""Folders of the trials; nothing needs them once a row is written."""
POINTS = 6
"""Measurements of weights and outputs a run, at most."""
Row = dict[str, Any]
Trial = sweep.Trial | images.ImageTrial


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


def trial_of(wanted: Wanted, work: Path = WORK) -> Trial:
    """The command line of a trial, parsed, or a trial with images. Leaves with the reason if it describes no run."""
    folder = work / hashlib.sha256(wanted.key.encode()).hexdigest()[:16]
    if wanted.settings.get("data.source") == images.SOURCE:
        if wanted.variant or wanted.nproc > 1:
            raise problem(
                "a trial with images",
                found=f"found variant {wanted.variant!r} and {wanted.nproc} processes",
                needed="its loop has no variants and one process",
                cure="leave both out",
            )
        return images.ImageTrial(folder=folder, settings=wanted.settings)
    every = measured_every(wanted.settings["train.steps"])
    overrides = [f"{key}={_text(value)}" for key, value in wanted.settings.items() if key != SEED]
    overrides += [f"log.telemetry_every={every}", "log.progress=false"]
    (trial,) = sweep.trials(ROOT / wanted.config, [{SEED: [wanted.seed]}], overrides, folder)
    return trial


def measured_every(steps: int) -> int:
    """Steps between measurements: the last step is one of them, and there are as many as `POINTS` allows."""
    return next(steps // points for points in range(POINTS, 0, -1) if steps % points == 0)


def run_trial(trial: Trial, variant: str, nproc: int, environment: dict[str, str]) -> Row:
    """Train it, and say what came out. In a process of its own."""
    os.environ.update(environment)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    began = _processor_seconds()
    entropy: dict[str, float] = {}
    if isinstance(trial, images.ImageTrial):
        records = trial.train()
    elif nproc > 1:
        trial.run(nproc, environment)
    else:
        shutil.rmtree(trial.folder, ignore_errors=True)
        trial.folder.mkdir(parents=True)
        path = trial.folder / "output.txt"
        with path.open("w", encoding="utf-8") as output, redirect_stdout(output), redirect_stderr(output):
            entropy = entropies(train(trial.arguments, variant))
    if isinstance(trial, sweep.Trial):
        records = read_records(trial.folder / METRICS_FILE)
    seconds = round(_processor_seconds() - began, 2)
    return {**measured(records), "cpu_s": seconds, "entropy": entropy}


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
        if is_hidden(name, weight.ndim):
            stack = weight.detach().double().reshape(-1, *weight.shape[-2:])
            values = [float(spectra.svd_entropy(torch.linalg.svdvals(matrix))) for matrix in stack]
            found[short_name(name)] = round(fmean(values), 4)
    return found


def short_name(name: str) -> str:
    """Without what all names have in common."""
    parts = [part for part in name.split(".") if part not in ("model", "transformer", "layers", "h", "weight")]
    return ".".join(parts)


def kind_of(short: str) -> str:
    """The last word of a short name: q_proj, gate, ..."""
    return short.rpartition(".")[2]


def is_hidden(name: str, ndim: int) -> bool:
    """Whether a parameter is one of those that Muon is made for."""
    return ndim >= 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def measured(records: Sequence[Row]) -> Row:
    """What a row keeps of a run's records."""
    by_kind: dict[str, list[Row]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    run, train, summary = by_kind["run"][-1], by_kind["train"], by_kind["summary"][-1]
    tail = [record["loss"] for record in train[-max(1, len(train) // 20) :]]
    return {
        "val_loss": _round(summary["val_loss"]),
        "train_loss": None if None in tail else _round(fmean(tail)),
        "val": [[record["step"], _round(record["loss"])] for record in by_kind["val"]],
        "tokens": train[-1]["tokens"],
        "parameters": run["num_parameters"],
        "skipped_steps": summary["skipped_steps"],
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
    hidden = {name: found for name, found in record["parameters"].items() if is_hidden(name, len(found["shape"]))}
    means: dict[str, dict[str, float | None]] = {}
    for key in ("weight_rms", "update_rms"):
        kinds: dict[str, list[float]] = {}
        for name, found in hidden.items():
            kinds.setdefault(kind_of(short_name(name)), []).append(found[key])
        means[key] = {kind: _round(fmean(values)) for kind, values in kinds.items()}
    largest = {key: _round(max(record[key].values())) for key in ("output_rms", "attention_logits") if record.get(key)}
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
    return time.process_time() + children.ru_utime + children.ru_stime


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def in_a_process(trial: Trial, variant: str, nproc: int, environment: dict[str, str]) -> tuple[Row | None, str]:
    """The row of a trial, or the reason why there is none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_row, args=(there, trial, variant, nproc, environment))
    process.start()
    there.close()
    try:
        row, reason = here.recv()
    except EOFError:
        row, reason = None, "its process was killed"
    process.join()
    return row, reason and f"{trial.folder}: {reason}"


def _send_row(pipe: Connection, *arguments: Any) -> None:
    try:
        pipe.send((run_trial(*arguments), ""))
    except (Exception, SystemExit) as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))
