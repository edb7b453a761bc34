"""torch.compile of the model: the eager run's weights, few graphs, and nobody's settings changed.

`CompileCounter` counts graphs and runs them eagerly, so most of this needs no compiler; inductor is a nightly test.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distmuon
from tests.integrations.test_models import Blocks, make_optimizer, train
from tests.training import digest, weights

FIRST = ("0.weight", "0.bias", "2.weight", "2.bias")
THIRTY = [3 + step for step in range(30)]
MAX_NORM = 0.5  # below every norm of these runs


def run(
    group: Any, lengths: list[int], how: str = "eager", first: str = "optimizer", backend: Any = None, **options: Any
) -> dict[str, Tensor]:
    """Weights after training; `how` the model is compiled, and whether it or the optimizer is `first`."""
    model = Blocks(options.pop("reentrant", None))
    compiled = model
    if first == "optimizer":
        optimizer = make_optimizer(model, group, **options)
    if how == "torch.compile(model)":
        compiled = torch.compile(model, backend=backend)
    elif how == "model.compile()":
        model.compile(backend=backend)
    if first != "optimizer":
        optimizer = make_optimizer(compiled, group, **options)
    train(compiled, optimizer, group, lengths, MAX_NORM)
    ends = weights(model, optimizer)
    assert {fqn for g in optimizer.param_groups for fqn in g["param_names"]} == set(ends), "no `_orig_mod` in a state"
    return ends


def fresh_dynamo() -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # dynamo looks at .grad of what a broken graph hands on; the pool makes errors of warnings
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's own, when it imports inductor


def _counted(group: dist.ProcessGroup, lengths: list[int], **options: Any) -> tuple[bool, int, bool]:
    """(bit-equal to eager, graphs, dynamo's settings as before)."""
    fresh_dynamo()
    eager = run(group, lengths, **{k: v for k, v in options.items() if k not in ("how", "first")})
    before = torch._dynamo.config.get_config_copy()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = run(group, lengths, backend=counter, **options)
    return digest(eager) == digest(compiled), counter.frame_count, before == torch._dynamo.config.get_config_copy()


HOW = ("torch.compile(model)", "model.compile()")


@pytest.mark.parametrize("first", ["optimizer", "compile"])
@pytest.mark.parametrize("how", HOW)
def test_a_compiled_model_ends_as_the_eager_one(spawn, how: str, first: str) -> None:
    """Accumulation under no_sync, clipping, and whichever of model and optimizer came first."""
    for same, graphs, settings_kept in spawn(_counted, 2, timeout=120.0, lengths=[7] * 3, how=how, first=first):
        assert same and graphs >= 1 and settings_kept


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_model_may_checkpoint(spawn, reentrant: bool) -> None:
    options = {"lengths": [7] * 3, "how": HOW[0], "reentrant": reentrant}
    for same, _, settings_kept in spawn(_counted, 2, timeout=120.0, **options):
        assert same and settings_kept


@pytest.mark.parametrize(("overlap", "fewest", "most"), [("forward", 4, 12), (True, 1, 2), (False, 1, 2)])
def test_thirty_shapes_of_a_compiled_model_compile_a_few_graphs(spawn, overlap: Any, fewest: int, most: int) -> None:
    """With "forward" modules that wait break the graph; shapes are static at first, dynamic from the second on."""
    for same, graphs, settings_kept in spawn(_counted, 2, timeout=240.0, lengths=THIRTY, how=HOW[0], overlap=overlap):
        assert same and settings_kept
        assert fewest <= graphs <= most, f"{graphs} graphs for 30 shapes"


def _graphs(group: dist.ProcessGroup, family: str) -> list[int]:
    """Graphs compiled of transformers' model under torch's AdamW, and under ours.

    Three layers have more linear maps than dynamo compiles variants of one `forward`.
    """
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    if family == "llama":
        config: Any = transformers.LlamaConfig(**small, num_hidden_layers=3, num_key_value_heads=2)
    else:
        config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=3, vocab_size=32, n_positions=16)
    found: list[int] = []
    for ours in (False, True):
        fresh_dynamo()
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        counter = torch._dynamo.testing.CompileCounter()
        made = distmuon.DistMuon(model, process_group=group) if ours else torch.optim.AdamW(model.parameters())
        compiled = torch.compile(model, backend=counter)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for step in range(4):
                model.train(step != 2)
                tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))
                loss = compiled(input_ids=tokens, labels=tokens).loss
                loss.backward()
                made.step()
                made.zero_grad()
        found.append(counter.frame_count)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_by_default_a_compiled_model_has_the_graphs_of_plain_torch(spawn, family: str) -> None:
    """A wait in each module made 21 graphs out of 2 and hit dynamo's recompile limit in `Linear.forward`."""
    for plain, ours in spawn(_graphs, 2, timeout=240.0, family=family):
        assert 1 <= ours <= plain


def _wrapped(group: dist.ProcessGroup) -> list[str]:
    fresh_dynamo()
    wrapper = DistributedDataParallel(torch.compile(Blocks(), backend="eager"), process_group=group)
    optimizer = make_optimizer(wrapper, group, grad_reduction="external")
    return [fqn for g in optimizer.param_groups for fqn in g["param_names"]]


def test_a_compiled_model_in_ddp_keeps_its_names(spawn) -> None:
    for names in spawn(_wrapped, 2):
        assert set(names) == {fqn for fqn, _ in Blocks().named_parameters()}


def test_a_model_whose_length_is_0_or_an_error_is_a_model() -> None:
    """`DistMuon(torch.compile(model))` raised: the wrapper hands `len` on, and something asked whether it was true."""

    class Sized(Blocks):
        def __len__(self) -> int:
            return 0

    model = Sized()
    model.first.requires_grad_(False)
    assert {fqn for fqn, _ in make_optimizer(model, None)._frozen} == {f"first.{k}" for k in FIRST}


def _inductor(group: dist.ProcessGroup, how: str) -> tuple[float, int, bool]:
    """(largest relative difference to eager, graphs, settings as before)."""
    import torch._inductor.config as inductor

    fresh_dynamo()
    eager = run(group, THIRTY, overlap="forward")
    # raise rather than run on without compiling, and no pool of compilers that outlives the worker
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), inductor.patch(compile_threads=1):
        before = torch._dynamo.config.get_config_copy(), inductor.get_config_copy()
        compiled = run(group, THIRTY, how, backend="inductor", overlap="forward")
        kept = before == (torch._dynamo.config.get_config_copy(), inductor.get_config_copy())
    worst = max(float((compiled[fqn] - eager[fqn]).norm() / eager[fqn].norm()) for fqn in eager)
    return worst, torch._dynamo.utils.counters["stats"]["unique_graphs"], kept


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_inductor_trains_thirty_shapes_as_eager_does(spawn, how: str) -> None:
    """Its kernels sum in another order, so to rounding, carried through 30 steps; not to the bit."""
    if shutil.which("g++") is None:
        pytest.skip("inductor's CPU kernels need g++")
    for worst, graphs, settings_kept in spawn(_inductor, 2, timeout=900.0, how=how):
        assert worst <= 1e-5 and settings_kept
        assert 1 < graphs <= 12, graphs


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True), (True, True)])
def test_a_compiled_model_is_saved_under_its_own_names(saved: bool, loaded: bool, tmp_path: Path) -> None:
    """Buffers and frozen weights were once saved as `_orig_mod.*`, which the plain model does not have."""

    def made(is_compiled: bool) -> tuple[Any, distmuon.DistMuon]:
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        model[2].bias.requires_grad_(False)
        handed = torch.compile(model, backend="eager") if is_compiled else model
        return handed, distmuon.DistMuon(handed)

    source, target = made(saved), made(loaded)
    distmuon.save_checkpoint(tmp_path / "step-1", *source)
    distmuon.load_checkpoint(tmp_path, *target)
    for one, other in zip(source[0].state_dict().values(), target[0].state_dict().values(), strict=True):
        assert torch.equal(one, other)
