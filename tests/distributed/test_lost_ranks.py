"""Ranks that hang, die, raise, or go another way: the others are told which one, where, and what to do, and soon.

Most run in the pool, each in a group of its own with a time limit of seconds: a group that has lost a rank is broken.
Ranks of the group that wait fail with `LostRanks`; the pool's own groups are left alone. What needs processes that die
has processes of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

import distmuon
from distmuon.comm import group as collectives
from distmuon.comm import lost_ranks as roll_call
from distmuon.math.newton_schulz import processor_of
from tests.standing import Standing, make_batch
from tests.training import Weights, backward, digest, make, train, weights

ROOT = Path(__file__).parents[2]
LIMIT_S = 2.0  # of a group that is about to lose a rank
GRACE_S = 1.5


def _own_group(ranks: list[int]) -> dist.ProcessGroup:
    """Of `ranks` of the pool, all of whose workers must call this."""
    return dist.new_group(ranks, timeout=timedelta(seconds=60))


def _limit(own: dist.ProcessGroup) -> None:
    """From here on, so that a slow start is no fault."""
    c10d._set_pg_timeout(timedelta(seconds=LIMIT_S), own)


def _told(
    group: dist.ProcessGroup, act: Callable[[dist.ProcessGroup, int], None], ranks: tuple[int, ...] = (0, 1, 2)
) -> tuple[str, str, float]:
    """What `act(own group, rank in it)` raised: (message, that of its cause), and after how many seconds."""
    roll_call.GRACE_S, own, start = GRACE_S, _own_group(list(ranks)), time.monotonic()
    try:
        if dist.get_rank() in ranks:
            act(own, dist.get_rank(own))
    except Exception as error:
        return f"{type(error).__name__}: {error}", str(error.__cause__), time.monotonic() - start
    finally:
        dist.barrier(group)  # the pool's group is sound, and nobody goes on while another still waits
    return "", "", time.monotonic() - start


# --------------------------------------------------------------------------------------------- a rank that is missing


def _late_to(stage: str) -> Callable[[dist.ProcessGroup, int], None]:
    """Training in which the last rank sleeps before `stage` of the second step, longer than the others wait."""

    def act(own: dist.ProcessGroup, rank: int) -> None:
        model, optimizer = make(own, overlap="forward")  # all-gathers after the exchanges: one place to stand
        late = rank == dist.get_world_size(own) - 1
        train(own, model, optimizer, [0])
        _limit(own)
        if stage == "reduce_scatter" and late:
            time.sleep(LIMIT_S + 3)
        backward(model, optimizer, [make_batch(1, rank)])
        if stage != "reduce_scatter" and late:
            optimizer._engine.source.finish()
            plain = getattr(collectives.DataParallelGroup, f"start_{stage}")

            def late_start(*args: Any, **kwargs: Any) -> Any:
                delattr(optimizer.group, f"start_{stage}")  # once
                time.sleep(LIMIT_S + 3)
                return plain(*args, **kwargs)

            setattr(optimizer.group, f"start_{stage}", late_start.__get__(optimizer.group))
        optimizer.step()
        optimizer.synchronize()

    return act


def _late(group: dist.ProcessGroup, stage: str) -> tuple[str, str, float]:
    return _told(group, _late_to(stage))


def _check_late(results: list[tuple[str, str, float]], place: str) -> None:
    """Ranks 0 and 1 name rank 2 while it sleeps; it is told, when it comes too late, that they were there."""
    missing = "rank 2 missing, no report within 1.5 s, "
    for rank, (message, cause, seconds) in enumerate(results[:2]):
        assert re.match(rf"LostRanks: rank {rank} at {place}, step 2: {missing}", message), message
        assert "see the output and the machine of rank 2: it hangs, has died or is cut off" in message
        assert re.search("Timed out|Connection closed|timeout", cause), cause
        assert seconds < LIMIT_S + 3 + 5
    late, _, _ = results[2]
    assert re.match(r"LostRanks: rank 2 at .+ step 2: .*(waited here too|stood at)", late), late
    assert "rank 2 missing" not in late


@pytest.mark.promise(
    "Ranks that are lost",
    "A rank that does not come to a collective within the group's timeout is named, with stage, "
    "bucket, its first parameters and the step",
)
@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("reduce_scatter", r"reduce_scatter of bucket 0 \(\w+\.\w+, \w+\.\w+, .+ and \d+ more\)"),
        ("all_gather", r"all_gather of bucket \d+ \(.+\)"),
    ],
)
def test_a_rank_that_does_not_come_is_named_with_bucket_and_parameters(spawn, stage: str, place: str) -> None:
    _check_late(spawn(_late, 4, stage=stage, timeout=120), place)


@pytest.mark.promise(
    "Ranks that are lost",
    "A rank that does not come to a collective within the group's timeout is named, with stage, "
    "bucket, its first parameters and the step",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "place"), [("all_reduce", "guard"), ("all_to_all", r"(dp_gather|scatter) of bucket \d+ \(.+\)")]
)
def test_the_guard_and_the_exchange_name_who_is_missing(spawn, stage: str, place: str) -> None:
    _check_late(spawn(_late, 4, stage=stage, timeout=120), place)


def _late_to_the_exchange(group: dist.ProcessGroup) -> tuple[str, str, float]:
    exchange_group = _own_group([0, 1, 2])

    def act(own: dist.ProcessGroup, rank: int) -> None:
        """The last rank raises before it sends pieces on the second group: its word is left in the first one's roll."""
        model, optimizer = make(own, exchange_group=exchange_group)
        if rank == 2:
            optimizer._exchange_group.start_all_to_all = None
        _limit(exchange_group)
        with distmuon.shared_fate(own):
            train(own, model, optimizer, [0])

    return _told(group, act)


@pytest.mark.promise(
    "Ranks that are lost",
    "Inside `with distmuon.shared_fate():` an exception on one rank, in the data, the forward or "
    "anywhere, ends the other ranks at once. Each quotes it, also if the process that raised lives on",
)
def test_both_groups_of_an_optimizer_share_one_roll(spawn) -> None:
    for rank, (message, *_) in enumerate(spawn(_late_to_the_exchange, 4)[:2]):
        assert re.match(rf"LostRanks: rank {rank} at dp_gather of bucket \d+ .+: rank 2 raised TypeError: ", message)


def _subgroup(group: dist.ProcessGroup) -> tuple[str, str, float]:
    def act(own: dist.ProcessGroup, rank: int) -> None:
        _limit(own)
        if rank == 0:
            distmuon.verify_parameters(*make(own))

    return _told(group, act, (2, 3))


def test_in_a_subgroup_the_launchers_ranks_are_named_as_well(spawn) -> None:
    message = spawn(_subgroup, 4)[2][0]
    place = r"rank 0 \(of all processes: 2\) at comparison of the plans, step 1"
    assert re.match(rf"LostRanks: {place}: rank 1 \(of all processes: 3\) missing", message), message


# ----------------------------------------------------------------------------------------- a rank that went another way


def _elsewhere(group: dist.ProcessGroup, call: str) -> tuple[str, str, float]:
    def act(own: dist.ProcessGroup, rank: int) -> None:
        model, optimizer = make(own)
        train(own, model, optimizer, [0])
        optimizer.synchronize()
        _limit(own)
        if rank == 2 and call == "state_dict":
            optimizer.state_dict()
        elif rank == 2:
            distmuon.verify_parameters(model, optimizer)
        else:
            train(own, model, optimizer, [1])

    return _told(group, act)


@pytest.mark.promise(
    "Ranks that are lost",
    "Ranks that came to different collectives (`state_dict` on one rank while others step) are told where each stood",
)
@pytest.mark.parametrize("call", ["state_dict", "verify_parameters"])
def test_ranks_at_different_collectives_are_told_where_the_others_stood(spawn, call: str) -> None:
    """`state_dict` waits in the store, `verify_parameters` in a collective of another kind."""
    results = spawn(_elsewhere, 4, call=call)
    stage = {"state_dict": "state_dict", "verify_parameters": "reductions under way"}[call]
    step, state = r"reduce_scatter of bucket 0 \(.+\), step 2", f"{stage}, step 2"
    for rank, (message, *_) in enumerate(results[:2]):
        assert re.match(rf"LostRanks: rank {rank} at {step}: rank 2 stood at {state}, .*waited here too", message), (
            message
        )
        assert "let all ranks take the same steps, and make collective calls" in message
    message, _, seconds = results[2]
    assert re.match(rf"LostRanks: rank 2 at {state}: ranks \[0, 1\] stood at {step}", message), message
    assert seconds < 20


# ------------------------------------------------------------------------------------------------- a rank that raises


def _raises(group: dist.ProcessGroup, told: bool) -> tuple[tuple[str, str, float], str]:
    """The last rank raises in its own code, and its process lives on, as in a notebook."""
    again = []

    def act(own: dist.ProcessGroup, rank: int) -> None:
        model, optimizer = make(own)
        train(own, model, optimizer, [0])
        optimizer.synchronize()
        dist.barrier(own)  # or else the others might still wait for this step's all-gather
        if not told:
            _limit(own)
        try:
            with distmuon.shared_fate(own) if told else contextlib.nullcontext():
                if rank == 2:
                    raise KeyError("no such batch")
                train(own, model, optimizer, [1])
        except distmuon.LostRanks:
            with pytest.raises(distmuon.LostRanks) as second:
                optimizer.zero_grad()
            again.append(str(second.value))
            raise

    return _told(group, act), "".join(again)


@pytest.mark.promise(
    "Ranks that are lost",
    "Inside `with distmuon.shared_fate():` an exception on one rank, in the data, the forward or "
    "anywhere, ends the other ranks at once. Each quotes it, also if the process that raised lives on",
)
def test_what_one_rank_raises_ends_the_others_with_its_message(spawn) -> None:
    """At once: the group's limit is a minute, and the rank's process lives on. What fails later says the same."""
    results = spawn(_raises, 4, told=True)
    for rank, ((message, _, seconds), again) in enumerate(results[:2]):
        assert message.startswith(f"LostRanks: rank {rank} at reduce_scatter of bucket 0 (")
        assert "step 2: rank 2 raised KeyError: 'no such batch'; training needs all ranks" in message
        assert seconds < 30 and message == f"LostRanks: {again}"
    assert results[2][0][0] == "KeyError: 'no such batch'"


@pytest.mark.promise(
    "Ranks that are lost",
    "Without `shared_fate` a rank that raised and lives on is named as missing at the group's timeout",
)
@pytest.mark.slow
def test_a_rank_that_raises_without_a_word_is_missing_at_the_time_limit(spawn) -> None:
    results = spawn(_raises, 4, told=False)
    for (message, *_), again in results[:2]:
        assert "rank 2 missing, no report within 1.5 s" in message and message == f"LostRanks: {again}"


def _undisturbed(group: dist.ProcessGroup) -> tuple[int, int]:
    """Keys in the store before and after steps that go well, inside `shared_fate`."""
    with distmuon.shared_fate(group):
        model, optimizer = make(group)
        train(group, model, optimizer, [0])
        dist.barrier(group)
        before = c10d._get_default_store().num_keys()
        dist.barrier(group)
        train(group, model, optimizer, [1, 2])
        optimizer.synchronize()
        return before, c10d._get_default_store().num_keys()


@pytest.mark.promise("Ranks that are lost", "While all ranks are well, none of these messages is written or read")
def test_nothing_is_written_while_all_goes_well(spawn) -> None:
    assert {before == after > 0 for before, after in spawn(_undisturbed, 3)} == {True}


def test_alone_an_error_goes_on_its_way() -> None:
    with pytest.raises(OSError, match="disk"), distmuon.shared_fate():
        raise OSError("disk")


# ------------------------------------------------------------------------------------------------- processes that end


def _environment(**more: str) -> dict[str, str]:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    given = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": loopback}
    return {**os.environ, **given, **more}


def _under_torchrun(*arguments: str, num_ranks: int) -> tuple[str, int, float]:
    """Output, exit status, and seconds from the fault to the end of torchrun and all its processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    found = subprocess.run(
        [*command, "-m", "tests.distributed.lost_run", *arguments],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    fault = re.search(r"fault at ([\d.]+)", found.stdout)
    assert fault is not None, found.stdout
    return found.stdout, found.returncode, time.time() - float(fault[1])


@pytest.mark.slow
@pytest.mark.promise(
    "Ranks that are lost",
    "Under torchrun all processes are then gone within 30 s, with a status that is not 0 (7.0 s and "
    "12.5 s measured with a load of 20 on 2 cores, of which a Python process took 6 s to end)",
)
def test_under_torchrun_an_exception_ends_all_with_its_message_in_30_s() -> None:
    output, status, seconds = _under_torchrun("raise", num_ranks=2)
    assert "ValueError: no batch 3 in the data" in output
    assert re.search(
        r"LostRanks: rank 0 at reduce_scatter of .+ step 3: rank 1 raised ValueError: no batch 3", output
    ), output
    assert status != 0 and seconds < 30
    assert "terminate called" not in output
    print(f"torchrun was gone {seconds:.1f} s after the exception")


@pytest.mark.promise(
    "Ranks that are lost",
    "Without `shared_fate` torchrun ends the other ranks; the exception of the rank that raised, or "
    "that it was killed, stands in its output and torchrun's report",
)
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_under_torchrun_a_plain_loop_ends_too(fault: str) -> None:
    """Without `shared_fate` torchrun ends the others; who failed stands in its own report and in that rank's output."""
    output, status, seconds = _under_torchrun(fault, "--plain", num_ranks=3)
    assert status != 0 and seconds < 30 and re.search(r"rank +: 2 ", output), output
    assert ("ValueError: no batch 3" in output) == (fault == "raise")
    print(f"torchrun was gone {seconds:.1f} s after the {fault}")


def _processes(fault: str, *flags: str) -> list[tuple[int, str]]:
    """(exit status, output) of three ranks that nobody watches over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.lost_run", fault, *flags],
            cwd=ROOT,
            env=_environment(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        watched = ranks[1:] if fault == "stop-0" else ranks  # rank 0 stays stopped
        outputs = [process.communicate(timeout=240)[0] for process in watched]
        return [(process.returncode, output) for process, output in zip(watched, outputs, strict=True)]
    finally:
        for process in ranks:
            process.kill()
            with process:
                pass


MISSING = "rank 2 missing, no report within 5 s"
RAISED = "rank 2 raised ValueError: no batch 3 in the data"
NO_STORE = "and the group's store cannot say which rank is missing"


@pytest.mark.promise(
    "Ranks that are lost",
    "No process aborts while it leaves, whatever ended the others: an exception, SIGKILL, or the "
    "store's host dead or stopped (then the error says that the store cannot answer)",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "statuses", "message"),
    [
        (("raise",), [1, 1, 1], RAISED),
        (("raise", "--plain"), [1, 1, 1], MISSING),
        (("linger",), [1, 1, 1], RAISED),
        (("linger", "--plain"), [1, 1, 1], MISSING),
        (("kill",), [1, 1, -signal.SIGKILL], MISSING),
        (("kill-0",), [-signal.SIGKILL, 1, 1], NO_STORE),
        (("stop-0",), [1, 1], NO_STORE),
    ],
    ids=["raise", "raise plain", "linger", "linger plain", "kill", "kill 0", "stop 0"],
)
def test_every_process_leaves_in_order(arguments: tuple[str, ...], statuses: list[int], message: str) -> None:
    """By an exception that names what happened, never by an abort while it leaves."""
    found = _processes(*arguments)
    assert [status for status, _ in found] == statuses, found
    told = [output for status, output in found if "LostRanks: rank" in output]
    assert len(told) == 2 and all(message in output for output in told), found
    assert not any("terminate called" in output for _, output in found), found


# ------------------------------------------------------------------------------------------------------ verify_every


def _flip(tensor: torch.Tensor, element: int, bit: int) -> None:
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor.detach().reshape(-1).view(integers)[element] ^= 1 << bit


def _flipped(group: dist.ProcessGroup, fqn: str, rank: int, options: dict[str, Any]) -> None:
    """Steps 1 to 3, a flip in what the forward of step 4 uses, and step 4, which compares."""
    model, optimizer = make(group, verify_every=4, **options)
    train(group, model, optimizer, range(3))
    optimizer.synchronize()
    if dist.get_rank(group) == rank:
        _flip(model.get_parameter(fqn).data, 3, 0)
    train(group, model, optimizer, [3])


@pytest.mark.promise(
    "Faults while training",
    "`verify_every=n` (the recipe's `train.verify_every`) finds the flipped bit by itself, before the"
    " step of that count writes; frozen parameters too",
)
@pytest.mark.parametrize(
    ("fqn", "rank", "options"),
    [
        ("up.weight", 2, {}),  # a straddler
        ("up.weight", 0, {"overlap": "forward"}),
        ("embed.weight", 1, {"param_gather": "updates"}),
        ("frozen.weight", 0, {}),
    ],
)
def test_verify_every_finds_one_flipped_bit_before_the_step_writes(spawn_raises, fqn, rank, options) -> None:
    others = [r for r in range(3) if r != rank]
    match = (
        rf"{re.escape(fqn)}: its bits on ranks \[{rank}\] are not those on ranks {re.escape(str(others))} \(1 of \d+"
    )
    spawn_raises(_flipped, 3, fqn=fqn, rank=rank, options=options, match=match)


def _flipped_masters(group: dist.ProcessGroup, bits: list[int | None]) -> list[Weights]:
    """The weights after four steps, each time with one bit of one of rank 0's float32 masters flipped after two."""
    ends = []
    for bit in bits:
        model, optimizer = make(group, Standing().bfloat16(), verify_every=1)
        train(group, model, optimizer, [0, 1])
        optimizer.synchronize()
        bucket = next(b for b in optimizer._engine.storage.buckets if b.muon)
        if bit is not None and dist.get_rank(group) == 0:
            _flip(bucket.master_of(bucket.muon[0]), 3, bit)
        train(group, model, optimizer, [2, 3])
        ends.append(weights(model, optimizer))
    return ends


@pytest.mark.promise(
    "Faults while training",
    "A flipped bit of a float32 master beside a bfloat16 parameter is taken back from the parameter, "
    "or is smaller than its rounding; ranks stay bit-equal",
)
def test_a_flipped_bit_of_a_master_is_taken_back_from_its_parameter(spawn) -> None:
    """A master stands on one rank, so nobody can compare it. One that no longer rounds to its parameter is made from
    that anew; one that does is off by less than bfloat16's rounding. All ranks go on with the same bits."""
    by_rank = spawn(_flipped_masters, 2, bits=[None, 3, 15, 20, 29])
    assert [digest(end) for end in by_rank[0]] == [digest(end) for end in by_rank[1]]
    plain, *flipped = by_rank[0]
    for end in flipped:
        for fqn, weight in end.items():
            off = (weight.float() - plain[fqn].float()).abs() / plain[fqn].float().abs().clamp(min=1e-3)
            # One unit in bfloat16's last place; where torch's own loops multiply, the next gradients add some. A bit 20
            # that stayed flipped would be 16 units.
            in_loops = processor_of(torch.device("cpu")) == "no_bfloat16"
            assert off.max() <= (2**-5 if in_loops else 2**-7), fqn


def _cost(group: dist.ProcessGroup) -> tuple[dict[str, Any], dict[str, Any], int]:
    model, optimizer = make(group, verify_every=2)
    train(group, model, optimizer, [0])
    first = optimizer.metrics()
    train(group, model, optimizer, [1])
    return first, optimizer.metrics(), len(list(model.parameters()))


def test_verify_every_costs_one_all_gather_of_16_bytes_a_tensor_at_its_steps(spawn) -> None:
    for first, second, num_tensors in spawn(_cost, 3):
        assert "verify" not in first["bytes"]
        print(
            {"verify_ms": second["stage_ms"]["verify"], "all stages of step 2 in ms": sum(second["stage_ms"].values())}
        )
        assert second["bytes"]["verify"] == 2 * 16 * num_tensors and second["calls"]["verify"] == 1


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None])
def test_verify_every_is_a_number_of_steps(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"verify_every: found .+; a number of steps is needed; pass 0"):
        distmuon.DistMuon(torch.nn.Linear(3, 3), verify_every=wrong)
