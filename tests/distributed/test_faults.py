"""Faults that users meet, planted one by one: what must raise does so on every rank, what must go on stays right."""

from __future__ import annotations

import itertools
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distmuon
from distmuon.integrations.ddp import silence
from tests.reference import Reference
from tests.standing import WIDTH, Batch, Standing, loss_fn, make_batch, make_batches
from tests.training import (
    EXACT,
    Weights,
    assert_equals_reference,
    backward,
    digest,
    make,
    reference,
    state_tensors,
    train,
    weights,
)

# ------------------------------------------------------------------------------------------- non-finite gradients


def _poisoned_step(group: dist.ProcessGroup, fqn: str, value: float, options: dict[str, Any]) -> dict[str, Any]:
    """Steps 0, 1 and 2; in step 1 one element of one gradient on the last rank is `value`."""
    model, optimizer = make(group, **options)
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    train(group, model, optimizer, [0])
    before = digest(weights(model, optimizer)), digest(state_tensors(optimizer))

    def poison(grad: Tensor) -> Tensor:
        return grad.index_fill(0, torch.tensor([grad.shape[0] - 1]), value)

    handle = model.get_parameter(fqn).register_hook(poison) if rank == last else None
    train(group, model, optimizer, [1])
    if handle is not None:
        handle.remove()
    after = digest(weights(model, optimizer)), digest(state_tensors(optimizer))
    skipped = optimizer.metrics()["skipped_steps"]
    train(group, model, optimizer, [2])
    return {
        "unchanged": before == after,
        "skipped": (skipped, optimizer.metrics()["skipped_steps"]),
        "weights": weights(model, optimizer),
    }


def _poisoned_steps(group: dist.ProcessGroup, cases: list[tuple[str, float, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [_poisoned_step(group, *case) for case in cases]


@pytest.mark.promise(
    "Faults while training",
    "A non-finite gradient on one rank: all ranks skip, and no bit of state changes, with the options"
    " that change no bit too",
)
@pytest.mark.promise("Planted faults", "infinite gradient on one rank, with each rank judging for itself (planted)")
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(spawn) -> None:
    """Parameters and state keep every bit, the step is counted, and the next one is what it would have been.

    Clipping once multiplied the padding, too, by a norm that was NaN: each later step was skipped.
    """
    places = ["up.weight", "embed.weight", "norm_in.bias", "experts_down"]  # straddler, sand, small sand, stack
    cases = [
        (fqn, value, options)
        for (fqn, value), options in itertools.product(
            [*zip(places, [torch.inf, torch.nan, -torch.inf, torch.inf], strict=True)],
            [{}, {"overlap": False}, {"max_grad_norm": 1e9}],
        )
    ]
    # A norm that is no number made the clip's coefficient one, and that the padding of the gradient buffers, for ever.
    cases.append(("embed.weight", torch.nan, {"max_grad_norm": 1e9}))
    oracle = reference()
    for step in (0, 2):
        oracle.step(loss_fn, make_batches(step, 3))
    by_rank = spawn(_poisoned_steps, 3, cases=cases)
    for number, case in enumerate(cases):
        for results in by_rank:
            assert results[number]["unchanged"], case
            assert results[number]["skipped"] == (1, 1), case
            assert_equals_reference(results[number]["weights"], oracle.weights)


# ------------------------------------------------------------------------------------------- missing gradients


def _train_on(
    group: dist.ProcessGroup, images: list[list[list[bool]]], **options: Any
) -> tuple[Weights, list[dict[str, Tensor]], dict[str, Any]]:
    """`images[step][rank][micro]`: whether there is an image. Returns weights, the picture's weights a step, state."""
    model, optimizer = make(group, **options)
    rank, pictures = dist.get_rank(group), []
    for step, of_rank in enumerate(images):
        micro_batches = [make_batch(step, rank, micro, image=image) for micro, image in enumerate(of_rank[rank])]
        backward(model, optimizer, micro_batches)
        optimizer.step()
        optimizer.zero_grad()
        ends = weights(model, optimizer)
        pictures.append({fqn: weight for fqn, weight in ends.items() if "picture" in fqn})
    return ends, pictures, state_tensors(optimizer)


PRESENCE = {
    "on rank 0 only": [[[True], [False], [False]]] * 2,
    "on the last rank only": [[[False], [False], [True]], [[True], [True], [True]]],
    "in the first micro-batch only": [[[True, False], [True, False], [False, False]]] * 2,
    "nowhere in the second step": [[[True], [True], [True]], [[False], [False], [False]], [[True], [True], [True]]],
    "nowhere at first": [[[False], [False], [False]], [[True], [False], [True]]],
}


@pytest.mark.promise("Planted faults", "no gradient on one rank, with each rank judging for itself (planted)")
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("where", PRESENCE)
def test_gradients_that_are_missing_somewhere(spawn, where: str, overlap: bool) -> None:
    """On some ranks: zeros there. On all: weight, momentum and step count are left alone. Nobody hangs."""
    images = PRESENCE[where]
    oracle = reference()
    wanted = []
    for step, of_ranks in enumerate(images):
        batches = [
            [make_batch(step, rank, micro, image=image) for micro, image in enumerate(micros)]
            for rank, micros in enumerate(of_ranks)
        ]
        oracle.step(loss_fn, batches)
        wanted.append({fqn: weight.clone() for fqn, weight in oracle.weights.items() if "picture" in fqn})
    start = {fqn: weight for fqn, weight in Standing().state_dict().items() if "picture" in fqn}
    for ends, pictures, state in spawn(_train_on, 3, images=images, overlap=overlap, timeout=10):
        assert_equals_reference(ends, oracle.weights)
        for step, of_ranks in enumerate(images):
            if not any(itertools.chain(*of_ranks)):
                before = pictures[step - 1] if step else start
                assert digest(before) == digest(pictures[step]), "left alone means every bit"
        taken = sum(any(itertools.chain(*of_ranks)) for of_ranks in images)
        assert state["picture.bias.step"] == taken and state["embed.weight.step"] == len(images)


def _freeze_midway(group: dist.ProcessGroup) -> Weights:
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    model.up.requires_grad_(False)
    train(group, model, optimizer, [1])
    return weights(model, optimizer)


def test_a_parameter_frozen_midway_is_left_alone(spawn) -> None:
    oracle = reference()
    oracle.step(loss_fn, make_batches(0, 2))
    held = {fqn: oracle.weights[fqn].clone() for fqn in ("up.weight", "up.bias")}
    grads = oracle.mean_gradients(loss_fn, make_batches(1, 2))
    # The pull of the loss leaves frozen weights out; on the others it does not depend on them.
    oracle.apply({fqn: grad for fqn, grad in grads.items() if fqn not in held})
    for ends in spawn(_freeze_midway, 2, timeout=10):
        assert_equals_reference(ends, oracle.weights)
        assert all(torch.equal(ends[fqn], held[fqn]) or (ends[fqn] - held[fqn]).norm() < 1e-6 for fqn in held)


# ------------------------------------------------------------------------------------------- ranks that disagree


class Shuffled(nn.Module):
    """The order in which its layers are registered depends on the rank."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def _shuffled(group: dist.ProcessGroup) -> None:
    model = Shuffled("abc" if dist.get_rank(group) == 0 else "acb")
    optimizer = distmuon.DistMuon(model, process_group=group)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()


def _other_shapes(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    model = nn.Sequential(nn.Linear(6, 6), *([nn.Linear(6, 6)] if rank == 2 else []))
    optimizer = distmuon.DistMuon(model, process_group=group)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()


def _other_packing(group: dist.ProcessGroup) -> None:
    packing = "balanced" if dist.get_rank(group) == 0 else "contiguous"
    model = nn.Linear(6, 6)
    optimizer = distmuon.DistMuon(model, process_group=group, packing=packing)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()


@pytest.mark.promise("Planted faults", "parameter order that differs by rank")
def test_a_parameter_order_that_differs_by_rank_raises_on_all(spawn_raises) -> None:
    messages = spawn_raises(
        _shuffled, 3, match=r"ValueError: rank 1: found c\.weight .*on rank 0 b\.weight", timeout=10
    )
    assert len(set(messages)) == 1


def test_a_parameter_that_one_rank_lacks_raises_on_all(spawn_raises) -> None:
    messages = spawn_raises(_other_shapes, 3, match=r"rank 2: found 1\.weight .*on rank 0 nothing", timeout=10)
    assert len(set(messages)) == 1


def test_options_that_differ_by_rank_raise_on_all(spawn_raises) -> None:
    assert (
        len(
            set(
                spawn_raises(
                    _other_packing,
                    2,
                    match="rank 1: found sharding.packing = contiguous, on rank 0 sharding.packing = balanced",
                    timeout=10,
                )
            )
        )
        == 1
    )


def _first_loss(group: dist.ProcessGroup) -> tuple[float, str, str, float]:
    """Loss of the very first forward; digests of all parameters and of frozen ones after one step; a module buffer."""
    rank = dist.get_rank(group)
    model = Standing(seed=rank)
    model.register_buffer("average", torch.tensor(float(rank)))
    model, optimizer = make(group, model)
    loss = loss_fn(model, make_batch(0, rank))
    loss.backward()
    optimizer.step()
    ends = weights(model, optimizer)
    frozen = {fqn: weight for fqn, weight in ends.items() if "frozen" in fqn}
    return loss.item(), digest(ends), digest(frozen), model.average.item()


def test_rank_0_wins_before_the_first_forward(spawn) -> None:
    """Ranks initialised from different seeds: rank 0's weights and buffers, in the first forward already."""
    results = spawn(_first_loss, 3)
    model = Standing(seed=0)
    wanted_frozen = digest({fqn: weight for fqn, weight in model.state_dict().items() if "frozen" in fqn})
    for rank, (loss, all_parameters, frozen, average) in enumerate(results):
        assert loss == pytest.approx(loss_fn(model, make_batch(0, rank)).item(), rel=1e-6)
        assert all_parameters == results[0][1] and frozen == wanted_frozen and average == 0.0


# ------------------------------------------------------------------------------------------- what Muon gets


def test_no_muon_parameter_raises_and_names_the_deliberate_way() -> None:
    vectors = nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6))
    with pytest.raises(
        ValueError, match=r'none of 4 trainable parameters is updated by Muon.*routes="adamw"'
    ) as raised:
        distmuon.DistMuon(vectors)
    assert "fewer than 2 dimensions" in str(raised.value), "the reason of each parameter"
    with pytest.raises(ValueError, match="updated by Muon"):
        distmuon.DistMuon(Standing(), routes=[distmuon.Route("*weight", "adamw"), distmuon.Route("experts*", "adamw")])
    assert len(distmuon.DistMuon(Standing(), routes=[distmuon.Route("*", "adamw")]).param_groups) == 1, "on purpose"
    with pytest.raises(ValueError, match=r"no.* trainable parameter"):
        distmuon.DistMuon(nn.Linear(3, 3).requires_grad_(False))


def _adamw_loss(model: nn.Module, batch: Batch) -> Tensor:
    """AdamW divides by its gradients: here every element is pulled, so that none is close to zero."""
    return loss_fn(model, batch) + 2 * sum(param.sum() for param in model.parameters() if param.requires_grad)


def _train_adamw(group: dist.ProcessGroup) -> tuple[Weights, int]:
    model, optimizer = make(group, routes="adamw")
    for step in range(3):
        _adamw_loss(model, make_batch(step, dist.get_rank(group), 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model, optimizer), optimizer.metrics()["ns_matrices"]


def test_all_adamw_on_purpose(spawn) -> None:
    model = Standing()
    trainable = [fqn for fqn, param in model.named_parameters() if param.requires_grad]
    oracle = Reference(model, dict.fromkeys(trainable, "adamw"), lr=EXACT["lr"])
    for step in range(3):
        oracle.step(_adamw_loss, make_batches(step, 3))
    for ends, matrices in spawn(_train_adamw, 3):
        assert_equals_reference(ends, oracle.weights)
        assert matrices == 0


class OneMatrix(nn.Module):
    """A single small matrix for four ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def _one_matrix_loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (model(torch.randn(9, 5, generator=generator)) - torch.randn(9, 3, generator=generator)).square().sum()


def _train_one_matrix(group: dist.ProcessGroup, bucket_mb: float | None) -> list[tuple[Weights, int]]:
    results = []
    for packing, placement in itertools.product(("balanced", "contiguous"), ("owner", "replicated")):
        model, optimizer = make(
            group, OneMatrix(), routes=None, bucket_mb=bucket_mb, packing=packing, placement=placement
        )
        for step in range(3):
            _one_matrix_loss(model, 10 * step + dist.get_rank(group)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((weights(model, optimizer), optimizer.metrics()["ns_matrices"]))
    return results


@pytest.mark.parametrize("bucket_mb", [None, 1e-5])
def test_more_ranks_than_matrices(spawn, bucket_mb: float | None) -> None:
    oracle = Reference(OneMatrix(), {"layer.weight": "muon", "layer.bias": "adamw"}, lr=EXACT["lr"])
    for step in range(3):
        oracle.step(_one_matrix_loss, [[10 * step + rank] for rank in range(4)])
    by_rank = spawn(_train_one_matrix, 4, bucket_mb=bucket_mb, timeout=20)
    for results in by_rank:
        for ends, _ in results:
            assert_equals_reference(ends, oracle.weights, OneMatrix().state_dict())
    assert [sum(results[i][1] for results in by_rank) for i in (0, 2)] == [1, 1]


def test_frozen_and_tied_parameters_are_counted_once_or_not_at_all() -> None:
    model, optimizer = make(None)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    trainable = {fqn: p for fqn, p in model.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(trainable)
    assert sum(spec.numel for spec in optimizer.layout.specs) == sum(p.numel() for p in trainable.values())
    train(None, model, optimizer, range(2))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.frozen.weight, Standing().frozen.weight)
    # state: 8 bytes for AdamW's elements, 4 for Muon's momentum; the float32 parameter is its own master
    muon = sum(
        trainable[fqn].numel() for g in optimizer.param_groups if g["rule"] == "muon" for fqn in g["param_names"]
    )
    assert optimizer.metrics()["state_bytes"] == 8 * (sum(p.numel() for p in trainable.values()) - muon) + 4 * muon


# ------------------------------------------------------------------------------------------- other reducers


def _passed_wrapped(group: dist.ProcessGroup) -> None:
    make(group, DistributedDataParallel(Standing(), process_group=group))


def test_a_wrapped_model_under_reduce_scatter_raises(spawn_raises) -> None:
    messages = spawn_raises(_passed_wrapped, 2, match=r'grad_reduction="external".*unwrapped')
    assert "integrations.ddp.silence" in messages[0]


def _train_under_ddp(group: dist.ProcessGroup, how: str, num_micro: int, **options: Any) -> Weights:
    inner = Standing(seed=dist.get_rank(group))
    settings = {"process_group": group, "bucket_cap_mb": 0.05}
    if how == "external":
        model = DistributedDataParallel(inner, **settings)
        _, optimizer = make(group, model, grad_reduction="external", **options)
    elif how == "external, unwrapped":
        model = DistributedDataParallel(inner, **settings)
        _, optimizer = make(group, inner, grad_reduction="external", **options)
    else:
        _, optimizer = make(group, inner, **options)
        model = DistributedDataParallel(inner, **settings, gradient_as_bucket_view=how.endswith("views"))
        if how.startswith("silenced"):
            silence(model, optimizer)
    rank = dist.get_rank(group)
    for step in range(3):
        micro_batches = [make_batch(step, rank, micro) for micro in range(num_micro)]
        for micro, batch in enumerate(micro_batches):
            accumulates = micro < num_micro - 1
            with ExitStack() as stack:
                if how == "silenced, flag":
                    model.require_backward_grad_sync = not accumulates
                elif accumulates and how == "silenced, forward alone":
                    with model.no_sync():
                        loss = loss_fn(model, batch)
                elif accumulates:
                    stack.enter_context(optimizer.no_sync() if how != "silenced, its own" else nullcontext())
                    stack.enter_context(model.no_sync() if how != "silenced, optimizer's" else nullcontext())
                if not (accumulates and how == "silenced, forward alone"):
                    loss = loss_fn(model, batch)
                (loss / num_micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(inner, optimizer)


@pytest.mark.supports("DDP around the model, silenced or averaging by itself", "DDP")
@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize(
    "how",
    [
        "external",
        "external, unwrapped",
        "silenced",
        "silenced, views",
        "silenced, its own",
        "silenced, optimizer's",
        "silenced, flag",
        "silenced, forward alone",
    ],
)
def test_every_lawful_way_to_combine_with_ddp_is_right(spawn, how: str, num_micro: int) -> None:
    """The flag that DDP's `no_sync` clears is what many loops write themselves, and was not heard."""
    oracle = reference()
    for step in range(3):
        oracle.step(loss_fn, make_batches(step, 2, num_micro))
    one, other = spawn(_train_under_ddp, 2, how=how, num_micro=num_micro)
    assert digest(one) == digest(other)
    assert_equals_reference(one, oracle.weights)


@pytest.mark.refuses("DDP around the model, not silenced", "DDP", use="`silence`")
@pytest.mark.parametrize("how", ["wrapped afterwards", "wrapped afterwards, views"])
def test_a_second_averaging_raises(spawn_raises, how: str) -> None:
    """DDP put zeros where distmuon had taken the gradient: a trainer that clips those clips nothing. Refused in the
    first forward, whatever comes after it: with accumulation the message spoke of `no_sync`."""
    match = r"DistributedDataParallel: it runs the model, and averages.*integrations\.accelerate\.prepare instead of"
    spawn_raises(_train_under_ddp, 2, match=match, how=how, num_micro=2)


def _wrapped_in_a_run(group: dist.ProcessGroup, pairs: bool) -> None:
    model, optimizer = make(group)
    if pairs:  # no module, so nothing is seen of a forward
        named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        optimizer = distmuon.DistMuon(named, routes="adamw", process_group=group)
    train(group, model, optimizer, [0])
    train(group, DistributedDataParallel(model, process_group=group, find_unused_parameters=True), optimizer, [1])


def test_a_wrapper_that_comes_later_is_refused_too(spawn_raises) -> None:
    spawn_raises(_wrapped_in_a_run, 2, match="it runs the model, and averages", pairs=False)
    spawn_raises(
        _wrapped_in_a_run, 2, match=r"in the reduction over the ranks.*wrapped in DDP.*ddp\.silence", pairs=True
    )


def _frozen_inside(group: dist.ProcessGroup) -> bool:
    """A model of ours that runs within the forward of another's DDP, which does not average it."""

    class Critic(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.head, self._body = nn.Linear(4, 1), [body]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self._body[0](x))

    body = nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 4))
    optimizer = distmuon.DistMuon(body, process_group=group)
    DistributedDataParallel(Critic(body), process_group=group)(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return bool(optimizer.metrics()["grad_norm"] > 0)


def test_a_model_that_runs_inside_the_ddp_of_another_is_none_of_its_business(spawn) -> None:
    assert spawn(_frozen_inside, 2) == [True, True]


def _external_that_nobody_reduced(group: dist.ProcessGroup) -> None:
    model, optimizer = make(group, grad_reduction="external")
    train(group, model, optimizer, [0])


def test_external_gradients_that_nobody_averaged_raise(spawn_raises) -> None:
    spawn_raises(_external_that_nobody_reduced, 2, match=r'grad_reduction="external": the ranks\' gradients differ')


# ------------------------------------------------------------------------------------------- misuse


def _moved(group: dist.ProcessGroup, how: str) -> None:
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    optimizer.synchronize()
    if how == "storage":
        model.square.weight.data = model.square.weight.data.clone()
    else:
        model.square.double()
        model.square.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        model.square.register_forward_hook(lambda _, args, output: output.float())
    train(group, model, optimizer, [1])


@pytest.mark.parametrize("how", ["storage", "dtype"])
def test_a_parameter_moved_after_the_first_use_raises(spawn_raises, how: str) -> None:
    messages = spawn_raises(
        _moved, 2, match=r"ValueError: square\.(weight|bias): .*storage.*before the first forward", how=how
    )
    assert len(set(messages)) == 1


def _used_outside(group: dist.ProcessGroup) -> None:
    """The weight of a layer that is never called: nobody knew when to wait for it."""
    model, optimizer = make(group, overlap="forward")
    for _ in range(2):
        (model.up.weight @ torch.ones(WIDTH)).sum().backward()
        optimizer.step()


def test_a_parameter_used_outside_of_its_module_raises_while_it_is_in_flight(spawn_raises) -> None:
    messages = spawn_raises(_used_outside, 2, match=r"up\.weight: it was used in forward before .*synchronize\(\)")
    assert len(set(messages)) == 1


def _woken(group: dist.ProcessGroup) -> None:
    model, optimizer = make(group)
    train(group, model, optimizer, [0])
    model.frozen.requires_grad_(True)
    train(group, model, optimizer, [1])


def test_a_frozen_parameter_that_wakes_up_raises(spawn_raises) -> None:
    """It has no place in the layout; training on without it would be silent."""
    messages = spawn_raises(_woken, 2, match=r"ValueError: frozen\.(weight|bias)")
    assert len(set(messages)) == 1


def _second_backward(group: dist.ProcessGroup) -> None:
    model, optimizer = make(group)
    for micro in range(2):
        loss_fn(model, make_batch(0, dist.get_rank(group), micro)).backward()
    optimizer.step()


def test_a_second_backward_after_the_reduction_raises(spawn_raises) -> None:
    messages = spawn_raises(_second_backward, 2, match=r"ValueError: .*gradient arrived after.*optimizer\.no_sync\(\)")
    assert len(set(messages)) == 1


def _second_backward_without_overlap(group: dist.ProcessGroup) -> Weights:
    """The message's other cure."""
    model, optimizer = make(group, overlap=False)
    for micro in range(2):
        (loss_fn(model, make_batch(0, dist.get_rank(group), micro)) / 2).backward()
    optimizer.step()
    return weights(model, optimizer)


def test_without_overlap_backwards_add_up(spawn) -> None:
    oracle = reference()
    oracle.step(loss_fn, make_batches(0, 2, 2))
    for ends in spawn(_second_backward_without_overlap, 2):
        assert_equals_reference(ends, oracle.weights)


def _two_optimizers(group: dist.ProcessGroup) -> str:
    model, older = make(group)
    train(group, model, older, [0])
    _, newer = make(group, model)
    train(group, model, newer, [1])
    with pytest.raises(ValueError, match="taken over by a newer DistMuon"):
        older.step()
    return digest(weights(model, newer))


def test_a_newer_optimizer_takes_over(spawn) -> None:
    assert len(set(spawn(_two_optimizers, 2))) == 1


# ----------------------------------------------------------------------------------- gradients by hand, clipping


def _gradients_by_hand(group: dist.ProcessGroup, without: str) -> Weights:
    """No backward at all; the parameter `without` gets a gradient on rank 0 only."""
    model, optimizer = make(group)
    rank = dist.get_rank(group)
    for step in range(2):
        generator = torch.Generator().manual_seed(100 * step + rank)
        for fqn, param in model.named_parameters():
            grad = torch.randn(param.shape, generator=generator)
            if param.requires_grad and (fqn != without or rank == 0):
                param.grad = grad
        optimizer.step()
        assert all(param.grad is None for param in model.parameters()) or not optimizer.zero_grad()
    return weights(model, optimizer)


def test_gradients_set_by_hand(spawn) -> None:
    oracle = reference()
    for step in range(2):
        total = {fqn: torch.zeros_like(weight) for fqn, weight in oracle.weights.items()}
        for rank in range(3):
            generator = torch.Generator().manual_seed(100 * step + rank)
            for fqn, param in oracle.model.named_parameters():
                grad = torch.randn(param.shape, generator=generator)
                if param.requires_grad and (fqn != "down.weight" or rank == 0):
                    total[fqn] += grad
        oracle.apply({fqn: grad / 3 for fqn, grad in total.items()})
    for ends in spawn(_gradients_by_hand, 3, without="down.weight", timeout=20):
        assert_equals_reference(ends, oracle.weights, scale=2)  # gradients of pure noise are worse conditioned


def _clipped(group: dist.ProcessGroup | None, max_norm: float, how: str) -> tuple[list[float], Weights]:
    model, optimizer = make(group, max_grad_norm=max_norm if "option" in how else None)
    norms, rank = [], 0 if group is None else dist.get_rank(group)
    for step in range(3):
        backward(model, optimizer, [make_batch(step, rank, micro) for micro in range(2)])
        if how == "option, reduced before":
            optimizer.reduce_gradients()
        if "option" not in how:
            norms.append(optimizer.clip_grad_norm_(max_norm).item())
        if how == "twice":
            norms.append(optimizer.clip_grad_norm_(max_norm).item())
        optimizer.step()
        if "option" in how:
            norms.append(optimizer.metrics()["grad_norm"])
        optimizer.zero_grad()
    return norms, weights(model, optimizer)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_clipping_is_that_of_torch_on_the_whole_mean_gradient(spawn, dp_size: int) -> None:
    """The norm to 1e-6, the clipped step equal to the oracle's; by call, by option, and a threshold out of reach."""
    for how, max_norm in (("call", 3.0), ("option", 3.0), ("option, reduced before", 3.0), ("call", 1e6)):
        oracle = reference(max_norm=max_norm)
        wanted = []
        for step in range(3):
            grads = oracle.mean_gradients(loss_fn, make_batches(step, dp_size, 2))
            params = [nn.Parameter(grad.clone()) for grad in grads.values()]
            for param in params:
                param.grad = param.detach().clone()
            wanted.append(torch.nn.utils.clip_grad_norm_(params, max_norm).item())
            oracle.apply(grads)
        assert max(wanted) > 3.1, "or else nothing is clipped"
        results = spawn(_clipped, dp_size, max_norm=max_norm, how=how)
        assert len({tuple(norms) for norms, _ in results}) == 1
        for norms, ends in results:
            assert norms == pytest.approx(wanted, rel=1e-6), how
            assert_equals_reference(ends, oracle.weights)


def test_clipping_twice_is_clipping_once(spawn) -> None:
    """torch's second call finds a gradient that fits already; a trainer and a user's loop may both clip."""
    twice, once = spawn(_clipped, 2, max_norm=3.0, how="twice")[0], spawn(_clipped, 2, max_norm=3.0, how="call")[0]
    assert twice[0][::2] == pytest.approx(once[0], rel=1e-6)
    assert twice[0][1::2] == pytest.approx([3.0] * 3, rel=1e-5)
    assert_equals_reference(twice[1], once[1])


# ------------------------------------------------------------------------------------------- unusual tensors


class Unusual(nn.Module):
    """A transposed parameter, a channels-last kernel, an empty one, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.transposed = nn.Parameter(torch.randn(7, 5).t())
        self.kernel = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.empty = nn.Parameter(torch.zeros(0))
        self.scalar = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bchw,oc->bohw", x, torch.tanh(self.transposed[:, :3]))
        return (
            self.kernel(x).square().mean() * self.scalar
            + mixed.sin().mean()
            + self.transposed.square().mean()
            + self.empty.sum()
        )


def _unusual_loss(model: nn.Module, seed: int) -> Tensor:
    return model(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)))


def _train_unusual(group: dist.ProcessGroup) -> Weights:
    routes = [distmuon.Route("transposed", "muon"), distmuon.Route("kernel.weight", "muon")]
    model, optimizer = make(group, Unusual(), routes=routes, bucket_mb=1e-4)
    for step in range(3):
        _unusual_loss(model, 10 * step + dist.get_rank(group)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model, optimizer)


def test_strides_and_empty_parameters(spawn) -> None:
    rules = {"transposed": "muon", "empty": "adamw", "scalar": "adamw", "kernel.weight": "muon", "kernel.bias": "adamw"}
    oracle = Reference(Unusual(), rules, lr=EXACT["lr"])
    for step in range(3):
        oracle.step(_unusual_loss, [[10 * step + rank] for rank in range(3)])
    wanted = {fqn: weight for fqn, weight in oracle.weights.items() if fqn != "empty"}
    for ends in spawn(_train_unusual, 3, timeout=10):
        assert_equals_reference(ends, wanted, Unusual().state_dict())
