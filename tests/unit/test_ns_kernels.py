"""Foreign Newton-Schulz kernels: absent, refused, wrong and right. No GPU is needed: what decides is the same code, and
where the package gram-newton-schulz is installed its own class is run, with torch's products for its kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from distmuon import DistMuon, ns_kernels
from distmuon.coefficients import Triple, resolve
from distmuon.config import Options
from distmuon.newton_schulz import orthogonalize

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
JORDAN = resolve("jordan", 5)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`decide` remembers; and the matrices of the check lie on the CPU, so small ones do."""
    monkeypatch.setattr(ns_kernels, "_SHAPES", ((2, 40, 90), (1, 96, 64), (2, 64, 64)))
    ns_kernels.decide.cache_clear()
    yield
    ns_kernels.decide.cache_clear()


class Iteration:
    """The package's interface, by our own iteration; `wrong` spoils the result."""

    made: tuple[object, ...] = ()
    wrong: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    def __init__(
        self,
        *,
        ns_use_kernels: bool,
        ns_coefficients: list[list[float]],
        gram_newton_schulz_reset_iterations: list[int],
        compile_kwargs: None,
    ) -> None:
        Iteration.made = (ns_use_kernels, gram_newton_schulz_reset_iterations, compile_kwargs)
        self.coefficients = ns_coefficients

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and x.is_contiguous()
        norms = torch.linalg.vector_norm(x, dim=(1, 2))
        assert torch.all(((norms - 1).abs() < 1e-5) | (norms == 0))  # the package's own epsilon is not scale-free
        steps = len(self.coefficients)
        return Iteration.wrong(orthogonalize(x, steps=steps, coefficients=self.coefficients, dtype=torch.float32))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[Iteration]:
    """The package is there, and the device is one of its GPUs."""
    package = ModuleType("gram_newton_schulz")
    package.GramNewtonSchulz = Iteration  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gram_newton_schulz", package)
    monkeypatch.setattr(ns_kernels, "obstacle", lambda device, dtype: None)
    monkeypatch.setattr(Iteration, "wrong", staticmethod(lambda x: x))
    return Iteration


def test_off_unless_asked_for_and_the_report_says_so() -> None:
    assert ns_kernels.decide(False, CPU, BF16, JORDAN) == (
        ns_kernels.Decision(None, "Newton-Schulz kernels: torch (ns_kernels is off)")
    )
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    assert "\nNewton-Schulz kernels: torch (ns_kernels is off)" in DistMuon(model).report()


def test_wanted_in_vain_is_said_aloud_and_trains_as_ever() -> None:
    models, reports = [nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)) for _ in range(2)], []
    models[1].load_state_dict(models[0].state_dict())
    for model, wanted in zip(models, (False, True)):
        optimizer = DistMuon(model, lr=0.1, ns_kernels=wanted)
        if wanted:
            with pytest.warns(UserWarning, match="they need a GPU, the parameters are on cpu"):
                reports.append(optimizer.report())
        model(torch.ones(3, 8)).square().mean().backward()
        optimizer.step()
        optimizer.synchronize()
    assert reports[0].count("Newton-Schulz kernels: torch (they need a GPU") == 1
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)


def test_what_stands_in_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "this one has 8.0" in str(ns_kernels.obstacle(CUDA, BF16))
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert ns_kernels.obstacle(CUDA, BF16) is None
    assert "float32 asks for more" in str(ns_kernels.obstacle(CUDA, torch.float32))
    monkeypatch.setattr(ns_kernels, "obstacle", lambda device, dtype: None)
    monkeypatch.setitem(sys.modules, "gram_newton_schulz", None)  # as if it were not installed
    with pytest.warns(UserWarning, match=r"torch \(gram-newton-schulz is not installed: "):
        assert ns_kernels.decide(True, CPU, BF16, JORDAN).kernel is None


def test_a_right_kernel_is_taken_and_runs_in_our_place(installed: type[Iteration]) -> None:
    decision = ns_kernels.decide(True, CPU, BF16, JORDAN)
    assert decision.line == "Newton-Schulz kernels: gram-newton-schulz (float16, checked against our own)"
    assert Iteration.made == (True, [2, 4], None)  # restarted where our own float16 form restarts
    assert decision is ns_kernels.decide(True, CPU, BF16, JORDAN) and decision.kernel is not None
    matrices = torch.randn(3, 20, 50) * torch.tensor([1e20, 1.0, 1e-20]).view(3, 1, 1)
    calls = []

    def kernel(x: Tensor) -> Tensor:
        calls.append(x.shape)
        assert decision.kernel is not None
        return decision.kernel(x)

    theirs = orthogonalize(matrices, steps=5, coefficients="jordan", kernel=kernel)
    ours = orthogonalize(matrices, steps=5, coefficients="jordan", dtype=torch.float32)
    assert calls == [(3, 20, 50)] and theirs.dtype == BF16 and float((theirs - ours).norm() / ours.norm()) < 5e-3


def _raises(x: Tensor) -> Tensor:
    raise RuntimeError("CUTLASS says no")


def test_ranks_agree_on_the_choice_and_not_on_its_reason(installed: type[Iteration]) -> None:
    groups = [{"rule": "muon", "ns_coefficients": table, "ns_steps": 5} for table in ("jordan", "you")]
    on, off = (Options(ns_kernels=wanted) for wanted in (True, False))
    taken, left = (ns_kernels.summary(options, CPU, groups, reasons=False) for options in (on, off))
    assert taken == "\n".join(["Newton-Schulz kernels: gram-newton-schulz"] * 2)
    assert left == "\n".join(["Newton-Schulz kernels: torch"] * 2)
    assert ns_kernels.summary(on, CPU, groups) == ns_kernels.decide(True, CPU, BF16, JORDAN).line
    assert "no Muon" in ns_kernels.summary(on, CPU, [{"rule": "adamw"}])


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "scale": (lambda x: 1.05 * x, r"Gaussian \(2, 40, 90\) is off by 5.0e-02, our own"),
    "sign": (lambda x: -x, "is off by 2.0e"),
    "one of the stack": (lambda x: x[:1].expand_as(x), r"Gaussian \(2, 40, 90\)"),
    "square ones": (lambda x: x.mT if x.size(1) == x.size(2) else x, r"Gaussian \(2, 64, 64\)"),
    "shape": (lambda x: x[:, :-1], "raised RuntimeError"),
    "NaN": (lambda x: x * float("nan"), "is off by nan"),
    "zeros": (lambda x: x + 1e-30 * (x == 0), r"zero \(2, 40, 90\)"),
    "raises": (_raises, "raised RuntimeError: CUTLASS says no"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_refused_with_its_error(
    name: str, installed: type[Iteration], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, text = WRONG[name]
    monkeypatch.setattr(Iteration, "wrong", staticmethod(wrong))
    with pytest.warns(UserWarning, match=text):
        decision = ns_kernels.decide(True, CPU, BF16, JORDAN)
    assert decision.kernel is None and decision.line.startswith("Newton-Schulz kernels: torch (cross-check: ")


def test_another_polynomial_is_seen(installed: type[Iteration]) -> None:
    polar: tuple[Triple, ...] = resolve("polar_express", 5)
    with pytest.raises(AssertionError, match="off by"):
        assert not ns_kernels.fault(ns_kernels.load(polar), CPU, BF16, JORDAN)


@pytest.mark.parametrize("table", ["jordan", "polar_express", "you", "cans", "cubic"])
def test_the_real_package_computes_our_polynomial(table: str) -> None:
    """Its class, with torch's float16 products: names, shapes, restarts and normalization are what we take them for."""
    pytest.importorskip("gram_newton_schulz")
    triples = resolve(table, 5)
    assert ns_kernels.fault(ns_kernels.load(triples, kernels=False), CPU, BF16, triples) is None
