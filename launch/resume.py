"""How a run survives: it resumes from its newest complete checkpoint, saves on schedule, and stops when it is told to.

Decides when to save and what must not change between two starts of one run. What a checkpoint is, and that only whole
ones are loaded, is `distmuon`'s business. Works at any number of ranks, so under `torchrun --max-restarts` and
`--nnodes MIN:MAX` a restart is simply a start.

[Note: preemption] SIGTERM reaches ranks at different moments, or only some of them. So the handler only takes note; the
ranks agree where they read the device anyway (every `log.every` steps), save, and leave together with status 0. That
takes `log.every` steps and one save; torchrun kills what has not left 30 s after it passed a SIGTERM on. Ctrl-C
(SIGINT) is the same wish. It reaches a worker twice, from the terminal and from torchrun, so only a Ctrl-C that comes
later than that interrupts at once.

[Note: an agent joins or leaves] With several agents (`--nnodes MIN:MAX`) torchrun's SIGTERM has a second meaning: each
agent that notices a newcomer stops its own workers, at its own moment, to start them in the larger world. The ranks
save and leave as above, so nothing is lost; but a worker that left with status 0 before its agent noticed would count
as finished. So who was not asked himself waits to be asked. If that does not come, only a part of the run was
preempted; status 1 then lets torchrun go on with the rest, as long as it has restarts left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import distmuon
from distmuon.errors import problem
from launch.config import Config, as_dict, leaves
from launch.data import TrainingWindows
from launch.ranks import Ranks

FOLDER = "checkpoints"
SIGNALS = ("SIGTERM", "SIGINT")
SAME_WISH_SECONDS = 3.0
"""A second SIGINT within this time is the first one, passed on."""
NEWCOMER_SECONDS = 10.0
"""How long a rank that was not asked to stop waits for its agent to ask: agents look for newcomers once a second."""
# What may change from one start to the next: how long a run is, how often it is looked at, how it is cut over the ranks
# and in how many bits. docs/options.md says which of these changes no bit.
FREE = (
    "log.",
    "checkpoint.",
    "train.steps",
    "train.micro_batch",
    "train.eval_",
    "train.verify_every",
    "model.dtype",
    "model.compile",
    "model.gradient_checkpointing",
    "parallel.",
    "optimizer.sharding.",
    "optimizer.precision.",
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: steps taken, and the last losses it recorded."""

    step: int = 0
    train_loss: float = float("nan")
    val_loss: float = float("nan")
    skipped_steps: int = 0


class Checkpoints:
    """The checkpoints of one run, in `<log.dir>/checkpoints`; none at all where `checkpoint.every` is 0."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optimizer: distmuon.DistMuon,
        scheduler: LRScheduler,
        windows: TrainingWindows,
    ) -> None:
        self._config, self._model, self._optimizer = config, model, optimizer
        self._scheduler, self._windows = scheduler, windows
        self.folder = Path(config.log.dir) / FOLDER
        self._saved_step = 0
        self.saved_train: dict[str, Any] = {}
        """The keys of `train` under which the loaded checkpoint was saved."""

    def resume(self, ranks: Ranks) -> Progress:
        """Load the newest complete checkpoint, if there is one. Collective."""
        (newest, *_) = ranks.gather(distmuon.latest_checkpoint(self.folder))  # what rank 0 sees
        if newest is None:
            return Progress()
        if self._config.checkpoint.every == 0:
            raise problem(
                "checkpoint.every",
                found=f"found 0, and {newest} is of a run in this log.dir",
                needed="a run without checkpoints would begin anew among the records of that one",
                cure="set checkpoint.every to go on with it, or give log.dir another folder",
            )
        found = distmuon.load_checkpoint(self.folder, self._model, self._optimizer, scheduler=self._scheduler)
        check_same_run(found.extra["config"], as_dict(self._config))
        self.saved_train = found.extra["config"]["train"]
        self._windows.load_state_dict(found.extra["data"])
        progress = Progress(**found.extra["progress"])
        self._saved_step = progress.step
        if ranks.rank == 0:
            same_size = found.dp_size == self._optimizer.group.dp_size
            sizes = "" if same_size else f", saved by {found.dp_size} ranks"
            print(f"resumed from {found.path}{sizes}", flush=True)
        return progress

    def due(self, step: int, stop: bool) -> bool:
        every = self._config.checkpoint.every
        return (
            every > 0 and step != self._saved_step and (stop or step % every == 0 or step == self._config.train.steps)
        )

    def save(self, progress: Progress) -> None:
        """Collective."""
        extra = {"config": as_dict(self._config), "data": self._windows.state_dict(), "progress": vars(progress)}
        distmuon.save_checkpoint(
            self.folder / f"step-{progress.step:08d}",
            self._model,
            self._optimizer,
            scheduler=self._scheduler,
            extra=extra,
            keep_last=self._config.checkpoint.keep_last,
            asynchronous=self._config.checkpoint.asynchronous,
        )
        self._saved_step = progress.step

    def finish(self) -> None:
        """Wait for what is still being written. Collective."""
        distmuon.finish_saves(self._optimizer)


def check_same_run(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise, naming the first key, where this start describes another run than the one in the folder."""
    theirs, mine = dict(leaves(saved)), dict(leaves(ours))
    for key in sorted(theirs.keys() | mine.keys()):
        if theirs.get(key) != mine.get(key) and not key.startswith(FREE):
            raise ValueError(
                f"{key}: found {mine.get(key)!r}, the checkpoints in log.dir are of a run with {theirs.get(key)!r}; "
                "a resumed run goes on as it began; change it back, or give log.dir another folder"
            )


class StopRequest:
    """Whether somebody asked this run to stop; see [Note: preemption]."""

    def __init__(self) -> None:
        self.signal = ""
        """The name of the signal that asked this rank."""
        self.agreed_signal = ""
        """The name of a signal that asked any rank, as of the last `agreed`."""
        self._since = 0.0

    @contextmanager
    def listening(self, active: bool) -> Iterator[StopRequest]:
        """Take note of SIGTERM and SIGINT inside, if `active`; otherwise they end the process as ever."""
        if not active:
            yield self
            return
        before = {signal.Signals[name]: signal.signal(signal.Signals[name], self._note) for name in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() - self._since > SAME_WISH_SECONDS:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = signal.Signals(number).name, time.monotonic()

    def agreed(self, ranks: Ranks) -> bool:
        """The same answer on all ranks: whether any of them was asked. Collective; reads the device."""
        asked = ranks.sum(torch.tensor([float(self.signal == name) for name in SIGNALS], device=ranks.device))
        self.agreed_signal = next((name for name, count in zip(SIGNALS, asked.tolist()) if count > 0), "")
        return self.agreed_signal != ""

    def leave(self) -> None:
        """Return where this process is to end with status 0, or exit with 1; see [Note: an agent joins or leaves]."""
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
            return
        deadline = time.monotonic() + NEWCOMER_SECONDS
        while not self.signal and time.monotonic() < deadline:
            time.sleep(0.05)
        restarts_left = int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) - int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if not self.signal and restarts_left > 0:
            raise SystemExit("stopped because another rank was asked to; this one goes on when torchrun restarts it")
