"""Fine-tuning with peft: which rule an adapter gets, that only it moves, and that it moves as the oracle says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

import distmuon
from distmuon.layout.routing import route
from tests.reference import Reference
from tests.training import assert_equals_reference, digest, weights

peft = pytest.importorskip("peft", reason="pip install distmuon[peft]")
WORDS, WIDTH, TAGS, LR = 19, 12, 5, 0.02


class Tagger(nn.Module):
    """Tokens in, a tag for each out; two blocks between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = (
            nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.second(x + self.first(x)))


ON_BLOCKS = ["first.0", "second.0", "second.2"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "biases of the base": {"bias": "all"},
    "bias of B": {"lora_bias": True},
    "embedding and head adapted": {"target_modules": [*ON_BLOCKS, "embed", "head"]},
    "head trained whole": {"modules_to_save": ["head"]},
    "head and embedding trained whole": {"modules_to_save": ["head", "embed"]},
    "some tokens": {"trainable_token_indices": {"embed": [1, 4, 7]}},
}


def adapted(base: nn.Module | None = None, **options: Any) -> nn.Module:
    """The same on every call; A and B both random, so that no gradient is zero for a structural reason."""
    base = Tagger() if base is None else base
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ON_BLOCKS, "init_lora_weights": False, **options})
    return peft.get_peft_model(base, config)


def make_batch(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    return torch.randint(WORDS, (4, 7), generator=generator), torch.randint(TAGS, (28,), generator=generator)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]).flatten(0, 1), batch[1])


def train(model: nn.Module, optimizer: Any, group: Any, steps: range) -> None:
    """Two micro-batches a step."""
    rank = 0 if group is None else dist.get_rank(group)
    for step in steps:
        with optimizer.no_sync():
            (loss_fn(model, make_batch(step, rank, 0)) / 2).backward()
        (loss_fn(model, make_batch(step, rank, 1)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def tune(group: Any, model: nn.Module, routes: Any) -> dict[str, Tensor]:
    optimizer = distmuon.DistMuon(
        model,
        lr=LR,
        routes=routes,
        sharding=distmuon.Sharding(bucket_mb=0.002),
        precision=distmuon.Precision(newton_schulz=torch.float32),
        process_group=group,
    )
    train(model, optimizer, group, range(3))
    return weights(model, optimizer)


def check_against_oracle(model: nn.Module, ends: list[dict[str, Tensor]], rules: dict[str, str]) -> None:
    """Only what is trainable moved, on all ranks alike, and to where the oracle is."""
    start = {fqn: param.detach().clone() for fqn, param in model.named_parameters()}
    oracle = Reference(model, rules, lr=LR)
    for step in range(3):
        oracle.step(loss_fn, [[make_batch(step, rank, micro) for micro in range(2)] for rank in range(len(ends))])
    assert len({digest(end) for end in ends}) == 1
    assert {fqn for fqn in start if not torch.equal(start[fqn], ends[0][fqn])} == set(oracle.weights)
    assert_equals_reference(ends[0], oracle.weights, start)


def trainable(model: nn.Module) -> set[str]:
    return {fqn for fqn, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("name", OPTIONS)
def test_everything_that_peft_adds_goes_to_adamw(name: str) -> None:
    """The copy of a head that `modules_to_save` trains went to Muon once: nothing but its path said "head"."""
    routed = {spec.fqn: spec for spec, _ in route(adapted(**OPTIONS[name]))}
    assert {spec.rule for spec in routed.values()} == {"adamw"}
    assert set(routed) == trainable(adapted(**OPTIONS[name]))
    with pytest.raises(ValueError, match='routes="adamw"'):  # no Muon at all is never silent
        distmuon.DistMuon(adapted(**OPTIONS[name]))


def test_a_head_that_the_model_names_and_peft_wraps_is_a_head() -> None:
    class Named(Tagger):
        def get_output_embeddings(self) -> nn.Module:
            return self.scorer

        def __init__(self) -> None:
            super().__init__()
            self.scorer, self.head = self.head, None

    reasons = {spec.fqn: spec.reason for spec, _ in route(adapted(Named(), modules_to_save=["scorer"]))}
    (reason,) = [reason for fqn, reason in reasons.items() if fqn.endswith("scorer.modules_to_save.default.weight")]
    assert reason.startswith("output head")


def test_a_dora_convolution_is_decided() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    routed = {spec.fqn: spec for spec, _ in route(adapted(body, target_modules=["0"], use_dora=True))}
    assert {len(spec.shape) for spec in routed.values()} == {4} and {s.rule for s in routed.values()} == {"adamw"}


def _tuned(group: dist.ProcessGroup, name: str) -> dict[str, Tensor]:
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    return tune(group, adapted(**OPTIONS[name]), "adamw")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_on_two_ranks_equals_the_oracle(spawn, name: str) -> None:
    """Some adapters are parameters of a ParameterDict, which is never called: their layer must wait for them."""
    model = adapted(**OPTIONS[name])
    check_against_oracle(model, spawn(_tuned, 2, name=name), dict.fromkeys(trainable(model), "adamw"))


MUON_ROUTES = [distmuon.Route("*.lora_A.*", "muon"), distmuon.Route("*.lora_B.*", "muon", options={"lr": LR})]


def _explicit(group: dist.ProcessGroup) -> dict[str, Tensor]:
    return tune(group, adapted(modules_to_save=["head"]), MUON_ROUTES)


def test_a_and_b_may_be_routed_to_muon(spawn) -> None:
    model = adapted(modules_to_save=["head"])
    rules = {fqn: "muon" if "lora_" in fqn else "adamw" for fqn in trainable(model)}
    assert rules == {spec.fqn: spec.rule for spec, _ in route(model, MUON_ROUTES)}
    check_against_oracle(model, spawn(_explicit, 2), rules)


def _merged(group: dist.ProcessGroup) -> tuple[float, float, float, str]:
    """Merge and unmerge between two steps, against a run that does not."""
    ends = []
    moved = []
    for merges in (False, True):
        model = adapted()
        optimizer = distmuon.DistMuon(model, lr=LR, routes="adamw", process_group=group)
        train(model, optimizer, group, range(2))
        optimizer.synchronize()  # peft reads the adapter's weights without a forward
        if merges:
            tokens = make_batch(9, 0, 0)[0]
            with torch.no_grad():
                apart = model(tokens)
                model.merge_adapter()
                moved.append(float((model(tokens) - apart).abs().max()))
                model.unmerge_adapter()
                moved.append(float((model(tokens) - apart).abs().max()))
        train(model, optimizer, group, range(2, 4))
        ends.append(weights(model, optimizer))
    fresh = adapted()
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(model))
    same = digest({f: p.detach() for f, p in fresh.named_parameters() if "lora_" in f})
    worst = max(float((ends[0][f] - ends[1][f]).abs().max()) for f in ends[0])
    saved = digest({f: p for f, p in ends[1].items() if "lora_" in f})
    return moved[0], moved[1], worst, "" if same == saved else "the adapter's file has other weights"


def test_an_adapter_merged_and_unmerged_trains_on(spawn) -> None:
    """To rounding: peft adds B@A to the weights and subtracts it again."""
    for merged, unmerged, ends, wrong in spawn(_merged, 2):
        assert merged < 1e-5 and unmerged < 1e-5 and ends < 1e-5 and not wrong


class Int8Linear(nn.Linear):
    """A frozen weight of bytes and a scale a row, as quantisers keep it; dequantised in every forward."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features)
        self.register_buffer("scale", source.weight.detach().abs().amax(1, keepdim=True) / 127)
        codes = (source.weight.detach() / self.scale).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, (self.weight.float() - 128) * self.scale, self.bias)


def quantised() -> nn.Module:
    base = Tagger()
    base.second[0], base.second[2] = Int8Linear(base.second[0]), Int8Linear(base.second[2])
    return adapted(base)


def _quantised(group: dist.ProcessGroup) -> tuple[dict[str, Tensor], bool]:
    model = quantised()
    frozen = {f: t for f, t in [*model.named_parameters(), *model.named_buffers()] if not t.requires_grad}
    before = {fqn: (tensor.data_ptr(), tensor.clone()) for fqn, tensor in frozen.items()}
    assert {tensor.dtype for tensor in frozen.values()} == {torch.float32, torch.uint8}
    ends = tune(group, model, "adamw")
    alone = all(t.data_ptr() == before[f][0] and torch.equal(t, before[f][1]) for f, t in frozen.items())
    return ends, alone


def test_quantised_frozen_weights_are_left_where_they_are(spawn) -> None:
    results = spawn(_quantised, 2)
    assert all(alone for _, alone in results)
    model = quantised()
    check_against_oracle(model, [ends for ends, _ in results], dict.fromkeys(trainable(model), "adamw"))


def head_only() -> nn.Module:
    model = Tagger().requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def _head_only(group: dist.ProcessGroup) -> dict[str, Tensor]:
    return tune(group, head_only(), "adamw")


def test_only_the_head_of_a_frozen_model_is_trained(spawn) -> None:
    with pytest.raises(ValueError, match=r"head\.weight \(output head: .*\)"):
        distmuon.DistMuon(head_only())
    check_against_oracle(head_only(), spawn(_head_only, 2), dict.fromkeys(["head.weight", "head.bias"], "adamw"))
