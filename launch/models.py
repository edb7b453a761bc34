"""A Hugging Face causal language model with random weights, from a config alone, and its loss.

Decides nothing about training. Never reaches for the network: `AutoConfig.for_model` and `from_config` build from
code, and the caller's seed is the only source of weights.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from distmuon.errors import names, problem
from launch.config import ModelConfig


def build_model(config: ModelConfig, vocab_size: int | None = None) -> nn.Module:
    """The model on the CPU, in training mode.

    Args:
        vocab_size: the data's; the model's where its config does not say, and a lower bound of it otherwise.
    """
    overrides: dict[str, Any] = {"max_position_embeddings": config.seq_len, "use_cache": False}
    if vocab_size is not None:
        overrides["vocab_size"] = vocab_size
    known = _known(config)
    try:
        hf_config = AutoConfig.for_model(config.arch, **{**overrides, **known})
    except StrictDataclassError as error:
        raise problem(
            "model.config",
            found=f"found values for which transformers says: {' '.join(str(error).split()).rstrip('.')}",
            needed=f"a valid config of arch {config.arch} is needed",
            cure="correct the values",
        ) from error
    if vocab_size is not None and hf_config.vocab_size < vocab_size:
        raise ValueError(
            f"model.config.vocab_size: found {hf_config.vocab_size} for data with {vocab_size} tokens; at least as "
            "many are needed; raise it or leave it out"
        )
    model: nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, config.dtype))
    if config.gradient_checkpointing:
        # transformers 5 renamed the method on the way; the old name warns where the new one exists
        name = "activation_checkpointing_enable"
        getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    if config.compile:
        model.compile()
    return model.train()


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a token, of a (B, seq_len + 1) batch of windows; computed in float32."""
    logits = model(input_ids=tokens[:, :-1]).logits  # (B, seq_len, vocab_size)
    return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _known(config: ModelConfig) -> dict[str, Any]:
    """`model.config`, after a look at its keys: transformers takes any and would ignore a misspelt one in silence."""
    if config.arch not in CONFIG_MAPPING:
        close = get_close_matches(config.arch, list(CONFIG_MAPPING), n=3)
        raise problem(
            "model.arch",
            found=f"found {config.arch!r}",
            needed="a model_type of transformers is needed",
            cure=f"did you mean {' or '.join(close)}?" if close else "llama, gpt2, qwen3, deepseek_v3, ...",
        )
    default = AutoConfig.for_model(config.arch)
    known = {*default.to_dict(), *default.attribute_map}
    unknown = sorted(config.config.keys() - known)
    if unknown:
        meant = [get_close_matches(key, known, n=1) for key in unknown]
        found = [f"{key} (did you mean {near[0]}?)" if near else key for key, near in zip(unknown, meant)]
        raise problem(
            "model.config",
            found=f"found {names(found)} for arch {config.arch}",
            needed=f"keys of transformers' {type(default).__name__} are needed",
            cure="correct the keys",
        )
    return config.config
