"""Run the trials of the experiments that have not run yet; write one line a trial to a JSONL file, and the page.

    python -m experiments.runner                       # all experiments, size small
    python -m experiments.runner weight_decay --jobs 4 # one of them
    python -m experiments.runner --size full           # what the whole suite asks for
    python -m experiments.runner --quick               # a few steps of everything, to see that it runs; keeps nothing

A trial whose line is there is not run again, whichever experiment asked for it, so a killed run goes on by the same
command. A trial is a run of the recipe (`launch.sweep` makes its command line); experiments/grids.py says what a grid
is, experiments/grids/*.yaml what is tried and why.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

from distmuon.errors import problem
from experiments import page
from experiments.grids import SEED, Experiment, Wanted, read, read_all
from experiments.trial import RESULTS, WORK, Results, Row, Trial, in_a_process, trial_of
from launch import sweep
from launch.failures import run_program
from launch.logs import duration


def run_all(experiment: Experiment, results: Results, jobs: int, work: Path = WORK) -> list[str]:
    """Run what is missing, tuning first, then seed by seed, so that a run which is stopped leaves whole seeds.

    Returns the reasons of trials that failed.
    """
    failed: dict[str, str] = {}
    while True:
        missing = [wanted for wanted in experiment.missing(results.loss) if wanted.key not in failed]
        missing.sort(key=lambda wanted: wanted.seed)
        if not missing:
            return list(failed.values())
        print(f"{experiment.name}: {len(missing)} trials", flush=True)
        alike = (
            [wanted for wanted in missing if wanted.nproc == nproc]
            for nproc in sorted({wanted.nproc for wanted in missing})
        )
        for wanted, row, reason in chain.from_iterable(_run(trials, jobs, work) for trials in alike):
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


def _run(missing: Sequence[Wanted], jobs: int, work: Path) -> Iterator[tuple[Wanted, Row | None, str]]:
    """(trial, its row or None, the reason if it failed), as they end. All have the same number of processes."""
    trials = [trial_of(wanted, work) for wanted in missing]  # all are parsed before the first is run
    nproc = missing[0].nproc
    at_once = max(1, jobs // nproc)
    gpus = sweep.visible_gpus(nproc, at_once)
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(at_once):
        slots.put(slot)

    def run(wanted: Wanted, trial: Trial) -> tuple[Row | None, str]:
        slot = slots.get()
        try:
            environment = sweep.environment(slot, nproc=wanted.nproc, jobs=at_once, gpus=gpus)
            return in_a_process(trial, wanted.variant, wanted.nproc, environment)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(run, wanted, trial): wanted for wanted, trial in zip(missing, trials)}
        try:
            for future in as_completed(futures):
                wanted, (row, reason) = futures[future], future.result()
                said = {"settings": wanted.settings, "variant": wanted.variant, "nproc": wanted.nproc}
                yield wanted, None if row is None else {**said, **row}, reason
        finally:  # Ctrl-C has reached the trials that run; none begins after it
            pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of experiments/grids without .yaml; all if left out")
    parser.add_argument("--size", default="small", help="small, full, quick or gpu (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="size quick, in a temporary folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
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
        work = Path(folder) / "runs" if options.quick else WORK
        failed = [reason for experiment in found for reason in run_all(experiment, results, options.jobs, work)]
        print(f"{len(results.rows)} trials in {results.path.name}, {duration(time.monotonic() - began)}")
        if options.quick:
            page.write(results, Path(folder), [size])
            print((Path(folder) / "experiments.md").read_text(encoding="utf-8"))
        else:
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
