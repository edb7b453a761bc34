"""Golden routing tables: what Muon gets in the models people have, and the errors where nothing decides.

A table lists the logical matrices of every Muon parameter; every other trainable parameter must be AdamW's.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distmuon.routing import Route, route

Table = dict[str, list[tuple[int, int]]]


def table(model: nn.Module, routes=None) -> Table:
    """{fqn: shapes that Newton-Schulz sees} of the Muon parameters, each parameter accounted for exactly once."""
    routed = route(model, routes)
    assert [(spec.fqn, id(param)) for spec, param in routed] == [
        (fqn, id(param)) for fqn, param in model.named_parameters() if param.requires_grad
    ]
    found = {}
    for spec, param in routed:
        assert spec.shape == tuple(param.shape) and spec.dtype == param.dtype and spec.rule in ("muon", "adamw")
        shapes = [shape for matrix in spec.matrices for shape in matrix.logical_shapes]
        assert sum(m * n for m, n in shapes) == (param.numel() if spec.rule == "muon" else 0)
        if spec.rule == "muon":
            found[spec.fqn] = shapes
    return found


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


@pytest.mark.parametrize("tied", [False, True])
def test_llama(transformers, tied: bool) -> None:
    config = transformers.LlamaConfig(**SMALL, **TOKENS, num_hidden_layers=2, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    expected: Table = {}
    for layer in ("model.layers.0", "model.layers.1"):
        expected[f"{layer}.self_attn.q_proj.weight"] = [(16, 16)]
        expected[f"{layer}.self_attn.k_proj.weight"] = [(8, 16)]
        expected[f"{layer}.self_attn.v_proj.weight"] = [(8, 16)]
        expected[f"{layer}.self_attn.o_proj.weight"] = [(16, 16)]
        expected[f"{layer}.mlp.gate_proj.weight"] = [(24, 16)]
        expected[f"{layer}.mlp.up_proj.weight"] = [(24, 16)]
        expected[f"{layer}.mlp.down_proj.weight"] = [(16, 24)]
    assert table(model) == expected
    names = [spec.fqn for spec, _ in route(model)]
    assert ("lm_head.weight" in names) == (not tied), "a tied weight counts once, under its first name"


@pytest.mark.parametrize("tied", [False, True])
def test_gpt2_stores_in_out_and_fuses_qkv(transformers, tied: bool) -> None:
    config = transformers.GPT2Config(
        **TOKENS, vocab_size=50, n_embd=16, n_layer=1, n_head=4, n_positions=32, tie_word_embeddings=tied
    )
    block = "transformer.h.0"
    assert table(transformers.GPT2LMHeadModel(config)) == {
        f"{block}.attn.c_attn.weight": [(16, 16)] * 3,
        f"{block}.attn.c_proj.weight": [(16, 16)],
        f"{block}.mlp.c_fc.weight": [(16, 64)],
        f"{block}.mlp.c_proj.weight": [(64, 16)],
    }


def test_qwen2_moe(transformers) -> None:
    config = transformers.Qwen2MoeConfig(
        **SMALL, **TOKENS, num_hidden_layers=1, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
    )  # fmt: skip
    layer = "model.layers.0"
    assert table(transformers.Qwen2MoeForCausalLM(config)) == {
        f"{layer}.self_attn.q_proj.weight": [(16, 16)],
        f"{layer}.self_attn.k_proj.weight": [(8, 16)],
        f"{layer}.self_attn.v_proj.weight": [(8, 16)],
        f"{layer}.self_attn.o_proj.weight": [(16, 16)],
        f"{layer}.mlp.gate.weight": [(3, 16)],
        f"{layer}.mlp.experts.gate_up_proj": [(12, 16)] * 6,
        f"{layer}.mlp.experts.down_proj": [(16, 12)] * 3,
        f"{layer}.mlp.shared_expert.gate_proj.weight": [(20, 16)],
        f"{layer}.mlp.shared_expert.up_proj.weight": [(20, 16)],
        f"{layer}.mlp.shared_expert.down_proj.weight": [(16, 20)],
        f"{layer}.mlp.shared_expert_gate.weight": [(1, 16)],
    }


def test_deepseek_v3(transformers) -> None:
    config = transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, **TOKENS, num_hidden_layers=2, first_k_dense_replace=1,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=12,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    expected: Table = {}
    for layer in ("model.layers.0", "model.layers.1"):
        expected[f"{layer}.self_attn.q_a_proj.weight"] = [(8, 16)]
        expected[f"{layer}.self_attn.q_b_proj.weight"] = [(32, 8)]
        expected[f"{layer}.self_attn.kv_a_proj_with_mqa.weight"] = [(12, 16)]
        expected[f"{layer}.self_attn.kv_b_proj.weight"] = [(32, 8)]
        expected[f"{layer}.self_attn.o_proj.weight"] = [(16, 16)]
    for name, hidden in (("model.layers.0.mlp", 24), ("model.layers.1.mlp.shared_experts", 12)):
        expected[f"{name}.gate_proj.weight"] = [(hidden, 16)]
        expected[f"{name}.up_proj.weight"] = [(hidden, 16)]
        expected[f"{name}.down_proj.weight"] = [(16, hidden)]
    expected["model.layers.1.mlp.experts.gate_up_proj"] = [(12, 16)] * 8
    expected["model.layers.1.mlp.experts.down_proj"] = [(16, 12)] * 4
    expected["model.layers.1.mlp.gate.weight"] = [(4, 16)]
    assert table(transformers.DeepseekV3ForCausalLM(config)) == expected


class Vision(nn.Module):
    """A ViT: patches by convolution, raw tokens, torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.zeros(1, 17, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm = nn.LayerNorm((17, 16))
        self.head = nn.Linear(16, 10)


def test_vit() -> None:
    routes = [Route("class_token", "adamw"), Route("positions", "adamw")]
    assert table(Vision(), routes) == {
        "patches.weight": [(16, 48)],
        "encoder.layers.0.self_attn.in_proj_weight": [(16, 16)] * 3,
        "encoder.layers.0.self_attn.out_proj.weight": [(16, 16)],
        "encoder.layers.0.linear1.weight": [(24, 16)],
        "encoder.layers.0.linear2.weight": [(16, 24)],
    }


def test_raw_tensors_are_not_guessed() -> None:
    """All of them in one message, each with its shape, and the cure."""
    with pytest.raises(ValueError, match=r"class_token \(1, 1, 16\), positions \(1, 17, 16\): .*distmuon\.Route"):
        route(Vision())


def test_resnet() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.downsample = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12))
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

    model = nn.Module()
    model.conv1, model.bn1, model.layer1, model.fc = (
        nn.Conv2d(3, 8, 7),
        nn.BatchNorm2d(8),
        nn.Sequential(Block()),
        nn.Linear(12, 5),
    )
    assert table(model) == {
        "conv1.weight": [(8, 147)],
        "layer1.0.conv1.weight": [(8, 72)],
        "layer1.0.downsample.0.weight": [(12, 8)],
    }


class Language(nn.Module):
    """An embedding, one block, and an output layer called anything but a head."""

    def __init__(self, tied: bool, outputs: int = 30) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.blocks = nn.Sequential(nn.Linear(16, 16))
        self.to_tokens = nn.Linear(16, outputs, bias=False)
        if tied:
            self.to_tokens.weight = self.tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_by_any_name_goes_to_adamw(tied: bool) -> None:
    """Tied: by identity, without any name or shape. Untied: it maps to the vocabulary of an embedding."""
    assert table(Language(tied)) == {"blocks.0.weight": [(16, 16)]}


def test_a_tie_is_seen_by_identity_alone() -> None:
    """The tied layer comes first, sits among numbered blocks and has no telling name: only the embedding decides."""
    model = nn.Module()
    model.blocks = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 30, bias=False))
    model.tokens = nn.Embedding(30, 16)
    model.blocks[1].weight = model.tokens.weight
    assert table(model) == {"blocks.0.weight": [(16, 16)]}


def test_lora_adapters_go_to_adamw_and_frozen_weights_nowhere() -> None:
    model = nn.Module()
    model.base = nn.Linear(16, 16).requires_grad_(False)
    model.q_proj = nn.ModuleDict(
        {"lora_A": nn.ModuleDict({"default": nn.Linear(16, 2)}), "lora_B": nn.ModuleDict({"default": nn.Linear(2, 16)})}
    )
    assert table(model) == {}
    assert not [spec for spec, _ in route(model) if "base" in spec.fqn]
    assert table(model, [Route("*lora_A*.weight", "muon")]) == {"q_proj.lora_A.default.weight": [(2, 16)]}


def test_routes_go_first_and_the_first_match_wins() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6), nn.Embedding(9, 6))
    routes = [
        Route("0.weight", "muon", split=[6, 4, 2]),
        Route("1.weight", "muon", split=[7, 5], split_dim=1),
        Route("2.weight", "muon", options={"lr": 0.5}),
        Route("*.weight", "adamw"),
    ]
    # every parameter of the last route was decided before it: a route that decides nothing is an error, so leave it out
    assert table(model, routes[:3]) == {
        "0.weight": [(6, 6), (4, 6), (2, 6)],
        "1.weight": [(6, 7), (6, 5)],
        "2.weight": [(9, 6)],
    }
    assert dict(next(spec for spec, _ in route(model, routes[:3]) if spec.fqn == "2.weight").options) == {"lr": 0.5}
    assert table(model, [routes[1], routes[3]]) == {"1.weight": [(6, 7), (6, 5)]}
    assert table(model, "adamw") == {}


def test_fused_parts_of_a_stack() -> None:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(2, 10, 4)))
    assert table(model, [Route("w", "muon", split=[7, 3])]) == {"w": [(7, 4), (3, 4)] * 2}
    assert table(model, [Route("w", "muon", split=[3, 1], split_dim=1)]) == {"w": [(10, 3), (10, 1)] * 2}


@pytest.mark.parametrize(
    ("routes", "match"),
    [
        ([Route("0.wieght", "muon")], r"Route\('0.wieght'\): matched no parameter; .*; correct the pattern"),
        ([Route("0.weight", "muon", split=[6, 5])], r"0\.weight: split=\[6, 5\] sums to 11 .*\(12, 6\).*; correct"),
        ([Route("0.weight", "muon", split=[12, 0])], r"0\.weight: split=\[12, 0\]"),
        ([Route("0.bias", "muon")], r"0\.bias: shape \(12,\) was routed to muon; a matrix is needed .*; route it"),
        ("muon", r"routes: found 'muon'; one of adamw is needed"),
    ],
)
def test_errors_name_the_parameter_and_the_cure(routes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        route(nn.Sequential(nn.Linear(6, 12)), routes)


def test_more_errors() -> None:
    with pytest.raises(ValueError, match=r"Route\('x'\)\.rule: found 'sgd'; one of muon, adamw is needed"):
        Route("x", "sgd")
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(2, 3, 4, 5)))
    with pytest.raises(ValueError, match=r"w: shape \(2, 3, 4, 5\) with 4 dimensions outside a convolution"):
        route(model, [Route("w", "muon")])
    with pytest.raises(ValueError, match=r"0\.weight \(12, 6\), 1\.weight \(6, 12\): 2 weights"):
        route(list(nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6)).named_parameters()))
