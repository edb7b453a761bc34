"""Hooks through which autograd and modules call the optimizer: gradient hooks, forward pre-hooks, state-dict hooks.

This module decides when the optimizer is called; it knows no bucket and no collective. Hooks refer to the optimizer
weakly, so that its buffers are freed with it. A parameter has one manager: a newer optimizer takes the parameter, and
the older optimizer releases its parameters (`Listener.release`).

[Note: which modules wait] A module with direct parameters may also use its children's parameters without calling the
children (nn.MultiheadAttention reads `out_proj.weight`). So such a module waits for its whole subtree; pure containers
wait for nothing, since their children wait. A ParameterList or ParameterDict is never called: its parameters count as
its parent's. Without gradients (evaluation) the model waits for all parameters.
A parameter that a container uses before it calls a child is noticed in backward: autograd finds that it changed after
it was saved (`FlatStorage.note_arrived`), or its gradient arrives while its bucket is in flight. An operation that
saves nothing, such as an addition, is not noticed: call `synchronize` before such a forward.

[Note: separate storages] Parameters are views of flat buffers. Code that writes a state dict may treat tensors of one
storage as copies of each other and keep only the first (accelerate's `save_state` and `save_model` do, with only a
warning). So `state_dict` returns the same memory as tensors with separate storages; tied tensors still share a storage.

[Note: swapped tensors] `model.to` moves a DTensor by `torch.utils.swap_tensors`, which refuses a tensor with weak
references. The optimizer holds its parameters, so their ids identify them as long as it exists.

[Note: compiled models] A hook waits, builds and communicates, so dynamo must not trace it. Hooks are disabled for
dynamo, and a compiled model breaks its graph at the modules that wait.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from distmuon.errors import problem
from distmuon.layout import memory


class Listener(Protocol):
    """The methods that the hooks call."""

    def on_forward(self) -> None: ...
    def on_gradient(self, index: int) -> None: ...
    def wait_for(self, params: Iterable[int]) -> None: ...
    def synchronize(self) -> None: ...
    def on_load(self) -> None: ...
    def release(self) -> None: ...


_manager_of = WeakIdKeyDictionary()  # parameter -> weakref of the Listener that manages it
_silent: WeakKeyDictionary[Listener, frozenset[int]] = WeakKeyDictionary()  # the ids of parameters that it holds


def manager_of(param: Tensor) -> Listener | None:
    """The optimizer that manages `param`: the newest made for it, if it still exists."""
    silent = [listener for listener, ids in _silent.items() if id(param) in ids]
    if silent:
        return silent[-1]
    return _manager_of[param]() if param in _manager_of else None


class Hooks:
    """All hooks of a listener; they are removed with it, or by `remove`."""

    def __init__(
        self,
        listener: Listener,
        params: Sequence[nn.Parameter],
        model: nn.Module | None,
        wait_in_forward: bool,
        silent: bool = False,
    ) -> None:
        """`silent`: take the parameters over and register nothing, where the hooks of FSDP2 do the work."""
        self._listener = weakref.ref(listener)
        self._handles: list[RemovableHandle] = []
        self._active = True
        for param in params:
            previous = manager_of(param)
            if previous is not None and previous is not listener:
                previous.release()
        if silent:  # see [Note: swapped tensors]
            _silent[listener] = frozenset(map(id, params))
            return
        for index, param in enumerate(params):
            _manager_of[param] = self._listener
            self._on_gradient(index, param)
        if model is not None:
            self._on_model(model)
            if wait_in_forward:
                self._wait_in_forward(model, {id(param): index for index, param in enumerate(params)})
        weakref.finalize(listener, _remove, self._handles)

    @property
    def listener(self) -> Listener | None:
        """The listener that these hooks call; None after it has been freed."""
        return self._listener()

    def check_self(self, caller: object) -> None:
        """Raise for an object that runs the optimizer's methods on itself, and so writes into itself."""
        if self._listener() is not caller:
            raise problem(
                type(caller).__name__,
                found="it runs DistMuon's methods on itself instead of on the optimizer it wraps",
                needed="the methods must run on the optimizer",
                cure="call the wrapped optimizer's method",
            )

    def check_active(self, caller: object) -> None:
        """Raise if a newer optimizer manages the parameters, and for a wrapper that is not the optimizer."""
        self.check_self(caller)
        if not self._active:
            raise problem(
                "DistMuon",
                found="its parameters were taken over by a newer DistMuon",
                needed="a parameter has a single optimizer",
                cure="step the newer optimizer",
            )

    def remove(self) -> None:
        self._active = False
        _remove(self._handles)
        listener = self._listener()
        if listener is not None:
            _silent.pop(listener, None)

    def _on_gradient(self, index: int, param: nn.Parameter) -> None:
        listener_ref = self._listener

        @_untraced
        def hook(_param: Tensor) -> None:
            if (listener := listener_ref()) is not None:
                listener.on_gradient(index)

        self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def _on_model(self, model: nn.Module) -> None:
        listener_ref, model_ref = self._listener, weakref.ref(model)

        @_untraced
        def on_forward(module: nn.Module, _args: object) -> None:
            if (listener := listener_ref()) is not None and module is model_ref():  # a deepcopy has this hook, too
                listener.on_forward()

        def on_state(*_: object) -> None:
            if (listener := listener_ref()) is not None:
                listener.synchronize()

        def on_load(*_: object) -> None:
            if (listener := listener_ref()) is not None:
                listener.on_load()

        self._handles.append(model.register_forward_pre_hook(on_forward, prepend=True))
        for module in model.modules():  # a part of the model may be saved or loaded separately
            self._handles.append(module.register_state_dict_pre_hook(on_state))
            self._handles.append(module.register_load_state_dict_pre_hook(on_load))
            self._handles.append(module.register_state_dict_post_hook(_give_own_storages))

    def _wait_in_forward(self, model: nn.Module, index_of: Mapping[int, int]) -> None:
        """Let modules wait for their parameters, see [Note: which modules wait]; `index_of`: by id(parameter)."""
        listener_ref = self._listener
        for module in model.modules():
            if not any(id(param) in index_of for param in _direct_parameters(module)):
                continue
            needed = frozenset(index_of[id(p)] for p in module.parameters() if id(p) in index_of)

            @_untraced
            def pre_hook(_module: nn.Module, _args: object, needed: frozenset[int] = needed) -> None:
                if (listener := listener_ref()) is not None:
                    listener.wait_for(needed)

            self._handles.append(module.register_forward_pre_hook(pre_hook, prepend=True))


def _direct_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters for which no child's forward waits, see [Note: which modules wait]."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from _direct_parameters(child)


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """Hide `hook` from dynamo; see [Note: compiled models]."""
    untraced: Callable[..., None] = torch.compiler.disable(hook)
    return untraced


def _give_own_storages(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Give the tensors in `state` separate storages, without copies; see [Note: separate storages]."""
    for name in module._parameters:
        tensor = state.get(prefix + name)
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
            continue  # with keep_vars=True the caller wants the Parameters themselves
        if memory.is_plain(tensor) and memory.is_in_flat(tensor):
            state[prefix + name] = _over_own_storage(tensor)


def _over_own_storage(tensor: Tensor) -> Tensor:
    """Return the same dense memory as a tensor whose storage is exactly that memory.

    A slice of a storage shares its memory and keeps it alive. Unlike DLPack this needs no stream, so the tensor's
    device need not be the current device.
    """
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    with torch.no_grad():
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(storage, 0, tensor.shape, tensor.stride())


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
