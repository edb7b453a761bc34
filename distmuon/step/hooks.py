"""Where autograd and modules call us: gradient hooks, forward pre-hooks, state-dict hooks.

Decides who is called when, nothing else. Hooks hold the optimizer weakly, so that dropping it frees its buffers, and
a parameter has one manager: a newer optimizer takes over, the older one is told (`Listener.release`).

[Note: which modules wait] A module that holds parameters of its own may also use those of its children without
calling them (nn.MultiheadAttention reads `out_proj.weight`). So such a module waits for its whole subtree; pure
containers wait for nothing and leave it to their children. A ParameterList or ParameterDict is never called: what it
holds is its parent's own. Without gradients (evaluation) the model waits for all.
A parameter that a container uses before any of its children is called is noticed in backward: autograd finds that it
changed after it was saved (`FlatStorage.note_arrived`), or its gradient comes while its bucket is in flight. What saves
nothing, such as an addition, is not noticed: call `synchronize` before such a forward.

[Note: one storage a tensor] Parameters are views of flat buffers. Whoever writes a state dict may take tensors of one
storage for copies of each other and keep the first alone (accelerate's `save_state` and `save_model` do, with a mere
warning). So `state_dict` hands out the same memory as tensors with storages of their own; tied ones still share theirs.

[Note: swapped tensors] `model.to` moves a DTensor by `torch.utils.swap_tensors`, which refuses a tensor that something
refers to weakly. The optimizer holds its parameters, so while it lives their ids are theirs, and serve as well.

[Note: compiled models] A hook waits, builds, talks to other ranks: dynamo must not trace it. Hooks are disabled for
it, so a compiled model breaks its graph at the modules that wait.
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
    """What the hooks call."""

    def on_forward(self) -> None: ...
    def on_gradient(self, index: int) -> None: ...
    def wait_for(self, params: Iterable[int]) -> None: ...
    def synchronize(self) -> None: ...
    def on_load(self) -> None: ...
    def release(self) -> None: ...


_manager_of = WeakIdKeyDictionary()  # parameter -> weakref of the Listener that manages it
_silent: WeakKeyDictionary[Listener, frozenset[int]] = WeakKeyDictionary()  # the ids of parameters that it holds


def manager_of(param: Tensor) -> Listener | None:
    """The living optimizer that manages `param` now: the newest made for it; None if there is none."""
    silent = [listener for listener, ids in _silent.items() if id(param) in ids]
    return silent[-1] if silent else _manager_of[param]() if param in _manager_of else None


class Hooks:
    """All hooks of one listener; gone when it is, or on `remove`."""

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
        """Whom these hooks call; None once it is gone."""
        return self._listener()

    def check_self(self, caller: object) -> None:
        """Raise for an object that borrows the optimizer's methods: what it writes would stay in itself."""
        if self._listener() is not caller:
            raise problem(
                type(caller).__name__,
                found="it runs DistMuon's methods on itself instead of on the optimizer it wraps",
                needed="the optimizer must be called itself",
                cure="call the wrapped optimizer's own method",
            )

    def check_active(self, caller: object) -> None:
        """Raise once a newer optimizer has taken the parameters over, and for a wrapper that is not the optimizer."""
        self.check_self(caller)
        if not self._active:
            raise problem(
                "DistMuon",
                found="its parameters were taken over by a newer DistMuon",
                needed="one optimizer manages a parameter",
                cure="step the newer one",
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
        for module in model.modules():  # a part of the model may be saved or loaded by itself
            self._handles.append(module.register_state_dict_pre_hook(on_state))
            self._handles.append(module.register_load_state_dict_pre_hook(on_load))
            self._handles.append(module.register_state_dict_post_hook(_own_storages))

    def _wait_in_forward(self, model: nn.Module, index_of: Mapping[int, int]) -> None:
        """Let each module wait for its parameters, see [Note: which modules wait]; `index_of`: by id(parameter)."""
        listener_ref = self._listener
        for module in model.modules():
            if not any(id(param) in index_of for param in _own_parameters(module)):
                continue
            needed = frozenset(index_of[id(p)] for p in module.parameters() if id(p) in index_of)

            @_untraced
            def pre_hook(_module: nn.Module, _args: object, needed: frozenset[int] = needed) -> None:
                if (listener := listener_ref()) is not None:
                    listener.wait_for(needed)

            self._handles.append(module.register_forward_pre_hook(pre_hook, prepend=True))


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those that no child's forward stands for, see [Note: which modules wait]."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from _own_parameters(child)


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """See [Note: compiled models]."""
    untraced: Callable[..., None] = torch.compiler.disable(hook)
    return untraced


def _own_storages(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """See [Note: one storage a tensor]. Nothing is copied, whatever the current device is."""
    for name in module._parameters:
        tensor = state.get(prefix + name)
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):  # keep_vars=True wants them as they are
            continue
        if memory.is_plain(tensor) and memory.is_in_flat(tensor):
            state[prefix + name] = _over_own_storage(tensor)


def _over_own_storage(tensor: Tensor) -> Tensor:
    """The same dense memory as a tensor whose storage is that memory and no more.

    A slice of a storage shares its memory and keeps it alive. Unlike an exchange by DLPack it asks for no stream, so
    the tensor's device need not be the current one.
    """
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    with torch.no_grad():
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(storage, 0, tensor.shape, tensor.stride())


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
