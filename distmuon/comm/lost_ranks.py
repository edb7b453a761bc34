"""Reports between ranks after a collective has failed: where each rank stood, what it raised, which rank is missing.

This module decides which ranks the error names, and its words. It knows the group's store and no collective, since
collectives are broken by then.

[Note: roll call] Nothing is written while collectives succeed. A rank whose collective fails writes a report into the
group's store (where it stood), closes its connections, so that ranks that wait for it fail now and not at their own
time limit, and reads the other ranks' reports for `GRACE_S`. Then it can tell: a rank without a report is missing (it
hangs or is dead); a rank that stood at another collective took another path; a rank that raised is the cause. The
store may be gone together with the rank that holds it, or that host may hang; so a separate thread asks the store, and
it is abandoned after `STORE_S`.

[Note: meeting] A call that all ranks must make, but that a user may make on one rank alone, begins with a meeting in
the store. A rank that came alone has started no collective, and can go on after the error. The first rank to come
leads the meeting. It prints on stderr which ranks it waits for, and it ends the meeting for all that came: at the time
limit, or as soon as a rank waits in a collective of the group that the leader has not started, for that rank cannot
come any more. A rank whose collective takes longer than `LOOK_S` checks whether a meeting is open, and only then
writes where it stands.

    turn n:  all came, or the leader gave up  ->  one rank closes it: turn n + 1 begins, then the outcome of n is there
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from distmuon.errors import problem

GRACE_S = 5.0  # how long a rank waits for the reports of the other ranks
STORE_S = 10.0  # how much longer the store may take to answer
LOOK_S = 1.0  # how often a waiting rank looks into the store
SAY_S = 3.0  # when the leader of a meeting prints which ranks it waits for


class LostRanks(RuntimeError):
    """A collective failed on this rank. The message names it, and the ranks that are missing or stand elsewhere."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: the stage, a label (a bucket and its first parameters), the step."""

    stage: str
    label: str
    step: int

    def __str__(self) -> str:
        return f"{self.stage}{self.label and ' of '}{self.label}, step {self.step}"


@dataclass(frozen=True, slots=True)
class FailureReport:
    """A rank's report in the store: the place where its collective failed, or the error that it raised itself."""

    at: str = ""
    raised: str = ""


class RollCall:
    """Reports and meetings of one group's ranks. `process_group=None`: the default group, looked up when needed."""

    def __init__(self, process_group: dist.ProcessGroup | None, dp_rank: int, dp_size: int) -> None:
        self._process_group = process_group
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._lost = ""

    def store(self, what: str) -> c10d.Store:
        """The group's store, with a key prefix for `what`."""
        pg = self._process_group if self._process_group is not None else c10d._get_default_group()
        return c10d.PrefixStore(f"distmuon/{what}", c10d._get_process_group_store(pg))

    def announce_waiting(self, at: str) -> None:
        """Write beforehand that this rank waits at `at` in the store, not in a collective; "" withdraws it."""
        self.store("lost").set(f"stands {self._dp_rank}", at)

    def meet(self, what: str, started: int, limit_s: float, warning: Callable[[Sequence[int]], str]) -> dict[int, str]:
        """Wait until all ranks come to `what`; return the missing ranks, each with its known place (or ""). Blocking.

        All ranks that came get the same answer; see [Note: meeting].

        started: how many of the group's collectives this rank has started. limit_s: how long the first rank waits for
        the last. warning: makes the text that the first rank prints on stderr, from the ranks that it waits for.
        Raises RuntimeError if a rank fails meanwhile, or the store does not answer.
        """
        store, reports = self.store(what), self.store("lost")
        turn = store.add("turn", 0)
        store.set(f"rank {self._dp_rank}", str(turn))
        came, outcome = store.add(f"came {turn}", 1), f"outcome {turn}"
        if came == self._dp_size:
            self._close(store, turn, {})
        begin = time.monotonic()
        leads = came == 1
        asked = False
        warned = not leads
        try:
            while not _appeared(store, outcome, LOOK_S):
                if self.any_report():
                    raise RuntimeError(f"while this rank waited for all to come to {what}, another rank failed")
                waited = time.monotonic() - begin
                if leads and not asked:
                    reports.add("asking", 1)
                    asked = True
                absent = [rank for rank in range(self._dp_size) if not _came(store, rank, turn)] if leads else []
                places = self._cut_off(reports, absent, started)
                if absent and not warned and waited > SAY_S:
                    print(f"distmuon: {warning(absent)}", file=sys.stderr, flush=True)
                    warned = True
                if places or waited > limit_s + (0.0 if leads else STORE_S):
                    absent = absent or [rank for rank in range(self._dp_size) if not _came(store, rank, turn)]
                    self._close(store, turn, {rank: places.get(rank, "") for rank in absent})
        finally:
            if asked:
                with suppress(RuntimeError):
                    reports.add("asking", -1)
        return {int(rank): place for rank, place in json.loads(store.get(outcome)).items()}

    def _close(self, store: c10d.Store, turn: int, missing: Mapping[int, str]) -> None:
        """End turn `turn` with this outcome, unless another rank has ended it already."""
        if store.add(f"closing {turn}", 1) == 1:
            store.add("turn", 1)
            store.set(f"outcome {turn}", json.dumps(missing))

    def _cut_off(self, reports: c10d.Store, ranks: Sequence[int], started: int) -> dict[int, str]:
        """The places of those `ranks` that wait in a collective which this rank has not started."""
        places = {}
        for rank in ranks:
            text = reports.get(f"waits {rank}").decode() if _has(reports, f"waits {rank}") else "0"
            number, _, place = text.partition(" ")
            if int(number) > started:
                places[rank] = place
        return places

    @contextmanager
    def blocked(self, place: Place, number: int) -> Iterator[None]:
        """Tell meetings, while the block runs, that this rank waits in the group's collective number `number`.

        A separate thread asks the store, which may be gone or hang: the collective must not wait for it. See
        [Note: meeting].
        """
        over = threading.Event()

        def look() -> None:
            told = False
            with suppress(RuntimeError):
                reports = self.store("lost")
                while not over.wait(LOOK_S):
                    if not told and _has(reports, "asking") and reports.add("asking", 0) > 0:
                        reports.set(f"waits {self._dp_rank}", f"{number} {place}")
                        told = True
                if told:
                    reports.set(f"waits {self._dp_rank}", "0")

        threading.Thread(target=look, name="distmuon waits", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def any_report(self) -> bool:
        """Whether a rank has reported a failure, or the store does not answer."""
        try:
            return bool(self.store("lost").add("words", 0))
        except RuntimeError:
            return True

    def describe_failure(self, place: Place, error: RuntimeError, hang_up: Callable[[], None]) -> LostRanks:
        """Make the error of a rank whose collective at `place` failed with `error`; later calls repeat the first."""
        if not self._lost:
            why = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
            where = f"{self.named([self._dp_rank])} at {place}"
            try:
                reports, standing = self._exchange(FailureReport(at=str(place)), hang_up)
                self._lost = str(self._finding(where, str(place), why, reports, standing))
            except (RuntimeError, TimeoutError, ValueError) as store_error:
                answer = str(store_error).partition("\n")[0]
                self._lost = str(
                    problem(
                        where,
                        found=f"{why}, and the group's store cannot say which rank is missing ({answer})",
                        needed="the process that holds the store must live (rank 0, or torchrun's agent)",
                        cure="see the output and the machine of that process first",
                    )
                )
        return LostRanks(self._lost)

    def report_failure(self, error: Exception, hang_up: Callable[[], None]) -> None:
        """Report that this rank fails with `error`, so that the other ranks quote it; wait until they have failed."""
        with suppress(RuntimeError, TimeoutError, ValueError):  # the store is gone: no rank can be told
            self._exchange(FailureReport(raised=f"{type(error).__name__}: {error}"), hang_up)

    def _exchange(
        self, report: FailureReport, hang_up: Callable[[], None]
    ) -> tuple[dict[int, FailureReport], dict[int, str]]:
        """Write `report` and hang up; return the other ranks' reports, and where ranks wait in the store."""
        written = threading.Event()
        answers = list[tuple[dict[int, FailureReport], dict[int, str]] | Exception]()

        def ask() -> None:
            try:
                store = self.store("lost")
                if not store.check([f"rank {self._dp_rank}"]):  # the first report counts: later errors follow from it
                    store.set(f"rank {self._dp_rank}", json.dumps(asdict(report)))
                    store.add("words", 1)
                written.set()
                answers.append(self._listen(store, to_all=bool(report.raised)))
            except Exception as error:
                answers.append(error)
                written.set()

        thread = threading.Thread(target=ask, name="roll call", daemon=True)
        thread.start()
        written.wait(STORE_S)
        hang_up()
        thread.join(GRACE_S + STORE_S)
        if not answers:
            raise TimeoutError(f"no answer for {GRACE_S + STORE_S:g} s")
        answer = answers.pop()
        try:
            if isinstance(answer, Exception):
                raise answer
            return answer
        finally:
            del answer  # an error's traceback keeps this frame alive

    def _listen(self, store: c10d.Store, to_all: bool) -> tuple[dict[int, FailureReport], dict[int, str]]:
        """Read reports until all ranks have reported, or (unless `to_all`) a rank has raised, or `GRACE_S` is over."""
        others = [rank for rank in range(self._dp_size) if rank != self._dp_rank]
        reports = dict[int, FailureReport]()
        num_seen = 0
        deadline = time.monotonic() + GRACE_S
        while len(reports) < len(others) and (to_all or not any(report.raised for report in reports.values())):
            num_reports = store.add("words", 0)
            if num_reports != num_seen:
                num_seen = num_reports
                new = [rank for rank in others if rank not in reports and store.check([f"rank {rank}"])]
                reports.update((rank, FailureReport(**json.loads(store.get(f"rank {rank}")))) for rank in new)
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.05)
        waiting = [rank for rank in others if rank not in reports and store.check([f"stands {rank}"])]
        return reports, {rank: at for rank in waiting if (at := store.get(f"stands {rank}").decode())}

    def _finding(
        self, where: str, place: str, why: str, reports: dict[int, FailureReport], standing: dict[int, str]
    ) -> ValueError:
        raised = [rank for rank, report in reports.items() if report.raised]
        if raised:
            found = "; ".join(f"{self.named([rank])} raised {reports[rank].raised}" for rank in sorted(raised))
            remedy = f"see the traceback of {self.named(raised)}"
            return problem(where, found=found, needed="training needs all ranks", cure=remedy)
        missing = [r for r in range(self._dp_size) if r not in (self._dp_rank, *reports, *standing)]
        at = {**{rank: report.at for rank, report in reports.items()}, **standing}
        elsewhere = {p: [r for r in sorted(at) if at[r] == p] for p in at.values()}
        here = elsewhere.pop(place, [])
        findings = [f"{self.named(missing)} missing, no report within {GRACE_S:g} s"] if missing else []
        findings += [f"{self.named(ranks)} stood at {p}" for p, ranks in elsewhere.items()]
        findings += [f"{self.named(here)} waited here too"] if here else []
        if missing:
            remedy = f"see the output and the machine of {self.named(missing)}: it hangs, has died or is cut off"
        elif elsewhere:
            remedy = "let all ranks take the same steps, and make collective calls (state_dict, a save) on all ranks"
        else:
            findings += ["no rank is missing, so a rank was late or a connection broke"]
            remedy = (
                "look for the slow rank or the broken link; init_process_group(timeout=...) sets how long ranks wait"
            )
        return problem(
            where,
            found=f"{', '.join(findings)} ({why})",
            needed="every rank must come to every collective, in time",
            cure=remedy,
        )

    def named(self, ranks: Sequence[int]) -> str:
        """Text that names ranks of this group, with their global ranks if those differ."""
        pg = self._process_group
        global_ranks = list(ranks) if pg is None else [dist.get_process_group_ranks(pg)[rank] for rank in ranks]
        text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"
        if global_ranks == list(ranks):
            return text
        return f"{text} (of all processes: {global_ranks[0] if len(ranks) == 1 else global_ranks})"


def _has(store: c10d.Store, key: str) -> bool:
    return bool(store.check([key]))


def _came(store: c10d.Store, rank: int, turn: int) -> bool:
    return _has(store, f"rank {rank}") and store.get(f"rank {rank}").decode() == str(turn)


def _appeared(store: c10d.Store, key: str, seconds: float) -> bool:
    """Whether `key` appears within `seconds`; False if the store is gone."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:  # a DistStoreError, or a plain one from a FileStore
        return False
    return True
