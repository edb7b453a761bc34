"""Attention of transformers' models: largest logits against a plain computation, QK-clip, Muon head by head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPT2Config, LlamaConfig, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import distmuon
from distmuon.integrations import activations
from distmuon.integrations.activations import AttentionLogits, OutputRms, largest_logits
from distmuon.integrations.heads import QKClip, head_routes

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "num_attention_heads": 4}
LATENT = {
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
}


def _config(kind: str) -> Any:
    if kind == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    if kind == "deepseek":
        return DeepseekV3Config(**SMALL, **LATENT)
    made: Any = {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind]
    return made(**SMALL, num_key_value_heads=2, **({"attention_bias": True} if kind == "llama" else {"head_dim": 8}))


def _model(kind: str, attention: str = "sdpa", large: float = 1.0) -> Any:
    """With `large`, the weights of q and k make logits large."""
    torch.manual_seed(3)
    config = _config(kind)
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj")):
                param.mul_(large)
                if name.endswith("bias"):
                    param.normal_(generator=torch.Generator().manual_seed(5))
    return model


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(seed))


def _backward(model: Any, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()


# ------------------------------------------------------------------------------------------------ largest logits


def _plain_logits(query: Tensor, key: Tensor, sees: Any) -> Tensor:
    heads, group = query.size(1), query.size(1) // key.size(1)
    found = torch.full((heads,), float("-inf"))
    for b in range(query.size(0)):
        for h in range(heads):
            for i in range(query.size(2)):
                for j in range(key.size(2)):
                    if sees(b, i, j):
                        logit = 0.5 * query[b, h, i] @ key[b, h // group, j]
                        found[h] = max(found[h], logit)
    return found


@pytest.mark.parametrize("most", [1, 70, 1 << 24])
@pytest.mark.parametrize("case", ["all", "causal", "bool mask", "added mask", "padding", "window", "longer keys"])
def test_largest_logits_are_those_of_a_plain_loop(monkeypatch: Any, case: str, most: int) -> None:
    monkeypatch.setattr(activations, "_MOST_LOGITS", most)
    generator = torch.Generator().manual_seed(1)
    keys = 9 if case == "longer keys" else 6
    query = torch.randn(2, 4, 6, 5, generator=generator)
    key = torch.randn(2, 2, keys, 5, generator=generator)
    random = torch.rand(2, 1, 6, keys, generator=generator) < 0.5
    random[:, :, :, 0] = True
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    mask = {"bool mask": random, "added mask": torch.where(random, 0.0, -1e9), "padding": padding}.get(case)
    sees: Any = {
        "all": lambda b, i, j: True,
        "causal": lambda b, i, j: j <= i,
        "bool mask": lambda b, i, j: bool(random[b, 0, i, j]),
        "added mask": lambda b, i, j: bool(random[b, 0, i, j]),
        "padding": lambda b, i, j: j <= i and bool(padding[b, j]),
        "window": lambda b, i, j: i - 3 < j <= i,
        "longer keys": lambda b, i, j: j <= i + 3,
    }[case]
    window = 3 if case == "window" else None
    found = largest_logits(query, key, mask, causal=case != "all", scaling=0.5, sliding_window=window)
    torch.testing.assert_close(found, _plain_logits(query, key, sees), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "deepseek"])
def test_watching_changes_no_bit_and_leaves_the_registry(kind: str, attention: str) -> None:
    plain, watched = _model(kind, attention), _model(kind, attention)
    logits = AttentionLogits(watched)
    for model in (plain, watched):
        _backward(model, _tokens())
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), watched.parameters()) if a.grad is not None
    )
    found = logits.read()
    assert list(found) == [f"model.layers.{layer}.self_attn" for layer in range(2)]
    assert logits.read() == {}
    _backward(plain, _tokens(1))
    assert logits.read() == {}, "another model's forward"
    with torch.no_grad():
        watched(input_ids=_tokens())
    logits.watching = False
    _backward(watched, _tokens())
    assert logits.read() == {}


def test_a_forward_that_fails_leaves_the_registry() -> None:
    model = _model("llama")
    logits = AttentionLogits(model)
    with pytest.raises(IndexError):
        _backward(model, torch.full((1, 4), 50))
    _backward(_model("llama"), _tokens())
    assert logits.read() == {}


def test_the_logits_are_those_that_attention_is_given() -> None:
    """Two watchers and a user's own entry in the registry do not disturb each other."""
    model = _model("llama", large=4.0)
    seen: dict[Any, list[Tensor]] = {}

    def own(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        found = _plain_logits(query.detach() * 2 * options["scaling"], key.detach(), lambda b, i, j: j <= i)
        seen.setdefault(module, []).append(found)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = own
    try:
        watchers = [AttentionLogits(model), AttentionLogits(model)]
        for seed in range(2):
            _backward(model, _tokens(seed))
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert len(seen) == 2
    for watcher in watchers:
        for module, found in seen.items():
            torch.testing.assert_close(watcher.of(module), torch.maximum(*found), rtol=1e-5, atol=1e-6)


def test_output_rms_is_that_of_the_blocks() -> None:
    model = _model("llama")
    watched = OutputRms(model)
    states = [model(input_ids=_tokens(seed), output_hidden_states=True).hidden_states[1] for seed in range(2)]
    found = watched.read()
    assert list(found) == ["model.layers.0", "model.layers.1"]
    wanted = float(torch.stack([state.detach().square().mean() for state in states]).mean().sqrt())
    assert found["model.layers.0"] == pytest.approx(wanted, rel=1e-6)
    assert watched.read() == {}


def test_a_model_without_such_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="found no attention module of transformers"):
        AttentionLogits(nn.Linear(3, 3))


# ------------------------------------------------------------------------------------------------------- QK-clip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_clipped_heads_have_the_threshold(kind: str, attention: str) -> None:
    """With lr 0 the weights change by the clip alone. Layers are clipped one by one, since a layer changes the next."""
    model = _model(kind, attention, large=20.0)
    optimizer = distmuon.DistMuon(model, lr=0.0)
    clip = QKClip(model, optimizer, threshold=3.0)
    before = copy.deepcopy(model)
    seen = []
    for _ in range(3):
        _backward(model, _tokens())
        seen.append([clip.logits.of(module) for module in clip.logits.modules])
        optimizer.step()
        optimizer.zero_grad()
    heads_above = seen[0][0] > 3.0
    assert heads_above.any()
    groups = 2 if kind == "llama" else 1
    clipped = heads_above.view(-1, groups).any(1)
    assert torch.allclose(seen[1][0].view(-1, groups).amax(1)[clipped], torch.tensor(3.0), rtol=1e-5)
    assert float(seen[2][1].max()) <= 3.0 * (1 + 1e-5)
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before.get_parameter(name))}
    clippable = ("q_proj", "k_proj") if kind == "llama" else ("q_b_proj", "kv_b_proj")
    assert changed
    assert all(name.split(".")[-2] in clippable for name in changed)
    if kind == "llama":
        assert any(name.endswith("bias") for name in changed)
    else:  # values keep their rows
        old, new = (m.model.layers[0].self_attn.kv_b_proj.weight.view(4, 14, -1) for m in (before, model))
        assert torch.equal(old[:, 8:], new[:, 8:])


def _clipped_run(group: Any, dtype: torch.dtype, sharded: bool, **options: Any) -> Any:
    model = _model("llama", large=20.0).to(dtype)
    if sharded:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    else:
        options["process_group"] = group
    optimizer = distmuon.DistMuon(model, lr=0.01, **options)
    clip = QKClip(model, optimizer, threshold=3.0)
    for step in range(3):
        for rank in range(2):  # every batch of the step, or this rank's
            if group.size() == 1 or rank == group.rank():
                with optimizer.no_sync() if group.size() == 1 and rank == 0 else torch.enable_grad():
                    (
                        model(input_ids=_tokens(10 * step + rank), labels=_tokens(step + 7 * rank)).loss
                        / (3 - group.size())
                    ).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert clip.logits.read() == {}
    optimizer.synchronize()
    full = {name: p.full_tensor() if sharded else p for name, p in model.named_parameters()}
    sent = optimizer.metrics()["bytes"]
    return {name: value.detach().float().clone() for name, value in full.items()}, sent


@pytest.mark.parametrize(
    ("sharded", "options"),
    [
        (False, {}),
        (False, {"overlap": "forward"}),
        (False, {"param_gather": "updates"}),
        (True, {}),
    ],
)
def test_qk_clip_on_two_ranks_is_that_of_one(spawn, sharded: bool, options: dict[str, Any]) -> None:
    """The largest logits of all ranks decide; nothing but 4 bytes a head travels for it."""
    ((alone, _),) = spawn(_clipped_run, 1, dtype=torch.float32, sharded=False)
    two = spawn(_clipped_run, 2, dtype=torch.float32, sharded=sharded, **options)
    for weights, sent in two:
        for name, wanted in alone.items():
            torch.testing.assert_close(weights[name], wanted, rtol=2e-3, atol=2e-4)
        assert sent["qk_clip"] == 2 * 4 * 4  # bytes: layers, heads, float32
    assert all(torch.equal(two[0][0][name], two[1][0][name]) for name in alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_drops_the_factors(bad: float) -> None:
    model = nn.Linear(20, 20)
    optimizer = distmuon.DistMuon(model, lr=0.0)
    before = copy.deepcopy(model)
    for scale in (bad, 1.0):
        model.zero_grad()
        (scale * model(torch.ones(20)).sum()).backward()
        if scale != 1.0:
            optimizer.scale_rows({"weight": torch.full((20,), 0.5), "bias": torch.full((20,), 0.5)})
        optimizer.step()
    assert torch.equal(model.weight, before.weight)
    assert torch.equal(model.bias, before.bias)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_parameter_without_a_gradient_is_not_scaled(missing: str) -> None:
    """Under Muon and under AdamW; the other one is scaled, once."""
    model = nn.Linear(20, 20)
    before = copy.deepcopy(model)
    optimizer = distmuon.DistMuon(model, lr=0.0)
    optimizer.scale_rows({"weight": torch.full((20,), 0.5), "bias": torch.full((20,), 0.5)})
    for _ in range(2):
        model(torch.ones(20)).sum().backward()
        model.get_parameter(missing).grad = None
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.named_parameters():
        assert torch.equal(param, before.get_parameter(name) * (1.0 if name == missing else 0.5)), name


@pytest.mark.parametrize("precision", [{}, {"master": "remainder"}])
def test_masters_are_scaled_not_their_rounded_copies(precision: Any) -> None:
    """Scaled three times by 0.9, a bfloat16 weight is the rounded product, not a product rounded three times."""
    model = nn.Linear(64, 64, bias=False).bfloat16()
    start = model.weight.detach().float()
    optimizer = distmuon.DistMuon(model, lr=0.0, precision=distmuon.Precision(**precision))
    factors = torch.linspace(0.5, 1.0, 64)
    wanted = start
    for _ in range(3):
        model(torch.ones(64, dtype=torch.bfloat16)).sum().backward()
        optimizer.scale_rows({"weight": factors})
        optimizer.step()
        optimizer.zero_grad()
        wanted = wanted * factors[:, None]
    assert torch.equal(model.weight, wanted.bfloat16())


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        ({"wrong": torch.ones(20)}, "no trainable parameter of this optimizer"),
        ({"weight": torch.ones(3)}, r"\(3,\); a factor for each of 20 rows"),
    ],
)
def test_factors_that_fit_no_parameter_are_refused(factors: dict[str, Tensor], reason: str) -> None:
    optimizer = distmuon.DistMuon(nn.Linear(20, 20), lr=0.0)
    with pytest.raises(ValueError, match=reason):
        optimizer.scale_rows(factors)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("qwen3", None, "normalizes q and k"),
        ("gpt2", None, "q_proj and k_proj, or q_b_proj and kv_b_proj, are needed"),
        ("llama", "frozen", "not trained by this optimizer"),
        ("llama", "threshold", "a logit above 0 is needed"),
    ],
)
def test_attention_that_qk_clip_cannot_scale_is_refused(kind: str, change: str | None, reason: str) -> None:
    model = _model(kind)
    if change == "frozen":
        model.model.layers[0].self_attn.k_proj.weight.requires_grad = False
    optimizer = distmuon.DistMuon(model, lr=0.01)
    with pytest.raises(ValueError, match=reason):
        clip = QKClip(model, optimizer, threshold=0.0 if change == "threshold" else 100.0)
        _backward(model, _tokens())
        clip._clip()


# -------------------------------------------------------------------------------------------------- head by head


@pytest.mark.parametrize("kind", ["llama", "qwen3", "deepseek"])
def test_head_routes_cut_queries_keys_and_values(kind: str) -> None:
    model = _model(kind)
    specs = {spec.fqn: spec for spec, _ in distmuon.route(model, head_routes(model))}
    layer = "model.layers.1.self_attn"
    shapes = {
        "llama": {"q_proj": [(8, 32)] * 4, "k_proj": [(8, 32)] * 2, "v_proj": [(8, 32)] * 2, "o_proj": [(32, 32)]},
        "qwen3": {"q_proj": [(8, 32)] * 4, "k_proj": [(8, 32)] * 2, "v_proj": [(8, 32)] * 2, "o_proj": [(32, 32)]},
        "deepseek": {"q_b_proj": [(12, 16)] * 4, "kv_b_proj": [(8, 16), (6, 16)] * 4, "o_proj": [(32, 24)]},
    }[kind]
    for projection, wanted in shapes.items():
        matrices = specs[f"{layer}.{projection}.weight"].matrices
        assert [(unit.rows, unit.columns) for unit in matrices] == wanted


def test_a_config_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="both factors must be declared"):
        head_routes(_model("gpt2"))
    model = _model("llama")
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 24)
    with pytest.raises(ValueError, match=r"found 24 rows, and heads of 32 rows in its config"):
        head_routes(model)


class _Attention(nn.Module):
    """A query weight of four heads, whole or as a weight for each."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        weight = torch.randn(64, 20, generator=torch.Generator().manual_seed(2))
        parts = [weight] if whole else list(weight.split(16))
        self.q = nn.ParameterList([nn.Parameter(part.clone()) for part in parts])
        self.out = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(x @ torch.cat(list(self.q)).mT)
        return result


def _train_heads(group: Any, whole: bool) -> Any:
    model = _Attention(whole)
    routes = [distmuon.Route("q.*", "muon", heads=4 if whole else None)]
    optimizer = distmuon.DistMuon(model, lr=0.01, routes=routes, process_group=group, packing="contiguous")
    for step in range(4):
        x = torch.randn(6, 20, generator=torch.Generator().manual_seed(10 * step + group.rank()))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([part.detach() for part in model.q]), optimizer.metrics()["bytes"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_heads_of_one_weight_train_as_weights_of_their_own_do(spawn, size: int) -> None:
    """Bit for bit, and with the same bytes."""
    for (one, sent), (several, other) in zip(
        spawn(_train_heads, size, whole=True), spawn(_train_heads, size, whole=False)
    ):
        assert torch.equal(one, several)
        assert {**sent, "guard": 0} == {**other, "guard": 0}  # which has a number for each parameter


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        ({"heads": 0}, "a number of equal parts, 1 or more"),
        ({"heads": 2, "split": [8, 8]}, "found 2 beside split"),
        ({"heads": 3}, r"heads=3 along dimension 0 of \(16, 16\)"),
    ],
)
def test_heads_that_do_not_fit_are_refused(route: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        distmuon.DistMuon(nn.Linear(16, 16), routes=[distmuon.Route("weight", "muon", **route)])
