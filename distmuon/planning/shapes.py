"""Shapes of published models as `ParamSpec`s, so that they can be planned without weights and without transformers.

This module decides nothing. Each table lists the parameters that `transformers` registers for the published config, in
the same order and under the same names, routed as by `distmuon.route` (tests compare the two). The numbers are from
each model's config.json on huggingface.co:

  gpt2-124m          openai-community/gpt2             n_embd 768, n_layer 12, vocabulary 50257, tied head
  llama-1b           meta-llama/Llama-3.2-1B           hidden 2048, 16 layers, MLP 8192, 8 KV heads of 64, tied head
  llama-8b           meta-llama/Llama-3.1-8B           hidden 4096, 32 layers, MLP 14336, 8 KV heads of 128
  llama-70b          meta-llama/Llama-3.1-70B          hidden 8192, 80 layers, MLP 28672, 8 KV heads of 128
  qwen3-30b-a3b      Qwen/Qwen3-30B-A3B                hidden 2048, 48 layers, 32 + 2*4 heads of 128, 128 experts of 768
  moonlight-16b-a3b  moonshotai/Moonlight-16B-A3B      hidden 2048, 27 layers (1 dense, MLP 11264), 16 heads of
                                                       128 + 64 / 128, KV rank 512, 64 + 2 experts of 1408
  kimi-k2-1t         moonshotai/Kimi-K2-Base           hidden 7168, 61 layers (1 dense, MLP 18432), 64 heads of
                                                       128 + 64 / 128, Q rank 1536, KV rank 512, 384 + 1 experts of 2048

The selection bias of the DeepSeek-style routers (one number an expert) is a buffer, not a parameter, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from distmuon.layout.routing import ParamSpec, Unit


def shape_table(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[ParamSpec, ...]:
    """The parameters of the model `name`, a key of `TABLES` or an unambiguous prefix. Raises KeyError otherwise."""
    found = [key for key in TABLES if key == name] or [key for key in TABLES if key.startswith(name.lower())]
    if len(found) != 1:
        raise KeyError(name)
    return tuple(replace(spec, dtype=dtype) for spec in TABLES[found[0]]())


def _adamw(fqn: str, *shape: int) -> ParamSpec:
    return ParamSpec(fqn, shape, torch.bfloat16, "adamw", (), "shape table")


def _muon(fqn: str, *shape: int, row_parts: int = 1, column_parts: int = 1) -> ParamSpec:
    """A weight (m, n) or a stack of weights, in which `row_parts` or `column_parts` equal matrices are fused."""
    count, (height, columns) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    rows, split = height // row_parts, (columns // column_parts,) * column_parts if column_parts > 1 else ()
    matrices = tuple(Unit(i * rows * columns, rows, columns, split) for i in range(count * row_parts))
    return ParamSpec(fqn, shape, torch.bfloat16, "muon", matrices, "shape table")


def _gpt2() -> Iterator[ParamSpec]:
    """Weights are stored (in, out), so the fused q, k, v are column blocks."""
    d = 768
    yield from (_adamw("transformer.wte.weight", 50257, d), _adamw("transformer.wpe.weight", 1024, d))
    for layer in range(12):
        at = f"transformer.h.{layer}"
        yield from (_adamw(f"{at}.ln_1.weight", d), _adamw(f"{at}.ln_1.bias", d))
        yield from (
            _muon(f"{at}.attn.c_attn.weight", d, 3 * d, column_parts=3),
            _adamw(f"{at}.attn.c_attn.bias", 3 * d),
        )
        yield from (_muon(f"{at}.attn.c_proj.weight", d, d), _adamw(f"{at}.attn.c_proj.bias", d))
        yield from (_adamw(f"{at}.ln_2.weight", d), _adamw(f"{at}.ln_2.bias", d))
        yield from (_muon(f"{at}.mlp.c_fc.weight", d, 4 * d), _adamw(f"{at}.mlp.c_fc.bias", 4 * d))
        yield from (_muon(f"{at}.mlp.c_proj.weight", 4 * d, d), _adamw(f"{at}.mlp.c_proj.bias", d))
    yield from (_adamw("transformer.ln_f.weight", d), _adamw("transformer.ln_f.bias", d))


def _mlp(at: str, d: int, ffn: int) -> Iterator[ParamSpec]:
    yield from (_muon(f"{at}.gate_proj.weight", ffn, d), _muon(f"{at}.up_proj.weight", ffn, d))
    yield _muon(f"{at}.down_proj.weight", d, ffn)


def _experts(at: str, d: int, experts: int, ffn: int) -> Iterator[ParamSpec]:
    """Experts, stacked as in transformers 5 with gate and up fused, and their router."""
    yield _muon(f"{at}.experts.gate_up_proj", experts, 2 * ffn, d, row_parts=2)
    yield _muon(f"{at}.experts.down_proj", experts, d, ffn)
    yield _muon(f"{at}.gate.weight", experts, d)


def _gqa(at: str, d: int, q: int, kv: int) -> Iterator[ParamSpec]:
    """Grouped-query attention; `q`, `kv`: widths of all query heads, of all key heads."""
    for name, m, n in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
        yield _muon(f"{at}.{name}_proj.weight", m, n)


def _mla(at: str, d: int, heads: int, q_rank: int | None) -> Iterator[ParamSpec]:
    """Multi-head latent attention of DeepSeek-V3: 128 + 64 (rotary) wide queries, 128 wide values, KV rank 512."""
    if q_rank is None:
        yield _muon(f"{at}.q_proj.weight", heads * 192, d)
    else:
        yield from (_muon(f"{at}.q_a_proj.weight", q_rank, d), _adamw(f"{at}.q_a_layernorm.weight", q_rank))
        yield _muon(f"{at}.q_b_proj.weight", heads * 192, q_rank)
    yield from (_muon(f"{at}.kv_a_proj_with_mqa.weight", 512 + 64, d), _adamw(f"{at}.kv_a_layernorm.weight", 512))
    yield from (_muon(f"{at}.kv_b_proj.weight", heads * 256, 512), _muon(f"{at}.o_proj.weight", d, heads * 128))


def _model(
    d: int, layers: int, vocabulary: int, layer: Callable[[int, str], Iterator[ParamSpec]], tied: bool = False
) -> Iterator[ParamSpec]:
    """Embedding, layers with two norms each, final norm, head."""
    yield _adamw("model.embed_tokens.weight", vocabulary, d)
    for number in range(layers):
        at = f"model.layers.{number}"
        yield from layer(number, at)
        yield from (_adamw(f"{at}.input_layernorm.weight", d), _adamw(f"{at}.post_attention_layernorm.weight", d))
    yield _adamw("model.norm.weight", d)
    if not tied:
        yield _adamw("lm_head.weight", vocabulary, d)


def _llama(d: int, layers: int, ffn: int, kv: int, tied: bool = False) -> Iterator[ParamSpec]:
    def layer(_number: int, at: str) -> Iterator[ParamSpec]:
        yield from _gqa(f"{at}.self_attn", d, d, kv)
        yield from _mlp(f"{at}.mlp", d, ffn)

    return _model(d, layers, 128256, layer, tied)


def _qwen3_moe() -> Iterator[ParamSpec]:
    def layer(_number: int, at: str) -> Iterator[ParamSpec]:
        yield from _gqa(f"{at}.self_attn", 2048, 32 * 128, 4 * 128)
        yield from (_adamw(f"{at}.self_attn.q_norm.weight", 128), _adamw(f"{at}.self_attn.k_norm.weight", 128))
        yield from _experts(f"{at}.mlp", 2048, 128, 768)

    return _model(2048, 48, 151936, layer)


def _deepseek(
    d: int, layers: int, ffn: int, heads: int, q_rank: int | None, experts: int, shared: int, expert_ffn: int
) -> Iterator[ParamSpec]:
    """The DeepSeek-V3 architecture, which Moonlight and Kimi K2 share; its first layer is dense."""

    def layer(number: int, at: str) -> Iterator[ParamSpec]:
        yield from _mla(f"{at}.self_attn", d, heads, q_rank)
        if number == 0:
            yield from _mlp(f"{at}.mlp", d, ffn)
        else:
            yield from _experts(f"{at}.mlp", d, experts, expert_ffn)
            yield from _mlp(f"{at}.mlp.shared_experts", d, shared * expert_ffn)

    return _model(d, layers, 163840, layer)


TABLES: Mapping[str, Callable[[], Iterator[ParamSpec]]] = {
    "gpt2-124m": _gpt2,
    "llama-1b": lambda: _llama(2048, 16, 8192, 512, tied=True),
    "llama-8b": lambda: _llama(4096, 32, 14336, 1024),
    "llama-70b": lambda: _llama(8192, 80, 28672, 1024),
    "qwen3-30b-a3b": _qwen3_moe,
    "moonlight-16b-a3b": lambda: _deepseek(2048, 27, 11264, 16, None, 64, 2, 1408),
    "kimi-k2-1t": lambda: _deepseek(7168, 61, 18432, 64, 1536, 384, 1, 2048),
}
