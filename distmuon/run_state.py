"""What belongs to a run beside sharded tensors: frozen parameters and module buffers, RNG states, small state.

Decides what of it a checkpoint keeps and in which form: only what `torch.load(weights_only=True)` reads back.
"""

from __future__ import annotations

import io
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmuon import holdings
from distmuon.errors import problem
from distmuon.guards import unwrap


def check_given(model: object, optimizer: object) -> None:
    """Raise for a model or an optimizer that is none of ours."""
    held = {id(param) for param in model.parameters()} if isinstance(model, nn.Module) else set()
    params = getattr(optimizer, "_params", None) if hasattr(optimizer, "at_rest") else None
    if params is None:
        raise problem("optimizer", f"a {type(optimizer).__name__}", "a DistMuon is needed", "pass the one that trains")
    if not held.issuperset(map(id, params)):
        found = f"a {type(model).__name__} without some of the optimizer's parameters"
        raise problem("model", found, "the model that the optimizer was made from is needed", "pass that one")


def check_path(path: object, *, new: bool) -> None:
    """Raise for what names no folder; a `new` one needs a name of its own."""
    if not isinstance(path, (str, os.PathLike)) or "\0" in str(path) or (new and not Path(path).name):
        raise problem("path", f"found {path!r}", "a folder's name is needed", "write 'runs/a/step-100'")


def others_of(model: nn.Module, trained: Sequence[nn.Parameter], *, to_save: bool = False) -> dict[str, Tensor]:
    """{fqn: tensor} of what the model's state dict holds beside the trained parameters; tied ones once.

    What is no plain memory stands there as the plain tensors it is made of; what names none is left out and, `to_save`,
    said to be.
    """
    model = unwrap(model, "external")
    known, kept = {id(param) for param in trained}, model.state_dict().keys()
    held = [*model.named_parameters(), *model.named_buffers()]
    found, left = holdings.plain((fqn, tensor) for fqn, tensor in held if id(tensor) not in known and fqn in kept)
    if to_save:
        holdings.log_left(left, "saved")
    return found


def packed(**state: Any) -> bytes:
    """`state` as `torch.save` writes it. Raises, naming the entry, for what only a full unpickler could load."""
    for name, value in state.items():
        memory = io.BytesIO()
        torch.save(value, memory)
        memory.seek(0)
        try:
            torch.load(memory, map_location="cpu", weights_only=True)
        except Exception as error:
            found = str(error).partition("\n")[0]
            raise problem(
                name, f"it holds what cannot be loaded safely ({found})",
                "numbers, strings, tensors and lists, tuples and dicts of them are needed", "convert it before saving",
            ) from error  # fmt: skip
    memory = io.BytesIO()
    torch.save(state, memory)
    return memory.getvalue()


def unpacked(path: Path, *names: str) -> dict[str, Any]:
    """What `packed` made of `names`. Raises `ValueError` naming the file for anything else; executes nothing in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(names):
            raise TypeError(f"found {sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__}")
    except Exception as error:
        raise problem(
            str(path), f"it cannot be loaded safely ({str(error).partition(chr(10))[0]})",
            "what save_checkpoint wrote is needed", "load an earlier checkpoint",
        ) from error  # fmt: skip
    return state


def rng_states(device: torch.device) -> dict[str, Any]:
    """Of torch on the CPU and on `device`, of Python, and of NumPy where somebody has imported it."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (kind, keys.tolist(), *rest)
    return states


def restore_rng(states: dict[str, Any], device: torch.device) -> None:
    """As `rng_states` found them."""
    torch.set_rng_state(states["cpu"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if (numpy := sys.modules.get("numpy")) is not None and "numpy" in states:
        numpy.random.set_state(states["numpy"])


def versions() -> dict[str, str]:
    """Of what wrote a checkpoint."""
    here = sys.modules["distmuon"]
    return {"distmuon": here.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
