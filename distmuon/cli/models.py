"""The model that a command line names: a shipped table, a config of transformers, a recipe's YAML, or a callable.

This module decides how a model is named and refuses a name that could mean two. Every model is made on the meta device;
nothing is downloaded. transformers is imported only for a config or a YAML.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distmuon.cli import recipe
from distmuon.errors import problem
from distmuon.layout.routing import ParamSpec, Route
from distmuon.planning.shapes import TABLES, shape_table

# Experts that a token uses, from each model's config.json, as the tables themselves.
_EXPERTS_PER_TOKEN = {"qwen3-30b-a3b": 8, "moonlight-16b-a3b": 6, "kimi-k2-1t": 8}
HELP = (
    f"one of {', '.join(TABLES)} (or the beginning of one); a Hugging Face config.json or its folder; a model_type of "
    "transformers; a YAML of the recipe or the name of a shipped one (gpt2.yaml); module:callable, which returns your "
    "model"
)


@dataclass(frozen=True, slots=True)
class Named:
    """A model, its full name, and what its description says about a run."""

    name: str
    model: nn.Module | tuple[ParamSpec, ...]
    experts_per_token: int | None = None  # None: not known, or no experts
    options: dict[str, Any] = field(default_factory=dict)  # arguments of `plan` that a recipe's YAML sets
    routes: list[Route] | str | None = None
    tokens: int | None = None  # of a step, on all ranks
    adjust_lr_fn: str = "match_rms_adamw"


def find_model(name: str) -> Named:
    """The model that `name` means; raise a ValueError if it means none, or several."""
    if name in TABLES:
        return _table(name)
    module, colon, attribute = name.partition(":")
    if colon and not Path(name).exists():
        return Named(name, _call(name, module, attribute))
    path = Path(name)
    config = recipe.find_config(name)
    if config is not None and name.endswith((".yaml", ".yml")):
        return _recipe(name, config)
    if name and path.exists():
        return _config(name, path / "config.json" if path.is_dir() else path)
    tables = [table for table in TABLES if table.startswith(name.lower())] if name else []
    if len(tables) == 1:
        return _table(tables[0])
    if tables:
        raise problem(
            "model",
            found=f"found {name!r}, the beginning of {', '.join(tables)}",
            needed="a single model is needed",
            cure="write more of its name",
        )
    if config is not None:
        return _recipe(name, config)
    return _model_type(name)


def _table(name: str) -> Named:
    return Named(name, shape_table(name), _EXPERTS_PER_TOKEN.get(name))


def _call(name: str, module: str, attribute: str) -> nn.Module:
    """The model that a callable of the user's returns, on the meta device."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        with torch.device("meta"):
            found = found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:  # the user's code may raise anything
        raise problem(
            name,
            found=f"found {_short(error)}",
            needed="a module and a callable without arguments, which returns a torch.nn.Module, are needed",
            cure="correct it; the model is made on the meta device, so load no weights in it",
        ) from error
    if not isinstance(found, nn.Module):
        raise problem(
            name,
            found=f"it returns {type(found).__name__}",
            needed="a torch.nn.Module is needed",
            cure="name a function that returns the model",
        )
    return found


def _config(name: str, path: Path) -> Named:
    """The model of a config.json: of the class that its `architectures` names, else a causal language model."""
    if not path.is_file():
        raise problem(
            str(path.parent),
            found="found a folder without config.json",
            needed="a folder of a Hugging Face model is needed",
            cure="name another folder, or a file",
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise problem(
            str(path),
            found=f"no JSON ({error})",
            needed="a config.json, or a YAML of the recipe, is needed",
            cure="correct the file",
        ) from error
    transformers = _transformers(str(path))
    model_type = entries.get("model_type") if isinstance(entries, dict) else None
    if model_type not in transformers.CONFIG_MAPPING:
        raise problem(
            str(path),
            found=f"its model_type is {model_type!r}",
            needed="a model_type that transformers knows is needed",
            cure="correct it or update transformers",
        )
    return _build(transformers, name, entries)


def _model_type(name: str) -> Named:
    """transformers' default model of a type."""
    transformers = _transformers(name)
    if name not in transformers.CONFIG_MAPPING:
        raise problem("model", found=f"found {name!r}", needed=f"{HELP} is needed", cure="correct the name or the path")
    return _build(transformers, name, {"model_type": name})


def _transformers(name: str) -> Any:
    try:
        transformers = import_module("transformers")
    except ImportError:
        raise problem(
            "model",
            found=f"found {name!r}",
            needed=f"{HELP} is needed",
            cure="pip install transformers for configs and model types",
        ) from None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def _build(transformers: Any, name: str, entries: dict[str, Any]) -> Named:
    architecture = (entries.get("architectures") or [""])[0]
    kind = getattr(transformers, str(architecture), None)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    what = str(architecture) if is_model else "causal language model"
    try:
        config = transformers.AutoConfig.for_model(**entries)
        with torch.device("meta"):
            model = kind(config) if is_model and kind else transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's code may raise anything for bad values
        raise problem(
            name,
            found=f"transformers makes no {what} of it ({_short(error)})",
            needed="a model's config is needed",
            cure="correct it",
        ) from error
    return Named(name, model, _experts_of(config))


def _experts_of(config: Any) -> int | None:
    found = getattr(config, "num_experts_per_tok", None)
    return found if isinstance(found, int) else None


def _recipe(name: str, path: Path) -> Named:
    """The model, options and tokens of a step that a YAML of the recipe describes."""
    parse = recipe.module("config").parse
    models, run = recipe.module("models"), recipe.module("run")
    config = parse(["--config", str(path)])  # leaves with the reason, in one line and with status 2
    knows_bytes = config.data.source == "stdlib" or (config.data.source == "hf" and config.data.tokenizer == "bytes")
    with torch.device("meta"):
        model = models.build_model(config.model, 256 if knows_bytes else None)
    given = run.optimizer_options(config)
    options = {
        "sharding": given["sharding"],
        "precision": given["precision"],
        "ns_steps": given["ns_steps"],
        "shard": config.parallel.shard,
        "replicas": config.parallel.replicas,
        "tp": config.parallel.tp,
    }
    tokens = config.train.global_batch * config.model.seq_len
    routes, adjust_lr_fn = given.get("routes"), given["adjust_lr_fn"]
    return Named(name, model, _experts_of(model.config), options, routes, tokens, adjust_lr_fn)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
