"""Train every combination of some settings and say which is best; by default, learning rates of Muon and of AdamW.

    python -m launch.sweep --config configs/quickstart.yaml --out runs/sweep
    python -m launch.sweep --vary optimizer.lr=1e-3,2e-3 --vary optimizer.ns_steps=3,5 --vary train.seed=0,1,2
    python -m launch.sweep --grid grids.yaml --vary train.seed=0,1,2 --set train.steps=100 --nproc 1 --jobs 4

A grid is all combinations of the values of its keys; they are those of launch.pretrain. `--grid` reads a list of grids
from a YAML file, in which each optimizer may have values of its own; `--vary` adds its keys to each of them.

    - {optimizer.name: distmuon, optimizer.lr: [4.0e-3, 8.0e-3, 1.6e-2]}
    - {optimizer.name: adamw, optimizer.lr: [1.0e-3, 2.0e-3, 4.0e-3]}

All trials are parsed before the first is run. One that has finished with exactly these settings is not repeated, so a
killed sweep goes on by the same command. `sweep.md` (mean and spread over seeds), `sweep.png` and `results.jsonl` are
written anew after each trial.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean, stdev
from typing import Any, TypeAlias

import torch
import yaml

from distmuon.errors import problem
from launch.config import as_dict, leaves, parse
from launch.failures import run_program
from launch.logs import METRICS_FILE, duration, read_records
from launch.sinks import Record

Grid: TypeAlias = Mapping[str, Sequence[Any]]
Settings: TypeAlias = tuple[tuple[str, Any], ...]

SEED = "train.seed"
DEFAULT: Grid = {
    "optimizer.name": ("distmuon", "adamw"),
    "optimizer.lr": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
}
NO_MATTER = ("log.", "checkpoint.")
"""Keys that change no result."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a grid."""

    settings: dict[str, Any]
    """The varied keys and their values."""
    folder: Path
    arguments: tuple[str, ...]
    """For launch.pretrain."""
    wanted: dict[str, Any]
    """All keys that it is to be run with."""

    @property
    def label(self) -> str:
        return label(tuple(self.settings.items()))

    def summary(self, nproc: int) -> Record | None:
        """The summary record of its run; None if it has not finished with these settings."""
        path = self.folder / METRICS_FILE
        records = read_records(path) if path.is_file() else []
        runs = [record for record in records if record["kind"] == "run"]
        if not runs or records[-1]["kind"] != "summary" or runs[-1]["world_size"] != nproc:
            return None
        return records[-1] if _that_matter(runs[-1]["config"]) == self.wanted else None

    def final_val(self, nproc: int) -> float | None:
        """Its final validation loss; inf for a diverged run, None if it has not finished."""
        summary = self.summary(nproc)
        if summary is None:
            return None
        return math.inf if summary["val_loss"] is None else float(summary["val_loss"])

    def run(self, nproc: int, environment: Mapping[str, str]) -> None:
        """Train it; its output goes to `output.txt` in its folder. Raises ValueError with its last line if it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "launch.torchrun", f"--nproc_per_node={nproc}"] if nproc > 1 else []
        path = self.folder / "output.txt"
        with path.open("w", encoding="utf-8") as output:
            command = [sys.executable, *launcher, "-m", "launch.pretrain", *self.arguments]
            env = {**os.environ, **environment}
            status = subprocess.run(command, check=False, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
        if status:
            last = path.read_text(encoding="utf-8").rstrip().rpartition("\n")[2]
            raise problem(
                str(self.folder),
                found=f"found exit status {status}: {last}",
                needed="every run must end",
                cure=f"see {path}",
            )


def trials(config: Path, grids: Sequence[Grid], overrides: Sequence[str], out: Path) -> list[Trial]:
    """All trials, grid by grid; the last key varies fastest. `overrides`: `key=value` for all of them.

    Leaves with the reason if one of them describes no run. Raises ValueError for a setting that is there twice.
    """
    made: dict[str, Trial] = {}
    for grid in grids:
        for values in product(*grid.values()):
            settings = dict(zip(grid, values))
            folder = out / ",".join(f"{short(key)}={_file_name(value)}" for key, value in settings.items())
            # a rate at which every step is skipped is an answer here, not an error
            arguments = ["--config", str(config), "--train.max_skipped=0", "--log.sample_tokens=0", "--log.sinks=[]"]
            arguments += [f"--{override}" for override in overrides]
            arguments += [f"--{key}={_text(value)}" for key, value in settings.items()]
            arguments.append(f"--log.dir={folder}")
            wanted = _that_matter(as_dict(parse([*arguments])))
            trial = Trial(settings=settings, folder=folder, arguments=tuple(arguments), wanted=wanted)
            same = made.setdefault(json.dumps(wanted, sort_keys=True), trial)
            if same is not trial:
                raise problem(
                    "--vary",
                    found=f"found the same run twice: {same.label}, and {trial.label}",
                    needed="trials differ",
                    cure="drop one of the values",
                )
    return list(made.values())


def run_missing(grid: Sequence[Trial], nproc: int, jobs: int, gpus: Sequence[str] = ()) -> Iterator[tuple[Trial, str]]:
    """Run what has not finished, `jobs` at a time; yield each trial when it ends, with the reason if it failed."""
    missing = [trial for trial in grid if trial.summary(nproc) is None]
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def run(trial: Trial) -> None:
        slot = slots.get()
        try:
            print(f"{trial.label}: running\n", end="", flush=True)  # one write: lines of threads must not mix
            trial.run(nproc, environment(slot, nproc=nproc, jobs=jobs, gpus=gpus))
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, trial): trial for trial in missing}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, ValueError):
                    raise error
                yield futures[future], "" if error is None else str(error)
        finally:  # Ctrl-C has reached the trials that run; none begins after it
            pool.shutdown(cancel_futures=True)


def environment(slot: int, *, nproc: int, jobs: int, gpus: Sequence[str]) -> dict[str, str]:
    """What trials that run at once need: their share of the cores, and GPUs of their own."""
    found: dict[str, str] = {}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (jobs * nproc)))
    if jobs > 1 and gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * nproc : (slot + 1) * nproc])
    return found


def visible_gpus(nproc: int, jobs: int) -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them. Raises ValueError if the jobs need more."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(number) for number in range(torch.cuda.device_count())] if named is None else named.split(",")
    if torch.cuda.is_available() and jobs * nproc > len(gpus):
        raise problem(
            "--jobs",
            found=f"found {jobs} for trials of {nproc} processes and {len(gpus)} GPUs",
            needed="each process needs a GPU of its own",
            cure=f"set --jobs {len(gpus) // nproc or 1}",
        )
    return gpus if torch.cuda.is_available() else []


# ---- what came out


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The trials that differ by their seed only."""

    values: Settings
    losses: tuple[float | None, ...]
    """One a seed; inf: diverged, None: not run."""

    @property
    def side(self) -> Settings:
        """What cannot be ordered: the optimizer, for instance. Each side has a best of its own."""
        return tuple((key, value) for key, value in self.values if not is_number(value))

    @property
    def mean(self) -> float | None:
        """None until all seeds have finished."""
        done = [loss for loss in self.losses if loss is not None]
        return fmean(done) if len(done) == len(self.losses) else None

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 of a single one or where one has diverged."""
        done = [loss for loss in self.losses if loss is not None and math.isfinite(loss)]
        return stdev(done) if len(done) == len(self.losses) > 1 else 0.0

    def text(self, best: bool) -> str:
        if (diverged := self.losses.count(math.inf)) > 0:
            return "diverged" if len(self.losses) == 1 else f"{diverged} of {len(self.losses)} diverged"
        if self.mean is None:
            done = len(self.losses) - self.losses.count(None)
            return f"{done} of {len(self.losses)} seeds" if done else "not run"
        mean = f"**{self.mean:.4f}**" if best else f"{self.mean:.4f}"
        return f"{mean} ± {self.spread:.4f}" if len(self.losses) > 1 else mean


def settings_of(grid: Sequence[Trial], nproc: int) -> list[Setting]:
    """The trials by setting, in the order of the grid."""
    losses: dict[str, tuple[Settings, list[float | None]]] = {}
    for trial in grid:
        values = tuple((key, value) for key, value in trial.settings.items() if key != SEED)
        losses.setdefault(json.dumps(values), (values, []))[1].append(trial.final_val(nproc))
    return [Setting(values=values, losses=tuple(found)) for values, found in losses.values()]


def sides(found: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that compete with each other."""
    by_side: dict[str, list[Setting]] = {}
    for setting in found:
        by_side.setdefault(json.dumps(setting.side), []).append(setting)
    return list(by_side.values())


def best_of(side: Sequence[Setting]) -> Setting | None:
    """The lowest mean; None if nothing has finished well."""
    done = [setting for setting in side if setting.mean is not None and math.isfinite(setting.mean)]
    return min(done, key=lambda setting: setting.mean or 0.0, default=None)


def table(found: Sequence[Setting]) -> str:
    """Markdown: one row a setting, the best of each side in bold; what was best, of how many, and on which edge."""
    keys = list(dict.fromkeys(key for setting in found for key, _ in setting.values))
    bests = [best_of(side) for side in sides(found)]
    lines = ["| " + " | ".join([*keys, "validation loss"]) + " |", "|" + "---:|" * (len(keys) + 1)]
    for setting in found:
        values = dict(setting.values)
        cells = [_text(values[key]) if key in values else "-" for key in keys]
        lines.append("| " + " | ".join([*cells, setting.text(setting in bests)]) + " |")
    lines.append("")
    lines += [_verdict(side, best) for side, best in zip(sides(found), bests)]
    budgets = [sum(len(setting.losses) for setting in side) for side in sides(found)]
    if len(set(budgets)) > 1:
        lines.append(f"- The sides were not tuned alike: {', '.join(map(str, budgets))} trials.")
    seeds = max(len(setting.losses) for setting in found)
    over = f", mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    return f"Final validation loss{over}; the best of each side in bold.\n\n" + "\n".join(lines) + "\n"


def _verdict(side: Sequence[Setting], best: Setting | None) -> str:
    """The best of a side, out of how many trials, and whether it lies on an edge of what was tried."""
    name = label(side[0].side) or "all"
    if best is None:
        return f"- {name}: nothing has finished."
    count = sum(len(setting.losses) for setting in side)
    numbers = [(key, value) for key, value in best.values if is_number(value)]
    text = f"- {name}: the best of {count} trials is {label(tuple(numbers)) or 'the only setting'}."
    if any(setting.mean is None for setting in side):
        return text + " Some have not finished."
    for key, value in numbers:
        tried = [dict(setting.values)[key] for setting in side if key in dict(setting.values)]
        if min(tried) < max(tried) and value in (min(tried), max(tried)):
            edge = "smallest" if value == min(tried) else "largest"
            text += f" Its {key} is the {edge} that was tried: widen the grid."
    return text


def draw(found: Sequence[Setting], path: Path) -> None:
    """Write the picture: loss over the number that takes the most values, a curve for each other setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tried: dict[str, set[float]] = {}
    for key, value in (pair for setting in found for pair in setting.values if is_number(pair[1])):
        tried.setdefault(key, set()).add(value)
    if not tried:
        return
    across = max(tried, key=lambda key: len(tried[key]))
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for setting in found:
        values, mean = dict(setting.values), setting.mean
        if across in values and mean is not None and math.isfinite(mean):
            others = tuple(pair for pair in setting.values if pair[0] != across)
            curves.setdefault(label(others), []).append((values[across], mean, setting.spread))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in curves.items():
        points.sort()
        xs, means, spreads = zip(*points)
        line, *_ = axes.errorbar(xs, means, yerr=spreads if any(spreads) else None, marker="o", capsize=3, label=name)
        lowest = means.index(min(means))
        axes.plot(xs[lowest], means[lowest], "o", markersize=13, fillstyle="none", color=line.get_color())
    if min(tried[across]) > 0 and max(tried[across]) >= 8 * min(tried[across]):
        axes.set_xscale("log")
        axes.set_xticks(sorted(tried[across]), labels=[f"{value:g}" for value in sorted(tried[across])])
        axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel("final validation loss, nats a token")
    axes.set_title("The best of each curve has a ring")
    axes.grid(alpha=0.25)
    if any(curves):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(grid: Sequence[Trial], nproc: int, out: Path) -> str:
    """Write the three files of the sweep; return the table."""
    found = settings_of(grid, nproc)
    (out / "sweep.md").write_text(table(found), encoding="utf-8")
    draw(found, out / "sweep.png")
    summaries = [(trial, trial.summary(nproc)) for trial in grid]
    keys = ("train_loss", "val_loss", "seconds", "skipped_steps")
    lines = [
        json.dumps({"settings": trial.settings, "folder": trial.folder.name, **{key: summary[key] for key in keys}})
        for trial, summary in summaries
        if summary is not None
    ]
    (out / "results.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return table(found)


# ---- keys and values


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Key and values of `key=value,value,...`; a value may itself be a YAML list."""
    key, equals, values = text.partition("=")
    try:
        found = yaml.safe_load(f"[{values}]") if equals else []
    except yaml.YAMLError:
        found = []
    if not found:
        raise problem(
            "--vary",
            found=f"found {text!r}",
            needed="a key and its values are needed",
            cure="write --vary optimizer.lr=1e-3,2e-3",
        )
    return key.strip(), [_value(value) for value in found]


def read_grids(path: Path) -> list[Grid]:
    """The grids of a YAML file: a list of mappings from a key, dotted or nested, to a value or to a list of values."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise problem(
            "--grid", found=f"found {path}: {' '.join(str(error).split())}", needed="YAML is needed", cure="correct it"
        ) from error
    entries = found if isinstance(found, list) else [found]
    if not entries or not all(isinstance(entry, dict) and entry for entry in entries):
        raise problem(
            "--grid",
            found=f"found no list of mappings in {path}",
            needed="each grid maps keys to lists of values",
            cure="see python -m launch.sweep --help",
        )
    return [
        {key: [_value(value) for value in (values if isinstance(values, list) else [values])] for key, values in pairs}
        for pairs in (list(leaves(entry)) for entry in entries)
    ]


def _value(value: Any) -> Any:
    """YAML takes 1e-3 for a text; it is a number here."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short(key: str) -> str:
    """The last word of a key."""
    return key.rpartition(".")[2]


def label(settings: Settings) -> str:
    return " ".join(f"{short(key)} {_text(value)}" for key, value in settings)


def _text(value: Any) -> str:
    """A value as launch.pretrain reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _file_name(value: Any) -> str:
    text = _text(value)
    plain = re.sub(r"[^\w.+-]+", "_", text)
    return plain if plain == text else f"{plain}-{zlib.crc32(text.encode()):08x}"


def _that_matter(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in leaves(config) if not key.startswith(NO_MATTER)}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    parser.add_argument("--config", type=Path, default=quickstart, help="of all trials (default: the quickstart's)")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE,VALUE,...")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="YAML: a list of grids")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each trial (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of all that it writes")
    options = parser.parse_args(argv)

    varied = dict(map(parse_vary, options.vary))
    grids = read_grids(options.grid) if options.grid else [{} if varied else DEFAULT]
    grid = trials(options.config, [{**grid, **varied} for grid in grids], options.overrides, options.out)
    gpus = visible_gpus(options.nproc, options.jobs)
    options.out.mkdir(parents=True, exist_ok=True)
    done = sum(trial.summary(options.nproc) is not None for trial in grid)
    failed: list[str] = []
    start = time.monotonic()
    print(f"{len(grid)} trials, {done} of them finished before", flush=True)
    for trial, reason in run_missing(grid, options.nproc, options.jobs, gpus):
        if reason:
            failed.append(reason)
        else:
            done += 1
        loss = trial.final_val(options.nproc)
        what = reason or (f"validation loss {loss:.4f}" if loss is not None else "stopped before its end")
        print(f"[{done}/{len(grid)}, {duration(time.monotonic() - start)}] {trial.label}: {what}\n", end="", flush=True)
        write(grid, options.nproc, options.out)
    print(write(grid, options.nproc, options.out), end="")
    if failed:
        raise problem(
            str(options.out),
            found=f"found {len(failed)} of {len(grid)} trials that failed; the first: {failed[0]}",
            needed="every trial must end",
            cure="the same command runs them again",
        )


if __name__ == "__main__":
    run_program(main)
