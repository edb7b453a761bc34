"""Whose memory a parameter lies in: what keeps its place and strides, what moves, what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import distmuon
from distmuon import Route
from distmuon.layout import memory
from tests.training import digest, state_tensors, weights
from tests.unit.test_errors import refused


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def _step(model: nn.Module, optimizer: distmuon.DistMuon, seed: int = 0) -> None:
    """Gradients that no kernel computes, so that memory formats can be compared bit by bit."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------- memory formats


class Mixed(nn.Module):
    """A matrix stored transposed, convolutions in two and three dimensions, one with kernels of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.one = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.deep = nn.Conv3d(4, 6, 2)
        self.tied = nn.Linear(7, 9)


def _in(form: str) -> Mixed:
    """The same values; strides as `form` asks for."""
    model = Mixed()
    if form == "channels last":
        model.flat.to(memory_format=torch.channels_last)
        model.one.to(memory_format=torch.channels_last)
        model.deep.to(memory_format=torch.channels_last_3d)
    if form == "transposed":
        model.tied.weight = nn.Parameter(model.tied.weight.detach().t().contiguous().t())
        model.deep.weight = nn.Parameter(
            model.deep.weight.detach().permute(4, 1, 0, 2, 3).contiguous().permute(2, 1, 3, 4, 0)
        )
    return model


OPTIONS: list[dict[str, Any]] = [{}, {"overlap": False, "bucket_mb": 1e-4}, {"grad_reduction": "external"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["channels last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_kept_and_change_no_bit(form: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights were made row-major at the first forward: the GPU's library converted them in every call after that."""
    plain, model = Mixed().to(dtype), _in(form).to(dtype)
    before = {fqn: (param.stride(), param.data_ptr()) for fqn, param in model.named_parameters()}
    moved = {fqn for fqn, param in model.named_parameters() if param.is_contiguous()}
    assert len(moved) == 8 - 2 and not model.deep.weight.is_contiguous()
    optimizers = [distmuon.DistMuon(each, **options) for each in (plain, model)]
    for seed in range(3):
        for each, optimizer in zip((plain, model), optimizers):
            _step(each, optimizer, seed)
    for fqn, param in model.named_parameters():
        assert param.stride() == before[fqn][0], fqn
        assert (param.data_ptr() == before[fqn][1]) == (fqn not in moved), fqn
    assert digest(weights(model, optimizers[1])) == digest(weights(plain, optimizers[0]))
    assert digest(state_tensors(optimizers[1])) == digest(state_tensors(optimizers[0]))


def test_the_planner_counts_what_keeps_its_memory() -> None:
    plain, last = (distmuon.plan(_in(form), dp_size=2) for form in ("", "channels last"))
    elements = 8 * 3 * 9 + 6 * 4 * 8
    assert last.staged - plain.staged == pytest.approx(elements / plain.num_elements)
    assert last.fullest.staged - plain.fullest.staged == 4 * elements
    optimizer = distmuon.DistMuon(_in("channels last"))
    assert f"staged {100 * elements / plain.num_elements:.1f} %" in optimizer.report()


def test_a_format_chosen_after_the_optimizer_was_made_is_kept() -> None:
    model = Mixed()
    optimizer = distmuon.DistMuon(model)
    model.flat.to(memory_format=torch.channels_last)
    _step(model, optimizer)
    assert model.flat.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.flat.weight.is_contiguous()


def test_foreign_writes_to_a_channels_last_weight_are_taken_over() -> None:
    model = _in("channels last")
    optimizer = distmuon.DistMuon(model, lr=0.0)
    _step(model, optimizer)
    model.flat.weight.data.fill_(7.0)
    _step(model, optimizer)
    assert bool((model.flat.weight == 7.0).all())


# ------------------------------------------------------------------------------------------------- second names


class Aliased(nn.Module):
    """`make` gives the weight of its linear layer, and what else holds its memory."""

    def __init__(self, make: Callable[[nn.Linear, nn.Module], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = nn.Linear(6, 8), nn.Linear(6, 8)
        self.seen = [make(self.layer, self)]  # a list: the module itself does not know it

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.other(x)


def _shared(layer: nn.Linear, _: nn.Module) -> Tensor:
    layer.share_memory()
    return layer.weight.data


def _in_a_vector(layer: nn.Linear, _: nn.Module) -> Tensor:
    """As vector_to_parameters, other frameworks' flat buffers and cuDNN's weights of an RNN do."""
    vector = torch.cat([layer.weight.detach().reshape(-1), torch.zeros(5)])
    layer.weight.data = vector[: layer.weight.numel()].view_as(layer.weight)
    return vector[: layer.weight.numel()].view_as(layer.weight)


def _as_a_buffer(layer: nn.Linear, model: nn.Module) -> Tensor:
    model.register_buffer("view", layer.weight.data, persistent=False)
    return layer.weight.data


def _as_an_attribute(layer: nn.Linear, model: nn.Module) -> Tensor:
    model.transposed = layer.weight.data.t()
    return layer.weight.data


def _as_frozen(layer: nn.Linear, model: nn.Module) -> Tensor:
    model.teacher = nn.Parameter(layer.weight.data, requires_grad=False)
    return layer.weight.data


ALIASES = [_shared, _in_a_vector, _as_a_buffer, _as_an_attribute, _as_frozen]


@pytest.mark.parametrize("make", ALIASES)
def test_a_second_name_of_the_memory_sees_the_training(make: Callable[[nn.Linear, nn.Module], Tensor]) -> None:
    """Actors that had mapped a shared model read the first weights for ever."""
    model = Aliased(make)
    plain = Aliased(lambda layer, _: layer.weight.data.clone())
    optimizers = [distmuon.DistMuon(each) for each in (model, plain)]
    for seed in range(2):
        for each, optimizer in zip((model, plain), optimizers):
            each(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for optimizer in optimizers:
        optimizer.synchronize()
    assert torch.equal(model.seen[0], model.layer.weight) and torch.equal(model.layer.weight, plain.layer.weight)
    assert model.layer.weight.is_shared() == (make is _shared)
    assert not memory.is_in_flat(model.layer.weight) and memory.is_in_flat(model.other.weight)


def test_memory_shared_after_the_build_goes_on() -> None:
    """`share_memory` moves a storage as a whole: views of the flat buffer and the buffer itself stay one."""
    model, twin = _model(), _model()
    optimizers = [distmuon.DistMuon(each) for each in (model, twin)]
    for seed in range(2):
        for each, optimizer in zip((model, twin), optimizers):
            _step(each, optimizer, seed)
        if not seed:
            model.share_memory()
            mapped = [param.data for param in model.parameters()]
    assert all(param.is_shared() for param in model.parameters())
    assert all(torch.equal(seen, param) for seen, param in zip(mapped, model.parameters()))
    assert digest(weights(model, optimizers[0])) == digest(weights(twin, optimizers[1]))


def test_a_parameter_moved_after_the_build_is_refused() -> None:
    def moves(model: nn.Module) -> None:
        optimizer = distmuon.DistMuon(model)
        _step(model, optimizer)
        param = next(model.parameters())
        param.data = param.data.clone()
        _step(model, optimizer)

    for model in (_model(), _in("channels last")):
        refused(partial(moves, model), r"weight: its storage changed since distmuon's buffers were built")


def test_a_newer_optimizer_takes_no_older_ones_buffer_for_foreign_memory() -> None:
    model = _model()
    _step(model, distmuon.DistMuon(model))
    old = memory.addresses_of(model[0].weight)
    optimizer = distmuon.DistMuon(model)
    assert "staged 0.0 %" in optimizer.report()
    _step(model, optimizer)
    assert memory.is_in_flat(model[0].weight) and memory.addresses_of(model[0].weight) != old


# ------------------------------------------------------------------------------------------------- what is refused


class Sum(torch.Tensor):
    """Shows the sum of two tensors; what is written lands in the first."""

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def whole(value: Any) -> Any:
            return value.first + value.second if isinstance(value, Sum) else value

        if func is torch.ops.aten.detach.default:
            return cls(args[0].first, args[0].second)
        return func(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


class Named(Sum):
    """A `Sum` that tells its inner tensors, as quantised weights do."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Named:
        return Named(inner["first"], inner["second"])


class OverMemory(torch.Tensor):
    """Memory of its own, and a `__torch_dispatch__` between it and whoever writes."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if isinstance(result, Tensor) else result


class Harmless(nn.Parameter):
    """A subclass in Python alone, as bitsandbytes, timm and torch's lazy modules have."""

    quant_state = None


def _with(weight: Tensor, index: int = 2) -> nn.Sequential:
    model = _model()
    model[index].weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return model


def _freed() -> nn.Sequential:
    """As sharding frameworks leave a weight between its uses."""
    model = _model()
    model[2].weight.untyped_storage().resize_(0)
    return model


def _two_in(storage: Tensor) -> nn.Sequential:
    model = _model()
    model[0].weight = nn.Parameter(storage[:48].view(8, 6))
    model[2].weight = nn.Parameter(storage[40:72].view(4, 8))
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: _with(Sum(torch.ones(4, 8), torch.ones(4, 8))), r"2\.weight: the parameter is a Sum, .*must be plain"),
        (lambda: _with(Named(torch.ones(4, 8), torch.ones(4, 8))), r"2\.weight: the parameter is a Named.*freeze it"),
        (lambda: _with(torch.ones(4, 8).as_subclass(OverMemory)), r"2\.weight: the parameter is a OverMemory"),
        (_freed, r"2\.weight: the parameter is a Parameter, whose values are not simply those in its memory"),
        (lambda: _with(torch.ones(4, 8).to_sparse()), r"2\.weight: the parameter is a tensor of torch\.sparse_coo"),
        (lambda: _with(torch.ones(1, 8).expand(4, 8)), r"2\.weight: .* \(4, 8\) has strides \(0, 1\): it is expanded"),
        (lambda: _with(torch.ones(4, 16)[:, ::2]), r"2\.weight: .* strides \(16, 2\): .*a slice with gaps; .*clone\("),
        (lambda: _two_in(torch.ones(72)), r"2\.weight: it lies in the memory of 0\.weight, as a separate Parameter"),
    ],
)
def test_parameters_whose_values_are_no_memory_of_their_own(make: Callable[[], nn.Module], match: str) -> None:
    """A subclass that torch's AdamW trains never moved, in silence; an expanded weight lost its tie."""
    refused(lambda: distmuon.DistMuon(make()), match)


def test_frozen_subclasses_and_harmless_ones_train() -> None:
    frozen = nn.Parameter(Sum(torch.ones(8, 8), torch.ones(8, 8)), requires_grad=False)
    model = _with(Harmless(torch.randn(4, 8)))
    model.append(nn.Linear(8, 8))
    model[3].weight = frozen
    before = model[2].weight.detach().clone()
    optimizer = distmuon.DistMuon(model)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    optimizer.step()
    assert type(model[2].weight) is Harmless and not torch.equal(model[2].weight, before)
    assert model[3].weight is frozen and bool((frozen.first == 1).all())
    distmuon.verify_parameters(model, optimizer)
    model.state_dict()


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_train_once_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    model(torch.ones(2, 6))
    optimizer = distmuon.DistMuon(model)
    before = model[0].weight.detach().clone()
    _step(model, optimizer)
    assert not torch.equal(model[0].weight, before)


# ------------------------------------------------------------------------------------------------- the first forward


def _functional(model: nn.Module, how: str) -> None:
    x = torch.randn(3, 6)
    held = {fqn: param.detach() for fqn, param in model.named_parameters()}
    if how == "grad":
        torch.func.grad(lambda params: torch.func.functional_call(model, params, (x,)).square().mean())(held)
    elif how == "some":
        torch.func.functional_call(model, {"0.weight": held["0.weight"] * 2}, (x,))
    elif how == "vmap":
        torch.func.vmap(model)(x)
    elif how == "jacrev":
        torch.func.jacrev(model)(x[0])
    elif how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))
    else:
        torch.func.functional_call(model, dict(model.named_parameters()), (x,))


@pytest.mark.parametrize("how", ["grad", "some", "vmap", "jacrev", "fake", "its own"])
def test_the_first_forward_may_be_a_functional_one(how: str) -> None:
    """The tensors of the moment were taken for the model's own, and refused as a replaced model."""
    model, twin = _model(), _model()
    optimizers = [distmuon.DistMuon(each) for each in (model, twin)]
    _functional(model, how)
    assert all(type(param) is nn.Parameter for param in model.parameters())
    twin(torch.randn(3, 6))
    for seed in range(2):
        for each, optimizer in zip((model, twin), optimizers):
            _step(each, optimizer, seed)
    assert digest(weights(model, optimizers[0])) == digest(weights(twin, optimizers[1]))


def test_a_first_forward_with_another_models_parameters() -> None:
    """Parameters in the place of others may be there for good."""
    model, other = _model(), _model()
    optimizer = distmuon.DistMuon(model)
    call = lambda: torch.func.functional_call(model, dict(other.named_parameters()), (torch.ones(2, 6),))  # noqa: E731
    refused(call, r"0\.weight: .*no longer the one.*an ordinary forward must come before a functional_call")
    model(torch.ones(2, 6))
    call()
    _step(model, optimizer)


def test_routes_of_rows_survive_a_transposed_weight() -> None:
    """Logical matrices are cut in row-major order, whatever the strides."""
    plain, model = Mixed(), _in("transposed")
    routes = [Route("tied.weight", "muon", split=[4, 5])]
    optimizers = [distmuon.DistMuon(each, routes=routes) for each in (plain, model)]
    for each, optimizer in zip((plain, model), optimizers):
        _step(each, optimizer)
    assert digest(weights(model, optimizers[1])) == digest(weights(plain, optimizers[0]))
