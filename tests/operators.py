"""The kernels of math/fused.py as operators of torch, for models of a GPU: their schemas say what they read and write.

On a CPU they compute the plain forms, and on fake tensors nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from distmuon.math import fused

NAMESPACE = "distmuon_tests"
_SCHEMAS = {
    "absorb": "(Tensor param, Tensor(a!) master) -> ()",
    "momentum": "(Tensor grad, Tensor(a!) buffer, Tensor(b!) update, Tensor skip, float rate, float blend) -> ()",
    "weight": "(Tensor(a!) master, Tensor polar, Tensor skip, float decay, float rate) -> ()",
    "join": "(Tensor param, Tensor remainder, Tensor(a!) master) -> ()",
    "split": "(Tensor master, Tensor(a!) param, Tensor(b!) remainder) -> ()",
}
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, fused.PLAIN[_name], "CPU")
    _library.impl(_name, lambda *_: None, "Meta")


def _launch(kernel: str, *args: Tensor | float) -> None:
    getattr(getattr(torch.ops, NAMESPACE), kernel)(*args)


@contextmanager
def kernels_as_operators(there: bool = True) -> Iterator[None]:
    """In the block a device that says "cuda" has kernels if `there`, and they are these operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "ready", lambda device: there and device.type == "cuda")
        patch.setattr(fused, "launch", _launch)
        yield
