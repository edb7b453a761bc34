"""What the GPU tests run on each rank. They run on CPUs and gloo as well, so that they are free of slips.

A body gets a process group and this rank's device, checks its promise, and returns what must be equal on all ranks.
Rank 0 compares with the oracle, on its own device: both then multiply in float32 with the same kernels.
"""

from __future__ import annotations

import copy
import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.checkpoint import checkpoint

import distmuon
from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.math import fused
from distmuon.math.newton_schulz import orthogonalize
from tests.distributed.test_fsdp2 import LAYER_ROUTES, Layers
from tests.distributed.test_fsdp2 import _rows as rows_of_step
from tests.gpu.world import no_host_wait
from tests.standing import Batch, Standing, loss_fn, make_batch
from tests.training import (
    REL_UPDATE,
    REL_WEIGHTS,
    Weights,
    assert_equals_reference,
    backward,
    digest,
    errors,
    hand_gradients,
    make,
    mean_hand_gradients,
    reference,
    state_tensors,
    weights,
)

STEPS = range(5)
WAYS = list(itertools.product(("balanced", "contiguous"), ("owner", "replicated"), (True, False)))


def put(batch: Batch, device: torch.device) -> Batch:
    moved = [t.to(device) for t in (batch.tokens, batch.targets, batch.values)]
    return Batch(*moved, batch.image.to(device) if batch.image is not None else None)


def batches(step: int, rank: int, device: torch.device, num_micro: int = 1) -> list[Batch]:
    return [put(make_batch(step, rank, micro), device) for micro in range(num_micro)]


def on_cpu(tensors: dict[str, Tensor]) -> Weights:
    return {name: value.cpu() for name, value in tensors.items()}


def ends(model: nn.Module, optimizer: Any) -> Weights:
    return on_cpu(weights(model, optimizer))


def digests(model: nn.Module, optimizer: Any) -> tuple[str, str]:
    return digest(ends(model, optimizer)), digest(on_cpu(state_tensors(optimizer)))


def train(
    group: dist.ProcessGroup, device: torch.device, num_micro: int = 1, clip: float | None = None, **options: Any
) -> tuple[nn.Module, Any]:
    model, optimizer = make(group, Standing(seed=dist.get_rank(group)).to(device), **options)
    for step in STEPS:
        backward(model, optimizer, batches(step, dist.get_rank(group), device, num_micro))
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def oracle_of(group: dist.ProcessGroup, device: torch.device, num_micro: int = 1, **options: Any) -> Weights | None:
    """The oracle's weights after the same steps, on rank 0."""
    if dist.get_rank(group):
        return None
    oracle = reference(Standing().to(device), **options)
    for step in STEPS:
        of_ranks = [batches(step, rank, device, num_micro) for rank in range(dist.get_world_size(group))]
        oracle.step(loss_fn, of_ranks)
    return on_cpu(oracle.weights)


def check(group: dist.ProcessGroup, device: torch.device, got: Weights, num_micro: int = 1, **options: Any) -> None:
    """Compare with the oracle, on rank 0."""
    wanted = oracle_of(group, device, num_micro, **options)
    if wanted is not None:
        assert_equals_reference(got, wanted)


def parity(group: dist.ProcessGroup, device: torch.device, ways: int = len(WAYS)) -> list[str]:
    """Every packing and placement, overlapped or not, equals one process."""
    found, wanted = [], oracle_of(group, device)
    for packing, placement, overlap in WAYS[-ways:]:
        got = ends(*train(group, device, packing=packing, placement=placement, overlap=overlap))
        if wanted is not None:
            assert_equals_reference(got, wanted)
        found.append(digest(got))
    return found


def accumulation(group: dist.ProcessGroup, device: torch.device) -> str:
    got = ends(*train(group, device, num_micro=3))
    check(group, device, got, num_micro=3)
    return digest(got)


def clipping(group: dist.ProcessGroup, device: torch.device) -> str:
    got = ends(*train(group, device, clip=1.0))
    check(group, device, got, max_norm=1.0)
    return digest(got)


def hand_oracle(group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype = torch.float32) -> Weights:
    """The oracle's weights after the steps of `by_hand`."""
    model = Standing().to(dtype)
    oracle = reference(Standing().to(device, dtype))
    for step in STEPS:
        grads = mean_hand_gradients(model, step, dist.get_world_size(group))
        oracle.apply({fqn: grad.to(device) for fqn, grad in grads.items()})
    return on_cpu(oracle.weights)


def by_hand(
    group: dist.ProcessGroup, device: torch.device, steps: Sequence[int] = STEPS, **case: Any
) -> tuple[nn.Module, Any]:
    """Train on gradients made by hand: nothing in them varies from run to run, nor with the weights.

    From the third step on, a host synchronisation inside backward or `step` raises.
    """
    dtype = case.pop("dtype", torch.float32)
    streams = case.pop("streams", 1)
    if case.pop("own_exchange_group", False):
        case["exchange_group"] = dist.new_group()
    model, optimizer = make(group, Standing().to(device, dtype), **case)
    sides = [torch.cuda.Stream() for _ in range(streams - 1)] if device.type == "cuda" else []
    for step in steps:
        optimizer.synchronize()  # the weights are used outside a forward
        grads = {fqn: grad.to(device) for fqn, grad in hand_gradients(model, step, dist.get_rank(group)).items()}
        with no_host_wait(device, step >= 2):
            losses = [(model.get_parameter(fqn) * grad).sum() for fqn, grad in grads.items()]
            if sides:
                losses = list(_on_streams(model, grads, sides))
            torch.stack([loss.float() for loss in losses]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def _on_streams(model: nn.Module, grads: dict[str, Tensor], sides: Sequence[torch.cuda.Stream]) -> Iterator[Tensor]:
    """Each parameter's loss, by turns on the current stream and on `sides`; autograd goes back the same ways."""
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    main = torch.cuda.current_stream()
    for number, (fqn, grad) in enumerate(grads.items()):
        stream = [main, *sides][number % (len(sides) + 1)]
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            loss = (model.get_parameter(fqn) * grad).sum()
            grad.record_stream(stream)
        main.wait_stream(stream)
        loss.record_stream(main)
        yield loss


SAME_BITS: dict[str, dict[str, Any]] = {
    "default": {},
    "serial": {"overlap": False},
    "forward": {"overlap": "forward"},
    "released": {"release_grads": True},
    "updates": {"param_gather": "updates"},
    "exchange group": {"own_exchange_group": True},
    "all": {"overlap": "forward", "release_grads": True, "param_gather": "updates", "own_exchange_group": True},
    "two streams": {"streams": 2},
    "two streams, released": {"streams": 2, "release_grads": True},
}


def same_bits(group: dist.ProcessGroup, device: torch.device, cases: Sequence[str] = tuple(SAME_BITS)) -> Any:
    """Overlap, memory, traffic and a backward on two streams change no bit of weights and state."""
    found = {case: digests(*by_hand(group, device, ns_dtype=None, **SAME_BITS[case])) for case in cases}
    assert len(set(found.values())) == 1, found
    return found


@contextmanager
def _disturbed(device: torch.device, seed: int) -> Iterator[None]:
    """In the block, streams sleep before each verb and after each wait, and other tensors of NaN come and go."""
    draw = random.Random(seed)
    pending, wait = DataParallelGroup._pending, Pending.wait
    kept: list[Tensor] = []

    def disturb() -> None:
        if device.type == "cuda":
            torch.cuda._sleep(draw.randrange(1, 400_000))  # cycles: up to about 0.2 ms
        else:
            time.sleep(draw.random() * 1e-4)
        kept.append(torch.full((draw.randrange(1, 1 << 16),), torch.nan, device=device))
        del kept[: draw.randrange(3)]

    def disturbed_pending(self: Any, *args: Any) -> Pending:
        disturb()
        return pending(self, *args)

    def disturbed_wait(self: Pending) -> Tensor:
        result = wait(self)
        disturb()
        return result

    verbs = {
        name: getattr(DataParallelGroup, name)
        for name in ("start_reduce_scatter", "start_all_gather", "start_all_to_all", "start_all_reduce")
    }

    def late(verb: Callable[..., Pending]) -> Callable[..., Pending]:
        def run(*args: Any, **kwargs: Any) -> Pending:
            disturb()
            return verb(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataParallelGroup, "_pending", disturbed_pending)
        patch.setattr(Pending, "wait", disturbed_wait)
        for name, verb in verbs.items():
            patch.setattr(DataParallelGroup, name, late(verb))
        yield


def disturbed(
    group: dist.ProcessGroup,
    device: torch.device,
    cases: Sequence[str] = tuple(SAME_BITS),
    seeds: Sequence[int] = (1, 2),
) -> Any:
    """With sleeping streams and a busy allocator, too, no option changes a bit of the undisturbed, serial run."""
    serial = digests(*by_hand(group, device, ns_dtype=None, **SAME_BITS["serial"]))
    for case, seed in itertools.product(cases, seeds):
        with _disturbed(device, seed + dist.get_rank(group)):
            found = digests(*by_hand(group, device, ns_dtype=None, **SAME_BITS[case]))
        assert found == serial, (case, seed)
    return serial


def masters(group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """bfloat16 parameters: float32 masters equal one process, and a parameter is its master, rounded once.

    Remainder masters are the same numbers, except that a parameter may be the other neighbour of an exact half.
    """
    found, wanted = [], hand_oracle(group, device, torch.bfloat16)
    start = {fqn: value.float() for fqn, value in Standing().bfloat16().state_dict().items()}
    for form in ("float32", "remainder"):
        model, optimizer = by_hand(group, device, dtype=torch.bfloat16, master_format=form)
        state = on_cpu(state_tensors(optimizer))
        held = {name.removesuffix(".master"): value for name, value in state.items() if name.endswith(".master")}
        assert_equals_reference({fqn: held[fqn] for fqn in wanted}, wanted, start)
        if form == "float32":
            assert all(torch.equal(v, held[fqn].bfloat16()) for fqn, v in ends(model, optimizer).items() if fqn in held)
        found.append(digest(held))
    assert len(set(found)) == 1
    return found


def short_reduction(group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """16-bit reduction and 16- or 8-bit momentum stay within their bands of the update (docs/options.md)."""
    found, wanted = [], hand_oracle(group, device)
    for options, band in (
        ({"reduce_dtype": torch.bfloat16}, 0.003),
        ({"reduce_dtype": torch.bfloat16, "release_grads": True}, 0.003),
        ({"momentum_dtype": torch.bfloat16}, 0.004),
        ({"momentum_dtype": torch.int8}, 0.02),
    ):
        got = ends(*by_hand(group, device, **options))
        worst = errors(got, wanted, Standing().state_dict())[1]
        # a single rank reduces nothing
        least = 0.0 if dist.get_world_size(group) == 1 and "reduce_dtype" in options else REL_UPDATE
        assert least <= worst[0] <= band, (options, worst)
        found.append(digest(got))
    return found


def scaled(group: dist.ProcessGroup, device: torch.device) -> Any:
    """A GradScaler changes no number; an overflow on one rank is skipped by all, and the scale halves."""
    model, optimizer = make(group, Standing().to(device))
    scaler = distmuon.GradScaler(device.type, init_scale=256.0)
    for step in STEPS:
        before = digests(model, optimizer) if step == 2 else None
        for batch in batches(step, dist.get_rank(group), device):
            broken = step == 2 and dist.get_rank(group) == dist.get_world_size(group) - 1
            scaler.scale(loss_fn(model, batch) * (torch.inf if broken else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert before is None or before == digests(model, optimizer)
    assert scaler.get_scale() == 128.0
    if dist.get_rank(group) == 0:
        oracle = reference(Standing().to(device))
        for step in STEPS:
            if step != 2:
                size = dist.get_world_size(group)
                oracle.step(loss_fn, [batches(step, rank, device) for rank in range(size)])
        assert_equals_reference(ends(model, optimizer), on_cpu(oracle.weights))
    return digests(model, optimizer) if dist.get_rank(group) >= 0 else None


def skipped(group: dist.ProcessGroup, device: torch.device) -> Any:
    """A non-finite gradient on one rank leaves every bit on all ranks, and the next step is taken."""
    model, optimizer = make(group, Standing().to(device))
    for step in range(3):
        before = digests(model, optimizer)
        loss = loss_fn(model, batches(step, dist.get_rank(group), device)[0])
        (loss * (torch.inf if step == 1 and dist.get_rank(group) == 0 else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (digests(model, optimizer) == before) == (step == 1)
    assert optimizer.metrics()["skipped_steps"] == 1
    return digests(model, optimizer)


def missing(group: dist.ProcessGroup, device: torch.device) -> str:
    """A gradient that is missing on one rank counts as zeros; missing on all, its parameter is left alone."""
    size, mine = dist.get_world_size(group), dist.get_rank(group)

    def data(step: int, rank: int) -> Batch:
        has_image = step != 3 and not (step == 1 and rank == size - 1)
        return put(make_batch(step, rank, 0, image=has_image), device)

    model, optimizer = make(group, Standing().to(device))
    for step in STEPS:
        loss_fn(model, data(step, mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
    got = ends(model, optimizer)
    if mine == 0:
        oracle = reference(Standing().to(device))
        for step in STEPS:
            oracle.step(loss_fn, [[data(step, rank)] for rank in range(size)])
        assert_equals_reference(got, on_cpu(oracle.weights))
    return digest(got)


def external(group: dist.ProcessGroup, device: torch.device) -> str:
    """DDP averages the gradients, and DistMuon takes them as they are."""
    model = Standing().to(device)
    wrapped = DistributedDataParallel(
        model,
        process_group=group,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=False,
    )
    _, optimizer = make(group, wrapped, grad_reduction="external")
    for step in STEPS:
        loss_fn(wrapped, batches(step, dist.get_rank(group), device)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    got = ends(model, optimizer)
    check(group, device, got)
    return digest(got)


def saved(group: dist.ProcessGroup, device: torch.device, folder: str) -> Any:
    """A run that is saved, synchronously and not, and goes on in a new optimizer, ends with the same bits."""
    model, optimizer = by_hand(group, device, ns_dtype=None)
    for number, asynchronous in enumerate((False, True)):
        distmuon.save_checkpoint(Path(folder, str(number)), model, optimizer, asynchronous=asynchronous)
        _more(model, optimizer, group, device)  # the parts that are being saved must not change with it
        distmuon.finish_saves(optimizer)
        again, restored = make(group, Standing(seed=7).to(device), ns_dtype=None)
        distmuon.load_checkpoint(Path(folder, str(number)), again, restored)
        _more(again, restored, group, device)
        assert digests(model, optimizer) == digests(again, restored)
    plain = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    restored.load_state_dict(plain)
    assert digests(model, optimizer) == digests(again, restored)
    return digests(model, optimizer)


def _more(model: nn.Module, optimizer: Any, group: dist.ProcessGroup, device: torch.device) -> None:
    optimizer.synchronize()
    grads = hand_gradients(model, 100, dist.get_rank(group)).items()
    torch.stack([(model.get_parameter(fqn) * grad.to(device)).sum() for fqn, grad in grads]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def another_current_device(group: dist.ProcessGroup, device: torch.device) -> str:
    """`state_dict` needs no current device; with one GPU it is the only device there is."""
    model, optimizer = train(group, device)
    elsewhere: Any = nullcontext()
    if device.type == "cuda":
        elsewhere = torch.cuda.device((device.index + 1) % torch.cuda.device_count())
    with elsewhere:
        state = model.state_dict()
        values = on_cpu({name: value for name, value in state.items()})
        storages = {value.untyped_storage().data_ptr() for value in state.values()}
        assert len(storages) == len(state) - 1, "all apart, but for the tied head"
        optimizer.state_dict()
    return digest(values)


def evaluated(group: dist.ProcessGroup, device: torch.device) -> Any:
    """An evaluation on a side stream, with parameters in flight, changes no bit of training."""
    found = []
    for has_evaluation in (False, True):
        model, optimizer = make(group, Standing().to(device), overlap="forward", ns_dtype=None)
        for step in STEPS:
            optimizer.synchronize()
            grads = hand_gradients(model, step, dist.get_rank(group)).items()
            torch.stack([(model.get_parameter(fqn) * grad.to(device)).sum() for fqn, grad in grads]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if has_evaluation:
                with beside(device), torch.no_grad():
                    loss_fn(model, batches(step, dist.get_rank(group), device)[0])
        found.append(digests(model, optimizer))
    assert found[0] == found[1]
    return found


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run the block on another stream, between two waits."""
    if device.type != "cuda":
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def compiled(group: dist.ProcessGroup, device: torch.device, backend: str = "aot_eager") -> str:
    """A compiled model equals one process; the waits of `overlap="forward"` break its graph, and no more."""
    import torch._dynamo

    torch._dynamo.reset()
    # dynamo looks at .grad of what a broken graph hands on; the pool makes errors of warnings
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    model, optimizer = make(group, Standing().to(device), overlap="forward")
    model.compile(backend=backend)
    for step in STEPS:
        loss_fn(model, batches(step, dist.get_rank(group), device)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    got = ends(model, optimizer)
    check(group, device, got)
    return digest(got)


def checkpointed(group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Activations that are computed again in backward, in both of torch's ways.

    The reentrant way gives the attention's weights two gradients, so it reduces in `step`.
    """
    found, wanted = [], oracle_of(group, device)
    for reentrant in (False, True):
        model, optimizer = make(group, Standing().to(device), overlap="forward" if not reentrant else False)
        plain: Callable[..., Tensor] = model.attention.forward
        model.attention.forward = lambda x, r=reentrant, f=plain: checkpoint(f, x, use_reentrant=r)
        for step in STEPS:
            loss_fn(model, batches(step, dist.get_rank(group), device)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        got = ends(model, optimizer)
        if wanted is not None:
            assert_equals_reference(got, wanted)
        found.append(digest(got))
    return found


def no_wait(group: dist.ProcessGroup, device: torch.device) -> int:
    """Whole iterations, forward included: from the third on a host synchronisation raises."""
    for options in ({}, {"overlap": "forward"}, {"max_grad_norm": 0.5, "release_grads": True}):
        model, optimizer = make(group, Standing().to(device), ns_dtype=None, **options)
        data = [batches(step, dist.get_rank(group), device, 2) for step in STEPS]
        zero = torch.zeros((), device=device)
        for step in STEPS:
            with no_host_wait(device, step >= 2):
                with optimizer.no_sync():
                    (loss_fn(model, data[step][0]) + zero).backward()
                (loss_fn(model, data[step][1]) + zero).backward()
                optimizer.step()
                optimizer.zero_grad()
    return int(optimizer.metrics()["steps"])


def moved(group: dist.ProcessGroup, device: torch.device) -> str:
    """Engines make the optimizer on the CPU and move the model afterwards, before its first use."""
    model, optimizer = make(group, Standing())
    model.to(device)
    for step in STEPS:
        loss_fn(model, batches(step, dist.get_rank(group), device)[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(weight.device == device for weight in weights(model, optimizer).values())
    check(group, device, ends(model, optimizer))
    return digest(ends(model, optimizer))


def verified(group: dist.ProcessGroup, device: torch.device) -> Any:
    """Ranks compare bits as they go, and telemetry measures; neither changes a bit."""
    found = [digests(*by_hand(group, device, **how)) for how in ({}, {"verify_every": 1})]
    assert found[0] == found[1]
    model, _ = train(group, device, telemetry_every=2)
    return found, digest(on_cpu(dict(model.named_parameters())))


def sharded(group: dist.ProcessGroup, device: torch.device) -> str:
    """FSDP2's shards, a layer a unit, end where ZeRO-1 ends."""
    found = []
    for has_shards in (False, True):
        model = Layers().to(device)
        if has_shards:
            mesh = DeviceMesh.from_group(group, device.type)
            for part in (*model.layers, model):
                fully_shard(part, mesh=mesh)
        optimizer = distmuon.DistMuon(
            model, lr=0.02, ns_dtype=torch.float32, routes=LAYER_ROUTES, process_group=None if has_shards else group
        )
        start = Layers().state_dict()
        for step in STEPS:
            model(rows_of_step(step, dist.get_rank(group)).to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
        held = {fqn: param.detach() for fqn, param in model.named_parameters()}
        found.append(on_cpu({fqn: p.full_tensor() if isinstance(p, DTensor) else p for fqn, p in held.items()}))
    of_weights, of_updates = errors(found[1], found[0], start)
    assert of_weights[0] <= 2 * REL_WEIGHTS and of_updates[0] <= 2 * REL_UPDATE, (of_weights, of_updates)
    return digest(found[1])


def newton_schulz(group: dist.ProcessGroup, device: torch.device, k: int = 1024) -> list[float]:
    """Matrices of full size: as near to float64 as torch.optim.Muon's iteration is, in the same dtype."""
    found = []
    for m, n in ((k, 4 * k), (4 * k, k), (k, k)):
        x = torch.randn(2, m, n, generator=torch.Generator().manual_seed(m + n)).to(device)
        exact = orthogonalize(x.double(), steps=5, coefficients="jordan", dtype=torch.float64)
        for dtype in (torch.bfloat16, torch.float32):
            got = orthogonalize(x, steps=5, coefficients="jordan", dtype=dtype).double()
            error = float((got - exact).norm() / exact.norm())
            peer = torch.stack([_zeropower_via_newtonschulz(one, (3.4445, -4.775, 2.0315), 5, 1e-7) for one in x])
            theirs = float((peer.double() - exact).norm() / exact.norm())
            assert error <= (1e-3 if dtype == torch.float32 else 1.5 * theirs), (m, n, dtype, error, theirs)
            found.append(error)
    return found


def kernels(group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Triton's kernels work on this GPU, and give the values of the plain forms."""
    assert fused.ready(device) == (device.type == "cuda")
    return fused.differing(device) if device.type == "cuda" else []


BODIES: dict[str, Callable[..., Any]] = {
    body.__name__: body
    for body in (
        parity,
        accumulation,
        clipping,
        same_bits,
        disturbed,
        masters,
        short_reduction,
        scaled,
        skipped,
        missing,
        external,
        saved,
        another_current_device,
        evaluated,
        compiled,
        checkpointed,
        no_wait,
        moved,
        verified,
        sharded,
        newton_schulz,
        kernels,
    )
}
