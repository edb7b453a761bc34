"""The kind of a parameter by its name and shape, where no module type decides.

Two sorts of parameters have only a name: raw parameters (a class token, a table of positions, a stack of experts), and
all parameters if the user passed (name, parameter) pairs. This module decides only unmistakable cases; any other is
"unknown", and routing refuses it. It knows texts and shapes only.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Literal

Kind = Literal[
    "embedding",  # an embedding's table, or a weight tied to it
    "normalization",
    "linear",  # (out, in)
    "stored (in, out)",
    "convolution",  # (out, in, *kernel)
    "depthwise",  # a convolution of several groups with one input channel each
    "attention",  # nn.MultiheadAttention's projections
    "recurrent",  # (gates * hidden, in)
    "experts",  # a stack (E, m, n) of matrices
    "fused experts",  # a stack with gate and up fused
    "vector",  # not a matrix, by its name or its module
    "unknown",
]

_ADAPTERS = ("*.lora_[ABE].*", "*.lora_embedding_[AB].*", "*.lora_magnitude_vector.*", "*.trainable_tokens_delta.*")
_STATE_SPACE = {"a_log", "a_logs", "d", "ds", "dt_bias"}
_EXPERTS = {"up_proj", "down_proj", "gate_proj", "w1", "w2", "w3"}
_POSITIONS = {"pos", "position", "positions", "positional", "posemb", "relpos"}
_EMBEDDINGS = {"embed", "embeds", "embedding", "embeddings", "emb", "wte", "wpe"}
_SCALES = {"scale", "scales", "gamma", "beta", "temperature"}
_LINEAR = {"proj", "projection", "linear", "lin", "dense", "fc", "qkv"}
_LINEAR_IN_BLOCKS = {"query", "key", "value", "attn", "gate", "up", "down"}
_LINEAR_IN_BLOCKS |= {"q", "k", "v", "o", "kv", "wq", "wk", "wv", "wo", "w"}
_BRIDGES = {"modal", "mm", "connector", "merger", "aligner"}
_HEADS = {"head", "heads", "classifier", "classifiers", "logits"}


def words(name: str) -> list[str]:
    """The lower-case words of a component of a name: "mlp_head2" has "mlp" and "head"."""
    return [word for word in re.split(r"[_\W\d]+", name.lower()) if word]


def is_adapter(fqn: str) -> bool:
    """Whether peft gives such a name to adapters. They serve fine-tuning, where the case for Muon is weak."""
    return any(fnmatchcase(f".{fqn}", pattern) for pattern in _ADAPTERS)


def is_head(name: str) -> bool:
    """Whether a module of this name is an output, a list of outputs or an auxiliary classifier, at any place.

    A "pre_classifier" or "conv_head" comes before the head, and attention heads are no outputs; both give False.
    """
    found = words(name)
    if {"pre", "conv", "attn", "attention", "multi"}.intersection(found):
        return False
    return (
        bool(_HEADS.intersection(found)) or name.lower().startswith("aux") or found in (["embed", "out"], ["unembed"])
    )


def is_bridge(name: str) -> bool:
    """Whether a module of this name connects two towers of a multi-modal model."""
    return bool(_BRIDGES.intersection(words(name)))


def by_name(path: tuple[str, ...], name: str, shape: tuple[int, ...], typed: bool) -> tuple[Kind, str]:
    """(kind, reason) of a parameter `name` of the module at `path`; "unknown" if the case is not unmistakable.

    `typed`: the module is known, but its type is not a known layer's; then names of layers (a convolution, an
    embedding) count for less.
    """
    layer = path[-1] if path else ""
    name_words = words(name)
    described = words(layer) if name == "weight" else name_words
    if any(_POSITIONS.intersection(words(part)) for part in (*path[-2 if typed else -1 :], name)):
        return "vector", "table of positions by name"
    if {"bias", "biases"}.intersection(described):
        return "vector", "bias by name"
    if name.lower() in _STATE_SPACE:
        return "vector", "state-space parameter by name"
    if {"token", "tokens"}.intersection(name_words) or name_words == ["latents"]:
        return "vector", "learned token by name"
    if any(word.endswith("norm") or word == "ln" for word in words(layer)):
        return "normalization", "normalization by name"
    if _SCALES.intersection(described[-1:]):
        return "vector", "scale by name"
    if _EMBEDDINGS.intersection((*described[:1], *described[-1:])) and not {"out", *_LINEAR}.intersection(described):
        return "embedding", "embedding by name"
    return _matrix_by_name(path, name, shape, described, typed)


def _matrix_by_name(
    path: tuple[str, ...], name: str, shape: tuple[int, ...], described: list[str], typed: bool
) -> tuple[Kind, str]:
    layer = path[-1] if path else ""
    last = described[-1:]
    if len(shape) == 3 and "experts" in words(layer) and name in _EXPERTS | {"gate_up_proj"}:
        return ("fused experts" if name == "gate_up_proj" else "experts"), f"stack of experts by name {layer}.{name}"
    if name == "weight" and not typed and (len(shape) > 3 or (len(shape) == 3 and "conv" in "".join(path).lower())):
        return ("depthwise" if shape[1] == 1 else "convolution"), "by name and dimensions"
    if len(shape) != 2:
        return "unknown", ""
    if name == "weight" and layer in ("gate", "router"):  # Moonlight trains them with Muon (2502.16982, section 3.4)
        return "linear", f"router by name {layer}"
    if name == "weight" and is_head(layer):
        return "linear", f"by name {layer}"
    if is_named_weight(name) and described[:-1][-1:] in (["proj"], ["projection"]):
        return "linear", f"by name {name}"
    in_block = any(part.isdigit() for part in path[:-1])
    if name == "weight" and (_LINEAR.intersection(last) or (in_block and _LINEAR_IN_BLOCKS.intersection(last))):
        return ("stored (in, out)" if shape[1] == 3 * shape[0] and layer == "c_attn" else "linear"), f"by name {layer}"
    return "unknown", ""


def is_named_weight(name: str) -> bool:
    """Whether a raw parameter is named as a layer's weight, like "in_proj_weight"."""
    return name.endswith("_weight")
