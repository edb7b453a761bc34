"""Golden routing tables: what Muon gets in the models people have, and the errors where nothing decides.

A table lists the logical matrices of every Muon parameter; every other trainable parameter must be AdamW's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import distmuon
from distmuon.layout.routing import Route, route
from tests.routing_models import MODELS, Block
from tests.routing_models import table as golden_table

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
    "hidden_size": 64,
    "intermediate_size": 96,
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
        expected[f"{layer}.self_attn.q_proj.weight"] = [(64, 64)]
        expected[f"{layer}.self_attn.k_proj.weight"] = [(32, 64)]
        expected[f"{layer}.self_attn.v_proj.weight"] = [(32, 64)]
        expected[f"{layer}.self_attn.o_proj.weight"] = [(64, 64)]
        expected[f"{layer}.mlp.gate_proj.weight"] = [(96, 64)]
        expected[f"{layer}.mlp.up_proj.weight"] = [(96, 64)]
        expected[f"{layer}.mlp.down_proj.weight"] = [(64, 96)]
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
        **SMALL,
        **TOKENS,
        num_hidden_layers=1,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
    )
    layer = "model.layers.0"
    assert table(transformers.Qwen2MoeForCausalLM(config)) == {
        f"{layer}.self_attn.q_proj.weight": [(64, 64)],
        f"{layer}.self_attn.k_proj.weight": [(32, 64)],
        f"{layer}.self_attn.v_proj.weight": [(32, 64)],
        f"{layer}.self_attn.o_proj.weight": [(64, 64)],
        f"{layer}.mlp.gate.weight": [(6, 64)],
        f"{layer}.mlp.experts.gate_up_proj": [(48, 64)] * 12,
        f"{layer}.mlp.experts.down_proj": [(64, 48)] * 6,
        f"{layer}.mlp.shared_expert.gate_proj.weight": [(80, 64)],
        f"{layer}.mlp.shared_expert.up_proj.weight": [(80, 64)],
        f"{layer}.mlp.shared_expert.down_proj.weight": [(64, 80)],
    }


def test_deepseek_v3(transformers) -> None:
    config = transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        **TOKENS,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=48,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )
    expected: Table = {}
    for layer in ("model.layers.0", "model.layers.1"):
        expected[f"{layer}.self_attn.q_a_proj.weight"] = [(32, 64)]
        expected[f"{layer}.self_attn.q_b_proj.weight"] = [(128, 32)]
        expected[f"{layer}.self_attn.kv_a_proj_with_mqa.weight"] = [(48, 64)]
        expected[f"{layer}.self_attn.kv_b_proj.weight"] = [(128, 32)]
        expected[f"{layer}.self_attn.o_proj.weight"] = [(64, 64)]
    for name, hidden in (("model.layers.0.mlp", 96), ("model.layers.1.mlp.shared_experts", 48)):
        expected[f"{name}.gate_proj.weight"] = [(hidden, 64)]
        expected[f"{name}.up_proj.weight"] = [(hidden, 64)]
        expected[f"{name}.down_proj.weight"] = [(64, hidden)]
    expected["model.layers.1.mlp.experts.gate_up_proj"] = [(48, 64)] * 8
    expected["model.layers.1.mlp.experts.down_proj"] = [(64, 48)] * 4
    expected["model.layers.1.mlp.gate.weight"] = [(4, 64)]
    assert table(transformers.DeepseekV3ForCausalLM(config)) == expected


class Raw(nn.Module):
    """Raw parameters that no name decides, two alike in numbered layers, and one that would be 4-dimensional."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.mix_bias = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16, 16))
            self.linear = nn.Linear(16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Raw.Layer() for _ in range(3))
        self.cube, self.hyper = nn.Parameter(torch.zeros(3, 16, 16)), nn.Parameter(torch.zeros(2, 3, 16, 16))
        self.head = nn.Linear(16, 30)


def pasted(error: ValueError) -> list[Route]:
    """The routes that a refusal tells to add, evaluated as a user would."""
    return eval(str(error).rsplit("routes=", 1)[1], {"distmuon": distmuon})


def test_raw_tensors_are_not_guessed_and_the_routes_to_paste_are_accepted() -> None:
    """All of them in one message, each with its shape; alike ones under one pattern that spares what is beside them."""
    with pytest.raises(ValueError, match=r"cube \(3, 16, 16\), hyper \(2, 3, 16, 16\), layers\.0\.mix ") as raised:
        distmuon.DistMuon(Raw())
    assert "layers.0.mix (16, 16) and 2 more of layers.*.mix: 5 weights" in str(raised.value)
    routes = pasted(raised.value)
    assert [(r.pattern, r.rule) for r in routes] == [("cube", "adamw"), ("hyper", "adamw"), ("layers.*.mix", "muon")]
    found = {spec.fqn: spec.rule for spec, _ in route(Raw(), routes)}
    assert found["layers.2.mix"] == "muon" and found["layers.2.mix_bias"] == "adamw"
    distmuon.DistMuon(Raw(), routes=routes)


def test_patterns_to_paste_match_nothing_else() -> None:
    """`layers.*.mix` would also take `layers.0.inner.mix`, which is a vector; then each is named by itself."""
    model = Raw()
    model.layers[0].inner = nn.Module()
    model.layers[0].inner.mix = nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError) as raised:
        distmuon.DistMuon(model)
    routes = pasted(raised.value)
    assert [r.pattern for r in routes][2:] == ["layers.0.mix", "layers.1.mix", "layers.2.mix"]
    distmuon.DistMuon(model, routes=routes)


def test_routes_to_paste_are_muons_where_nothing_else_is() -> None:
    """A cure must not be refused next: a stack goes to Muon if AdamW alone would be left, and 4 dimensions never do."""

    class Stack(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.stack, self.bias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(16))

    with pytest.raises(ValueError) as raised:
        distmuon.DistMuon(Stack(3, 16, 16))
    assert len(distmuon.DistMuon(Stack(3, 16, 16), routes=pasted(raised.value)).param_groups) == 2
    with pytest.raises(ValueError, match='reshape them to matrices, or pass routes="adamw"'):
        distmuon.DistMuon(Stack(2, 3, 16, 16))


def test_routes_to_paste_come_after_those_given() -> None:
    given = [Route("cube", "muon")]
    with pytest.raises(ValueError, match=r"check and add routes=\[\.\.\., distmuon") as raised:
        route(Raw(), given)
    added = eval(str(raised.value).rsplit("routes=", 1)[1].replace("..., ", ""), {"distmuon": distmuon})
    assert route(Raw(), [*given, *added])


def test_resnet() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.downsample = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))
            self.depthwise = nn.Conv2d(32, 32, 3, groups=32)

    model = nn.Module()
    model.conv1, model.bn1 = nn.Conv2d(3, 8, 7), nn.BatchNorm2d(8)
    model.layer1, model.fc = nn.Sequential(Block()), nn.Linear(32, 9)
    assert table(model) == {"layer1.0.conv1.weight": [(8, 72)], "layer1.0.downsample.0.weight": [(32, 8)]}


def test_one_input_channel_is_not_depthwise() -> None:
    """Groups decide. The third convolution of a network on gray pictures was taken for a depthwise one."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.Conv2d(16, 1, 9), nn.Conv2d(1, 32, 5), nn.Conv2d(32, 32, 5, groups=32), nn.Linear(9, 40)
    )
    assert {spec.fqn: spec.reason for spec, _ in route(model) if len(spec.shape) > 1} == {
        "0.weight": "input: first convolution",
        "1.weight": "convolution",
        "2.weight": "convolution",
        "3.weight": "depthwise convolution",
        "4.weight": "output head: last layer of a model without repeated blocks",
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


# ------------------------------------------------------------------------------------------------------ golden tables

GOLDEN = json.loads((Path(__file__).parent / "golden_routes.json").read_text())


def test_every_model_has_a_golden_table() -> None:
    assert set(GOLDEN) == set(MODELS) and len(MODELS) >= 20


@pytest.mark.parametrize("name", MODELS)
def test_the_golden_tables(transformers, name: str) -> None:
    """Parameter pattern -> rule and reason; read `tests/routing_models.py` before you renew them."""
    assert golden_table(MODELS[name]()) == GOLDEN[name]


# ------------------------------------------------------------------------------------------------- heads and no heads


def rules(model: Any, routes: Any = None) -> dict[str, str]:
    """{fqn: rule} of all parameters but vectors."""
    return {spec.fqn: spec.rule for spec, _ in route(model, routes) if len(spec.shape) > 1}


def heads(model: nn.Module, routes: Any = None) -> set[str]:
    return {spec.fqn for spec, _ in route(model, routes) if spec.reason.startswith("output head: ")}


def net(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


class Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(m, n) for m, n in pairwise(widths)))


class Patches(nn.Module):
    """Called patch embedding, and linear, as where patches are cut by a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 32), nn.LayerNorm(32))
        self.blocks = blocks()


class NamesItsHead(nn.Module):
    """What the head is put upon holds a projector that was registered after its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net(layers=blocks(), projector=nn.Linear(32, 32))
        self.lm_head, self.score = nn.Linear(32, 99), nn.Linear(32, 12)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


HEADS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "only blocks": (lambda: blocks(3), set()),
    "only blocks in a Sequential": (lambda: nn.Sequential(Block(), Block()), set()),
    "one block": (lambda: nn.Sequential(Block()), set()),
    "blocks and a norm": (lambda: net(layers=blocks(), norm=nn.LayerNorm(32)), set()),
    "blocks that are single layers": (lambda: nn.ModuleList(nn.Linear(32, 32) for _ in range(3)), set()),
    "numbered attributes": (lambda: net(block1=Block(), block2=Block()), set()),
    "pipeline": (lambda: nn.Sequential(nn.Embedding(99, 32), Block(), Block(), nn.Linear(32, 99)), {"3.weight"}),
    "square head": (lambda: net(layers=blocks(), up=nn.Linear(32, 32)), {"up.weight"}),
    "same-width logits": (
        lambda: net(layers=blocks(), to_logits=nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))),
        {"to_logits.1.weight"},
    ),
    "second head and value head": (
        lambda: net(layers=blocks(), pi=nn.Linear(32, 9), v=mlp(32, 48, 9)),
        {"pi.weight", "v.0.weight", "v.1.weight"},
    ),
    "list of Sequential heads": (
        lambda: net(layers=blocks(), outs=nn.ModuleList(mlp(32, 64, k) for k in (9, 8))),
        {f"outs.{i}.{j}.weight" for i in (0, 1) for j in (0, 1)},
    ),
    "list of heads of other widths": (
        lambda: net(layers=blocks(), outs=nn.ModuleList((nn.Linear(32, 9), nn.Linear(64, 9)))),
        {"outs.0.weight", "outs.1.weight"},
    ),
    "dict of heads": (
        lambda: net(layers=blocks(), tasks=nn.ModuleDict({"a": nn.Linear(32, 9), "b": Mlp(32, 32, 12)})),
        {"tasks.a.weight", "tasks.b.net.0.weight", "tasks.b.net.2.weight"},
    ),
    "head of the blocks' own class": (
        lambda: net(layers=nn.ModuleList(Mlp(32, 64, 32) for _ in range(2)), out=Mlp(32, 64, 10)),
        {"out.net.2.weight"},
    ),
    "head registered first": (lambda: net(head=nn.Linear(32, 10), layers=blocks()), {"head.weight"}),
    "head registered first, no blocks": (lambda: net(head=nn.Linear(32, 10), body=mlp(16, 32, 32)), {"head.weight"}),
    "auxiliary classifier in the middle": (
        lambda: net(a=blocks(), aux=mlp(32, 64, 10), b=blocks(), fc=nn.Linear(32, 10)),
        {"aux.1.weight", "fc.weight"},
    ),
    "compiled head": (
        lambda: net(layers=blocks(), head=torch.compile(nn.Linear(32, 10), backend="eager")),
        {"head._orig_mod.weight"},
    ),
    "compiled model": (
        lambda: torch.compile(net(layers=blocks(), out=nn.Linear(32, 9)), backend="eager"),
        {"_orig_mod.out.weight"},
    ),
    "encoder and decoder": (
        lambda: net(a=net(layers=blocks(), proj=nn.Linear(32, 32)), b=net(layers=blocks()), out=nn.Linear(32, 9)),
        {"out.weight"},
    ),
    "body and head": (
        lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(nn.Flatten(), *mlp(32, 64, 9))),
        {"1.1.weight", "1.2.weight"},
    ),
    "multi-modal bridge": (
        lambda: net(vision=blocks(), text=blocks(), multi_modal_projector=mlp(32, 64), lm_head=nn.Linear(32, 99)),
        {"lm_head.weight"},
    ),
    "branches that are joined": (
        lambda: net(path_1=Mlp(32, 64, 24), path_2=Mlp(32, 64, 24), out=nn.Linear(48, 9)),
        {"out.weight"},
    ),
    "a stem in a list, and a trunk outside": (
        lambda: net(stem=nn.ModuleList([Mlp(8, 64, 32)]), a=nn.Linear(32, 48), b=nn.Linear(48, 64), c=nn.Linear(64, 9)),
        {"c.weight"},
    ),
    "head named by the model": (NamesItsHead, {"lm_head.weight", "score.weight"}),
    "no blocks": (lambda: mlp(32, 64, 64, 32), {"2.weight"}),
    "no blocks, list": (lambda: net(layers=nn.ModuleList(mlp(32, 64, 48))), {"layers.1.weight"}),
    "no blocks, two heads": (
        lambda: net(body=mlp(32, 64, 64), policy=nn.Linear(64, 9), baseline=nn.Linear(64, 8)),
        {"policy.weight", "baseline.weight"},
    ),
    "two networks": (
        lambda: net(actor=Mlp(32, 64, 9), critic=Mlp(32, 64, 8)),
        {"actor.net.2.weight", "critic.net.2.weight"},
    ),
    "autoencoder": (lambda: net(encoder=mlp(96, 48, 16), decoder=mlp(16, 48, 96)), {"decoder.1.weight"}),
    "heads of an attention": (
        lambda: net(a=blocks(), multi_head_attention=mlp(32, 32, 32), b=blocks(), out=nn.Linear(32, 9)),
        {"out.weight"},
    ),
    "linear patches": (Patches, set()),
}


@pytest.mark.parametrize("name", HEADS)
def test_what_comes_after_the_last_block_is_output(name: str) -> None:
    """And nothing else: every other matrix of these models is Muon's."""
    build, expected = HEADS[name]
    model = build()
    assert heads(model) == expected
    others = {fqn for fqn, rule in rules(model).items() if rule == "adamw" and "gamma" not in fqn} - expected
    tables = {fqn for fqn in others if "embed" in fqn or fqn in ("0.weight",)}
    assert others == tables


def test_linear_patch_embeddings_are_inputs() -> None:
    (found,) = [spec for spec, _ in route(Patches()) if spec.fqn == "to_patch_embedding.1.weight"]
    assert (found.rule, found.reason) == ("adamw", "input: patch embedding")


def test_a_head_behind_a_wrapper_is_a_head() -> None:
    """DistributedDataParallel around the head alone adds a part to its name; so does peft's copy of it."""

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert heads(net(lm_head=Wrapped(nn.Linear(32, 9)), layers=blocks())) == {"lm_head.module.weight"}
    assert heads(nn.Sequential(Wrapped(nn.Linear(32, 64)), Wrapped(nn.Linear(64, 32)))) == {"1.module.weight"}
    copies = net(original_module=nn.Linear(32, 9), modules_to_save=nn.ModuleDict({"default": nn.Linear(32, 9)}))
    copies.original_module.requires_grad_(False)
    assert heads(net(classifier=copies, layers=blocks())) == {"classifier.modules_to_save.default.weight"}


def test_a_tied_head_leaves_the_block_before_it() -> None:
    """The last layer is the tied one, though its weight has the embedding's name: the layer before it is no head."""
    model = net(tokens=nn.Embedding(99, 32), hidden=nn.Linear(32, 32), out=nn.Linear(32, 99, bias=False))
    model.out.weight = model.tokens.weight
    assert rules(model) == {"tokens.weight": "adamw", "hidden.weight": "muon"}


def test_frozen_blocks_are_blocks() -> None:
    """The structure is the model's, whatever is trained of it."""
    model = net(layers=blocks(), out=nn.Linear(32, 9))
    model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of 2 .* out\.weight \(output head: after the last repeated block\)"):
        distmuon.DistMuon(model)
    plain = mlp(32, 64, 32)
    plain[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of 2 .* 1\.weight \(output head: last layer"):
        distmuon.DistMuon(plain)


# ------------------------------------------------------------------------------------------ small ones, vectors, parts


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(64, 32), {"weight": "muon"}),
        (nn.Linear(8, 8), {"weight": "muon"}),
        (mlp(4, 8, 8, 4), {"0.weight": "muon", "1.weight": "muon", "2.weight": "adamw"}),
        (mlp(4, 8, 64, 4), {"0.weight": "adamw", "1.weight": "muon", "2.weight": "adamw"}),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(16, 20)), {"0.weight": "muon", "1.weight": "adamw"}),
    ],
)
def test_a_rule_that_spares_a_few_does_not_take_the_only_matrix(model: nn.Module, expected: dict[str, str]) -> None:
    """A model of nothing but small matrices, or but a first and a last layer, is trained by Muon, and says why."""
    assert rules(model) == expected
    said = [spec.reason for spec, _ in route(model) if spec.rule == "muon"]
    assert ("the model has no other matrix" in said[0]) == (expected.get("0.weight") != "adamw")


def test_fewer_than_256_elements_are_small() -> None:
    layers = [net(gate=nn.Linear(32, 7), a=nn.Linear(32, 8), b=nn.Linear(8, 32)) for _ in range(2)]
    found = {spec.fqn: (spec.rule, spec.reason) for spec, _ in route(nn.ModuleList(layers))}
    assert found["0.a.weight"] == ("muon", "linear")
    assert found["0.gate.weight"] == ("adamw", "fewer than 256 elements")


def test_vectors_in_disguise() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in {"cls_token": (1, 1, 512), "scale_it": (512, 1, 1), "anything": (1, 512)}.items():
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 1), nn.Conv2d(1, 512, 1)) for _ in "ab"
            )

    found = {spec.fqn: spec.reason for spec, _ in route(Odd()) if spec.rule == "adamw" and len(spec.shape) > 1}
    assert set(found.values()) == {"vector: one dimension only is larger than 1"} and len(found) == 7


NAMED = {
    "pos_embed": (1, 17, 64),
    "encoder_positions": (1, 17, 64),
    "rel_pos_h": (31, 64),
    "A_log": (64, 16),
    "D": (4, 64),
    "relative_position_bias_table": (169, 4),
    "register_tokens": (1, 4, 64),
    "attention_biases": (4, 196),
    "mask_emb": (2, 300),
    "q_bias": (4, 64),
    "logit_scale": (4, 64),
}


@pytest.mark.parametrize("name", NAMED)
def test_tables_and_biases_go_to_adamw_by_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].register_parameter("extra", None)
    model.register_parameter(name, nn.Parameter(torch.zeros(NAMED[name])))
    (found,) = [spec for spec, _ in route(model) if spec.fqn == name]
    assert found.rule == "adamw" and "by name" in found.reason


def test_only_the_weight_of_a_known_layer_is_a_matrix() -> None:
    linear = nn.Linear(32, 32)
    linear.register_parameter("lora_A", nn.Parameter(torch.zeros(16, 32)))
    linear.register_parameter("sigma_weight", nn.Parameter(torch.zeros(32, 32)))
    found = {spec.fqn: (spec.rule, spec.reason) for spec, _ in route(net(a=linear, out=nn.Linear(32, 9)))}
    assert found["a.weight"] == ("muon", "linear")
    assert found["a.sigma_weight"] == ("adamw", "'sigma_weight' of a Linear, not its weight")
    assert found["a.lora_A"][0] == "adamw"


def test_pruned_and_unknown_parametrized_weights() -> None:
    """torch's pruning keeps the weight under another name; a parametrization of the user's own decides nothing."""
    pruned = prune.l1_unstructured(nn.Linear(32, 32), "weight", 0.5)
    assert rules(net(a=pruned, out=nn.Linear(32, 9))) == {"a.weight_orig": "muon", "out.weight": "adamw"}

    class Symmetric(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.T

    own = nn.Linear(32, 32)
    nn.utils.parametrize.register_parametrization(own, "weight", Symmetric())
    with pytest.raises(ValueError, match=r"a\.parametrizations\.weight\.original \(32, 32\): 1 weights") as raised:
        route(net(a=own, out=nn.Linear(32, 9)))
    assert route(net(a=own, out=nn.Linear(32, 9)), pasted(raised.value))


def test_gates_of_recurrent_layers_are_told_apart() -> None:
    model = net(lstm=nn.LSTM(24, 32, proj_size=16), gru=nn.GRUCell(24, 32), rnn=nn.RNN(24, 32), out=nn.Linear(32, 9))
    assert table(model) == {
        "lstm.weight_ih_l0": [(32, 24)] * 4,
        "lstm.weight_hh_l0": [(32, 16)] * 4,
        "lstm.weight_hr_l0": [(16, 32)],
        "gru.weight_ih": [(32, 24)] * 3,
        "gru.weight_hh": [(32, 32)] * 3,
        "rnn.weight_ih_l0": [(32, 24)],
        "rnn.weight_hh_l0": [(32, 32)],
    }


@pytest.mark.parametrize("declared", [{}, {"is_transposed": True}, {"is_transposed": True, "is_concatenated": False}])
def test_fused_experts_are_cut_only_where_it_is_known_how(declared: dict[str, bool]) -> None:
    """Columns may hold gate and up as halves (Llama 4) or in turn (gpt-oss); the shape is the same."""
    experts = nn.Module()
    experts.gate_up_proj, experts.down_proj = nn.Parameter(torch.zeros(2, 32, 48)), nn.Parameter(torch.zeros(2, 24, 32))
    for key, value in declared.items():
        setattr(experts, key, value)
    model = net(layers=nn.ModuleList([net(linear=nn.Linear(32, 32), experts=experts)]))
    if declared == {"is_transposed": True}:
        assert table(model)["layers.0.experts.gate_up_proj"] == [(32, 24)] * 4
        return
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj \(2, 32, 48\): 1 weights") as raised:
        route(model)
    assert route(model, pasted(raised.value))


# --------------------------------------------------------------------------------------------------- names and shapes


def test_named_parameters_are_routed_by_names_and_shapes(transformers) -> None:
    """What the module decides by its type, unmistakable names decide as well: the same rule for every parameter."""
    llama = transformers.LlamaConfig(**SMALL, **TOKENS, num_hidden_layers=2)
    gpt2 = transformers.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    resnet = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[64, 96], embedding_size=16)
    for config, model in (
        (llama, transformers.LlamaForCausalLM),
        (gpt2, transformers.GPT2LMHeadModel),
        (resnet, transformers.ResNetForImageClassification),
    ):
        whole = model(config)
        wanted = {spec.fqn: (spec.rule, spec.matrices) for spec, _ in route(whole)}
        assert {spec.fqn: (spec.rule, spec.matrices) for spec, _ in route(whole.named_parameters())} == wanted
        distmuon.DistMuon(whole.named_parameters())


def test_names_that_decide_nothing_tell_to_pass_the_model() -> None:
    """The message once offered `named_parameters()` to a user who had passed them."""
    pairs = list(mlp(32, 64, 32).named_parameters())
    with pytest.raises(
        ValueError, match=r"0\.weight \(64, 32\) and 1 more .*; pass the model itself, whose modules"
    ) as raised:
        distmuon.DistMuon(pairs)
    assert rules(pairs, pasted(raised.value)) == {"0.weight": "muon", "1.weight": "muon"}
    with pytest.raises(ValueError, match="parameters without names") as raised:
        distmuon.DistMuon(mlp(32, 64, 32).parameters())
    assert "named_parameters()" not in str(raised.value)


def test_convolutions_as_pairs() -> None:
    """Four dimensions are a filter (out, in, *kernel), by default and where a dict says Muon."""
    model = net(
        stem=nn.Conv2d(3, 16, 3),
        middle=nn.Conv2d(16, 32, 3),
        depthwise=nn.Conv2d(32, 32, 5, groups=32),
        conv1d=nn.Conv1d(16, 32, 3),
        fc=nn.Linear(32, 10),
    )
    assert table(model) == {"middle.weight": [(32, 144)], "conv1d.weight": [(32, 48)]}
    specs = {spec.fqn: spec for spec, _ in route(model.named_parameters())}
    assert {fqn for fqn, spec in specs.items() if spec.rule == "muon"} == {"middle.weight", "conv1d.weight"}
    stated = [{"params": [("anything", model.middle.weight)], "rule": "muon"}]
    ((spec, _),) = distmuon.layout.routing.route_params(stated, None)
    assert [matrix.logical_shapes for matrix in spec.matrices] == [((32, 144),)]


# -------------------------------------------------------------------------------------------------- AdamW on purpose


def groups(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    matrices = [(fqn, p) for fqn, p in model.named_parameters() if p.ndim > 1]
    vectors = [(fqn, p) for fqn, p in model.named_parameters() if p.ndim < 2]
    return [
        {"params": matrices, "lr": 0.05, "weight_decay": 0.1},
        {"params": vectors, "lr": 0.5, "weight_decay": 0.0, **second},
    ]


def made(*given: Any, **options: Any) -> list[tuple[float, float]]:
    found = distmuon.DistMuon(*given, lr=1e-3, **options).param_groups
    return [(group["lr"], group["weight_decay"]) for group in found]


def test_groups_keep_their_options_under_adamw() -> None:
    """They were dropped: `routes="adamw"` matched everything first."""
    model = mlp(32, 64, 32)
    assert made(groups(model), routes="adamw") == [(0.05, 0.1), (0.5, 0.0)]
    assert made(groups(model, rule="adamw"), routes="adamw") == [(0.05, 0.1), (0.5, 0.0)]
    assert made([dict(group, rule="adamw") for group in groups(model)]) == [(0.05, 0.1), (0.5, 0.0)], "on purpose"
    with pytest.raises(ValueError, match=r"0\.bias: its dict says rule 'muon' and Route\('\*'\) says 'adamw'"):
        made(groups(model, rule="muon"), routes="adamw")


def test_a_route_and_a_dict_hold_together() -> None:
    """A route's own entries go first, its split is kept, and a dict's entries are not lost; two rules are refused."""
    model = mlp(32, 96, 32)
    stated = [dict(group, rule=rule) for group, rule in zip(groups(model), ("muon", "adamw"))]
    routes = [Route("0.weight", "muon", split=[32, 64], options={"lr": 0.07})]
    assert made(stated, routes=routes) == [(0.07, 0.1), (0.05, 0.1), (0.5, 0.0)]
    (spec, *_) = [spec for spec, _ in distmuon.layout.routing.route_params(stated, routes) if spec.fqn == "0.weight"]
    assert [matrix.rows for matrix in spec.matrices] == [32, 64]
    with pytest.raises(ValueError, match=r"0\.weight: its dict says rule 'muon' and Route\('0\.\*'\) says 'adamw'"):
        made(stated, routes=[Route("0.*", "adamw")])
    with pytest.raises(ValueError, match=r"Route\('9\.\*'\): matched no parameter"):
        made(stated, routes=[Route("9.*", "adamw")])


def test_routes_that_give_all_to_adamw_are_on_purpose() -> None:
    """The baseline without decay of biases: refused once, whatever the way of saying it."""
    model = mlp(32, 64, 32)
    routes = [Route("*.bias", "adamw", options={"weight_decay": 0.0}), Route("*", "adamw")]
    assert sorted(made(model, routes=routes)) == [(1e-3, 0.0), (1e-3, 0.1)]
    with pytest.raises(ValueError, match=r'none of 4 .*pass routes="adamw"'):
        made(model, routes=[Route("*.weight", "adamw")])  # biases are AdamW's by default, so this may be a slip


def test_the_refusal_of_a_model_without_muon_names_cures_that_work() -> None:
    model = net(embed=nn.Embedding(99, 32), out=nn.Linear(32, 99))
    with pytest.raises(
        ValueError, match=r'pass routes="adamw" to use AdamW on purpose, or give Muon a matrix'
    ) as raised:
        distmuon.DistMuon(model)
    assert rules(model, pasted(raised.value)) == {"embed.weight": "adamw", "out.weight": "muon"}
    assert made(model, routes="adamw") == [(1e-3, 0.1)]
    with pytest.raises(ValueError, match=r"none of 2 .*fewer than 2 dimensions") as raised:
        distmuon.DistMuon(nn.LayerNorm(32))
    assert str(raised.value).endswith('pass routes="adamw" to use AdamW on purpose'), "no matrix to give"
