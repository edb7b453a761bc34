"""What ranks tell one another when a collective has failed: where each stood, what it raised, who is missing.

Decides who is named in the error, and its words. Knows the group's store and no collective, for those are broken by
then.

[Note: roll call] While all goes well nothing is written. A rank whose collective fails leaves a word in the store of
the group (where it stood), hangs up, so that ranks which wait for it fail now and not at their own time limit,
and listens for `GRACE_S`. Then it knows: who left no word is missing, it hangs or is dead; who stood at another
collective went another way; who raised is the cause. The store may be gone, or its host hang, with the rank that holds
it: so the store is asked from a thread of its own, which is given up after `STORE_S`.

[Note: meeting] What all ranks must call, but a user may call on one alone, begins with a meeting in the store: a rank
that came alone has started no collective, and can go on when it was told. The first to come leads. It says on stderr
whom it waits for, and ends the meeting for all who came: at its limit, or as soon as a rank stands in a collective of
the group that the leader has not started, for that rank cannot come any more. A rank whose collective takes longer than
`LOOK_S` looks whether a meeting is called and leaves word where it stands; nothing is written unless one is.

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

GRACE_S = 5.0  # how long a rank listens for the others' words
STORE_S = 10.0  # how much longer the store may take to answer
LOOK_S = 1.0  # how often a rank that waits looks into the store
SAY_S = 3.0  # when the leader of a meeting says whom it waits for


class LostRanks(RuntimeError):
    """A collective failed on this rank. The message says at which, and which ranks are missing, gone or elsewhere."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: the stage, what it is about (a bucket and its first parameters), the step."""

    stage: str
    label: str
    step: int

    def __str__(self) -> str:
        return f"{self.stage}{self.label and ' of '}{self.label}, step {self.step}"


@dataclass(frozen=True, slots=True)
class FailureReport:
    """What one rank left in the store: where its collective failed, or the error it raised of its own."""

    at: str = ""
    raised: str = ""


class RollCall:
    """The ranks of one group. `process_group` None: the default group, looked up when it is needed."""

    def __init__(self, process_group: dist.ProcessGroup | None, dp_rank: int, dp_size: int) -> None:
        self._process_group, self._dp_rank, self._dp_size = process_group, dp_rank, dp_size
        self._lost = ""

    def store(self, what: str) -> c10d.Store:
        """The group's store, under keys of its own for `what`."""
        pg = self._process_group if self._process_group is not None else c10d._get_default_group()
        return c10d.PrefixStore(f"distmuon/{what}", c10d._get_process_group_store(pg))

    def announce_waiting(self, at: str) -> None:
        """Leave word beforehand that this rank waits at `at`, in the store and not in a collective; "": no more."""
        self.store("lost").set(f"stands {self._dp_rank}", at)

    def meet(self, what: str, started: int, limit_s: float, warning: Callable[[Sequence[int]], str]) -> dict[int, str]:
        """The ranks that do not come to `what`, each with the place where it is known to stand (or ""): none, once all
        have come. The same on all that came. Blocking; see [Note: meeting].

        started: how many of the group's collectives this rank has started. limit_s: how long the first rank waits for
        the last. warning: what the first says on stderr, by the ranks that it waits for.
        Raises RuntimeError where a rank has failed meanwhile, or the store does not answer.
        """
        store, words = self.store(what), self.store("lost")
        turn = store.add("turn", 0)
        store.set(f"rank {self._dp_rank}", str(turn))
        came, outcome = store.add(f"came {turn}", 1), f"outcome {turn}"
        if came == self._dp_size:
            self._close(store, turn, {})
        leads, asked, begin = came == 1, False, time.monotonic()
        said = not leads
        try:
            while not _appeared(store, outcome, LOOK_S):
                if self.any_report():
                    raise RuntimeError(f"while this rank waited for all to come to {what}, another one failed")
                waited = time.monotonic() - begin
                if leads and not asked:
                    words.add("asking", 1)
                    asked = True
                absent = [rank for rank in range(self._dp_size) if not _came(store, rank, turn)] if leads else []
                places = self._cut_off(words, absent, started)
                if absent and not said and waited > SAY_S:
                    print(f"distmuon: {warning(absent)}", file=sys.stderr, flush=True)
                    said = True
                if places or waited > limit_s + (0.0 if leads else STORE_S):
                    absent = absent or [rank for rank in range(self._dp_size) if not _came(store, rank, turn)]
                    self._close(store, turn, {rank: places.get(rank, "") for rank in absent})
        finally:
            if asked:
                with suppress(RuntimeError):
                    words.add("asking", -1)
        return {int(rank): place for rank, place in json.loads(store.get(outcome)).items()}

    def _close(self, store: c10d.Store, turn: int, missing: Mapping[int, str]) -> None:
        """End turn `turn` with this outcome, unless another rank has ended it already."""
        if store.add(f"closing {turn}", 1) == 1:
            store.add("turn", 1)
            store.set(f"outcome {turn}", json.dumps(missing))

    def _cut_off(self, words: c10d.Store, ranks: Sequence[int], started: int) -> dict[int, str]:
        """Those of `ranks` that stand in a collective which this rank has not started, and where."""
        found = {}
        for rank in ranks:
            word = words.get(f"waits {rank}").decode() if _has(words, f"waits {rank}") else "0"
            number, _, place = word.partition(" ")
            if int(number) > started:
                found[rank] = place
        return found

    @contextmanager
    def blocked(self, place: Place, number: int) -> Iterator[None]:
        """Inside, this rank waits in the group's collective number `number`; see [Note: meeting].

        The store is asked from a thread of its own: it may be gone, or hang, and the collective must not wait for it.
        """
        over = threading.Event()

        def look() -> None:
            left = False
            with suppress(RuntimeError):
                words = self.store("lost")
                while not over.wait(LOOK_S):
                    if not left and _has(words, "asking") and words.add("asking", 0) > 0:
                        words.set(f"waits {self._dp_rank}", f"{number} {place}")
                        left = True
                if left:
                    words.set(f"waits {self._dp_rank}", "0")

        threading.Thread(target=look, name="distmuon waits", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def any_report(self) -> bool:
        """A rank has failed, or the store cannot say."""
        try:
            return bool(self.store("lost").add("words", 0))
        except RuntimeError:
            return True

    def describe_failure(self, place: Place, error: RuntimeError, hang_up: Callable[[], None]) -> LostRanks:
        """The error of a rank whose collective at `place` failed with `error`; the first one's, where others follow."""
        if not self._lost:
            why = str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
            where = f"{self.named([self._dp_rank])} at {place}"
            try:
                words, standing = self._exchange(FailureReport(at=str(place)), hang_up)
                self._lost = str(self._finding(where, str(place), why, words, standing))
            except (RuntimeError, TimeoutError, ValueError) as silence:
                answer = str(silence).partition("\n")[0]
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
        """This rank goes down with `error` of its own: all others shall say so. Waits until they have failed, too."""
        with suppress(RuntimeError, TimeoutError, ValueError):  # nobody can be told then
            self._exchange(FailureReport(raised=f"{type(error).__name__}: {error}"), hang_up)

    def _exchange(
        self, own: FailureReport, hang_up: Callable[[], None]
    ) -> tuple[dict[int, FailureReport], dict[int, str]]:
        """Leave `own` and hang up; then the others' words, and where ranks without a word stand, if that is known."""
        told, answers = threading.Event(), list[tuple[dict[int, FailureReport], dict[int, str]] | Exception]()

        def ask() -> None:
            try:
                store = self.store("lost")
                if not store.check([f"rank {self._dp_rank}"]):  # the first word counts: later errors follow from it
                    store.set(f"rank {self._dp_rank}", json.dumps(asdict(own)))
                    store.add("words", 1)
                told.set()
                answers.append(self._listen(store, to_all=bool(own.raised)))
            except Exception as error:
                answers.append(error)
                told.set()

        thread = threading.Thread(target=ask, name="roll call", daemon=True)
        thread.start()
        told.wait(STORE_S)
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
            del answer  # an error's traceback holds this frame

    def _listen(self, store: c10d.Store, to_all: bool) -> tuple[dict[int, FailureReport], dict[int, str]]:
        """Until all have spoken, or (not `to_all`) one has raised, or the grace is over."""
        others, words = [rank for rank in range(self._dp_size) if rank != self._dp_rank], dict[int, FailureReport]()
        heard, deadline = 0, time.monotonic() + GRACE_S
        while len(words) < len(others) and (to_all or not any(word.raised for word in words.values())):
            if heard != (heard := store.add("words", 0)):
                known = [rank for rank in others if rank not in words and store.check([f"rank {rank}"])]
                words.update((rank, FailureReport(**json.loads(store.get(f"rank {rank}")))) for rank in known)
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.05)
        silent = [rank for rank in others if rank not in words and store.check([f"stands {rank}"])]
        return words, {rank: at for rank in silent if (at := store.get(f"stands {rank}").decode())}

    def _finding(
        self, where: str, place: str, why: str, words: dict[int, FailureReport], standing: dict[int, str]
    ) -> ValueError:
        raised = [rank for rank, word in words.items() if word.raised]
        if raised:
            found = "; ".join(f"{self.named([rank])} raised {words[rank].raised}" for rank in sorted(raised))
            remedy = f"see the traceback of {self.named(raised)}"
            return problem(where, found=found, needed="all ranks must go on for one to go on", cure=remedy)
        missing = [r for r in range(self._dp_size) if r not in (self._dp_rank, *words, *standing)]
        at = {**{rank: word.at for rank, word in words.items()}, **standing}
        elsewhere = {p: [r for r in sorted(at) if at[r] == p] for p in at.values()}
        here = elsewhere.pop(place, [])
        findings = [f"{self.named(missing)} missing, without a word for {GRACE_S:g} s"] if missing else []
        findings += [f"{self.named(ranks)} stood at {p}" for p, ranks in elsewhere.items()]
        findings += [f"{self.named(here)} waited here, too"] if here else []
        if missing:
            remedy = f"see the output and the machine of {self.named(missing)}: it hangs, has died or is cut off"
        elif elsewhere:
            remedy = "let all ranks take the same steps, and call what is collective (state_dict, a save) on all"
        else:
            findings += ["none is missing, so one was late or a connection broke"]
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
        """Ranks of this group, and where they differ those that the launcher knows."""
        pg = self._process_group
        of_world = list(ranks) if pg is None else [dist.get_process_group_ranks(pg)[rank] for rank in ranks]
        text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"
        if of_world == list(ranks):
            return text
        return f"{text} (of all processes: {of_world[0] if len(ranks) == 1 else of_world})"


def _has(store: c10d.Store, key: str) -> bool:
    return bool(store.check([key]))


def _came(store: c10d.Store, rank: int, turn: int) -> bool:
    return _has(store, f"rank {rank}") and store.get(f"rank {rank}").decode() == str(turn)


def _appeared(store: c10d.Store, key: str, seconds: float) -> bool:
    """Whether `key` is there within `seconds`. A store that is gone answers no."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except RuntimeError:  # a DistStoreError, or a plain one from a FileStore
        return False
    return True
