"""The fused passes without a GPU: Triton interprets its kernels on the CPU, and compiles them for GPUs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import distmuon.math
from distmuon.math import fused, remainders, rules

triton = pytest.importorskip("triton")
interpreter = pytest.importorskip("triton.runtime.interpreter")
SIZES = (1, 100, 1024, 5000)


def _kernels(*, interpreted: bool) -> ModuleType:
    """math/kernels.py once more, decorated for the interpreter or for the compiler."""
    spec = importlib.util.spec_from_file_location("kernels_again", Path(fused.__file__).with_name("kernels.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        spec.loader.exec_module(module)
    return module


def _convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """float32 to and from bfloat16 in NumPy's bits, as on a GPU: the interpreter's own conversion cuts bits off."""
    if target.is_bf16():
        return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
    assert source.is_bf16() and target.is_fp32()
    return torch.from_numpy(values.copy()).view(torch.bfloat16).float().numpy()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU has kernels, which are interpreted."""
    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    kernels = _kernels(interpreted=True)
    monkeypatch.setitem(sys.modules, "distmuon.math.kernels", kernels)
    monkeypatch.setattr(distmuon.math, "kernels", kernels, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(fused, "ready", lambda device: True)
    yield


def _random(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_that_others_have_overwritten(interpreted: None, size: int, dtype: torch.dtype) -> None:
    master = _random(size)
    param = master.to(dtype)
    assert not torch.equal(param.float(), master)
    kept = master.clone()
    fused.absorb(param, kept)
    assert torch.equal(kept, master), "a master that rounds to its parameter keeps its precision"
    written = torch.zeros(size, dtype=torch.bool)
    written[::7] = True
    param[written], param[0], param[-1] = 3.0, torch.nan, -0.0
    kept[-1] = 0.0
    fused.absorb(param, kept)
    assert torch.equal(kept[written][1:], torch.full_like(kept[written][1:], 3.0))
    assert torch.equal(kept[1:-1][~written[1:-1]], master[1:-1][~written[1:-1]])
    assert (kept[0].isnan() or size == 1) and not kept[-1].isnan() and not kept[-1].signbit()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum(interpreted: None, size: int, dtype: torch.dtype, nesterov: bool) -> None:
    grad, old = _random(size), _random(size, 1)
    wanted, wanted_update = rules.muon_momentum(grad, old, momentum=0.95, nesterov=nesterov)
    for skip in (0.0, 1.0):
        buffer, update = old.clone(), torch.empty(size, dtype=dtype)
        got = rules.muon_momentum(
            grad, buffer, momentum=0.95, nesterov=nesterov, unless=torch.tensor(skip), update_out=update
        )
        assert got[0] is buffer and got[1] is update
        torch.testing.assert_close(buffer, old if skip else wanted, rtol=3e-7, atol=3e-7)
        assert not skip or torch.equal(buffer, old)
        torch.testing.assert_close(update.float(), wanted_update, rtol=2 * torch.finfo(dtype).eps, atol=3e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_step_of_a_weight_has_the_bits_of_the_plain_form(interpreted: None, size: int, dtype: torch.dtype) -> None:
    weight, polar = _random(size), _random(size, 1).to(dtype)
    hyper = {"lr": 0.02, "weight_decay": 0.1, "scale": 6.4}
    wanted = rules.muon_weight(weight, polar, **hyper)
    for skip in (0.0, 1.0):
        got = weight.clone()
        rules.muon_weight(got, polar, **hyper, unless=torch.tensor(skip))
        assert torch.equal(got, weight if skip else wanted)


@pytest.mark.parametrize("size", SIZES)
def test_masters_as_remainders(interpreted: None, size: int) -> None:
    """All upper halves of a float32, with lower halves that round up and down; and parameters that others wrote."""
    bits = torch.randint(-(2**31), 2**31, (size,), generator=torch.Generator().manual_seed(size)).to(torch.int32)
    bits[: min(size, 8)] = torch.tensor([0, 1, 2**15, -(2**31), -1, 0x7F7FFFFF, 0x7F800000, 0x7F800001])[:size]
    masters = bits.view(torch.float32)
    param, remainder = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.int16)
    fused.split(masters, param, remainder)
    for got, wanted in zip((param.view(torch.int16), remainder), remainders.split(masters)):
        assert torch.equal(got, wanted.view(torch.int16))
    written = torch.where(torch.arange(size) % 3 == 0, torch.zeros(()), _random(size)).bfloat16()
    for held in (param, written):
        joined = fused.join(held, remainder)
        assert torch.equal(joined.view(torch.int32), remainders.join(held, remainder).view(torch.int32))


def test_what_a_kernel_writes_is_seen_by_autograd(interpreted: None) -> None:
    """A graph that saved the weight before must not use the new one."""
    weight, param = torch.ones(8, requires_grad=True), torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    loss = weight.square().sum() + param.square().sum()
    fused.weight(weight.detach(), torch.ones(8), torch.zeros(()), 1.0, -0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True, inputs=[weight])
    fused.split(torch.ones(8), param.detach(), torch.zeros(8, dtype=torch.int16))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(inputs=[param])


def test_a_tensor_of_another_size_is_refused(interpreted: None) -> None:
    param = torch.zeros(16, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        fused.split(torch.ones(16), param[:8], torch.zeros(8, dtype=torch.int16))
    assert not param.any()


@pytest.fixture(scope="module")
def assembly() -> dict[str, str]:
    """PTX of each kernel for a GPU of compute capability 9.0, compiled without one; for 8.0 and 10.0 it compiles."""
    kernels = _kernels(interpreted=False)
    types = {
        "absorb_kernel": {"param": "*bf16", "master": "*fp32"},
        "momentum_kernel": {"grad": "*fp32", "buffer": "*fp32", "update": "*bf16", "skip": "*fp32"},
        "weight_kernel": {"master": "*fp32", "polar": "*bf16", "skip": "*fp32"},
        "join_kernel": {"param": "*i16", "remainder": "*i16", "master": "*i32"},
        "split_kernel": {"master": "*i32", "param": "*i16", "remainder": "*i16"},
    }
    found: dict[str, str] = {}
    for name, known in types.items():
        kernel = getattr(kernels, name)
        args = list(kernel.arg_names)
        signature = {arg: known.get(arg, "fp32") for arg in args} | {"numel": "i64", "BLOCK": "constexpr"}
        aligned: dict[Any, Any] = {
            (number,): [["tt.divisibility", 16]]
            for number, arg in enumerate(args)
            if arg == "numel" or (arg in known and arg != "skip")
        }
        constants = {(args.index("BLOCK"),): kernels.BLOCK}
        for capability in (80, 90, 100):
            source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
            target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
            made = triton.compile(source, target=target, options=kernels.OPTIONS)
            assert made.asm["cubin"]
            if capability == 90:
                found[name] = made.asm["ptx"]
    return found


@pytest.mark.parametrize(
    ("kernel", "reads", "writes"),
    [
        ("absorb_kernel", 6, 0),
        ("momentum_kernel", 8, 6),
        ("weight_kernel", 6, 4),
        ("join_kernel", 4, 4),
        ("split_kernel", 4, 4),
    ],
)
def test_compiled_kernels_move_what_is_counted(assembly: dict[str, str], kernel: str, reads: int, writes: int) -> None:
    """By 16 bytes a thread, each element once; products and sums are not contracted. 4 warps take 1024 elements, so a
    thread 8. `absorb` writes single elements, where others have written."""
    lines = [line for line in assembly[kernel].splitlines() if "global" in line]
    assert sum(".v4.b32" in line and "ld." in line for line in lines) * 16 == 8 * reads
    assert sum(".v4.b32" in line and "st." in line for line in lines) * 16 == 8 * writes
    assert "fma" not in assembly[kernel]
    assert "cvt.rn.bf16" in assembly[kernel] or kernel not in ("absorb_kernel", "momentum_kernel")  # to the nearest


def test_where_kernels_do_not_work_the_plain_forms_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)

    def broken(device: torch.device) -> list[str]:
        raise RuntimeError("no C compiler")

    def different(device: torch.device) -> list[str]:
        return ["weight"]

    for tried, why in ((broken, "RuntimeError: no C compiler"), (different, "weight: other values")):
        monkeypatch.setattr(fused, "differing", tried)
        with pytest.warns(UserWarning, match=why):
            assert not fused.ready.__wrapped__(device)
    monkeypatch.setattr(fused, "differing", lambda device: [])
    assert fused.ready.__wrapped__(device) and not fused.ready.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("name", fused.PLAIN)
def test_the_trial_finds_a_kernel_that_computes_something_else(
    interpreted: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that does nothing stands for one that is wrong."""
    assert fused.differing(torch.device("cpu")) == []
    monkeypatch.setattr(sys.modules["distmuon.math.kernels"], name, lambda *_: None)
    assert set(fused.differing(torch.device("cpu"))) == {name}


def test_the_trial_does_not_depend_on_torchs_defaults(interpreted: None) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert fused.differing(torch.device("cpu")) == []
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_package_can_be_imported_again() -> None:
    """Notebooks and test suites that purge modules do so."""
    code = (
        "import sys, distmuon\n"
        "for name in [name for name in sys.modules if name.startswith('distmuon')]:\n"
        "    del sys.modules[name]\n"
        "import distmuon"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
