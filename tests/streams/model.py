"""A model of one GPU for programs that run on a CPU: which stream does what, and in which order.

Inside `Gpu.running()` tensors that a program puts on "cuda" lie in CPU memory and say that they are on a GPU, so the
program takes its GPU branches and computes real values. Every operator is noted on the stream that would run it, with
the bytes that its schema says it reads and writes. Found are

- races: two accesses to overlapping bytes, a write among them, that no wait orders;
- early reuse: memory that was freed while another stream may still use it, when its stream allocates again;
- placement: a tensor of the CPU among the operands of a kernel;
- host waits: where the host stops until a stream has come so far.

[Note: order] Each stream, and the host, has a vector clock: how far it knows every other stream to be. An operator
advances its stream's entry, and a wait takes the larger of both clocks. An access is ordered after another one if its
clock has that one's entry. A kernel is launched by the host, so it also knows what the host knew then.

[Note: freed memory] The caching allocator gives a freed block back to the stream that allocated it, at once, for that
stream runs in order; other streams that used it must be ordered before by a wait, or be named by `record_stream`, which
covers all that the named stream has waited for. The model looks when the block's stream allocates next, whatever the
size.

The limits: autograd's streams are imitated (`Gpu.branch`), streams inside one operator are not seen, and bytes between
the first and the last element of a tensor with strides count as touched.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distmuon.step import grad_reduce
from distmuon.step.placeholder import InReduction
from tests.operators import NAMESPACE, kernels_as_operators

DEVICE = torch.device("cuda", 0)
HOST = 0  # the host's entry in a clock
Clock = dict[int, int]
Fault = tuple[str, str]  # a file and a function of distmuon: the waits that it makes are left out

_DEVICE_OF, _IS_CUDA, _IS_CPU = (getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
_IS_PINNED = torch.Tensor.is_pinned
_READS_ON_HOST = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "item"}
_COPIES = {"copy_", "_to_copy"}
_TAKES_INDICES = {"index", "index_put_", "_index_put_impl_"}  # also from the CPU
_TOUCHES_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
_TOUCHES_NOTHING |= {"lift_fresh", "alias", "detach", "_unsafe_view", "_reshape_alias", "_record_function_enter_new"}


@dataclass(eq=False)
class Timeline:
    """A stream, or the host: what it has done, and how far it knows the others to be."""

    number: int
    clock: Clock = field(default_factory=dict)

    def tick(self) -> int:
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.clock[self.number]

    def learn(self, clock: Clock) -> None:
        for number, time in clock.items():
            if time > self.clock.get(number, 0):
                self.clock[number] = time


class Stream(Timeline):
    """Stands for torch.cuda.Stream."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        super().__init__(number)
        self._gpu = gpu
        self.device = DEVICE

    def wait_stream(self, other: Stream) -> None:
        if not self._gpu.left_out():
            self.learn({**other.clock, **{n: t for n, t in self._gpu.host.clock.items() if n not in other.clock}})

    def wait_event(self, event: Event) -> None:
        if not self._gpu.left_out() and event.clock is not None:
            self.learn(event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self._gpu.event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.host_waits_for(self.clock, "Stream.synchronize")


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.clock: Clock | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self._gpu.current).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._gpu.current).wait_event(self)

    def synchronize(self) -> None:
        if self.clock is not None and not self._gpu.left_out():
            late = any(time > self._gpu.host.clock.get(number, 0) for number, time in self.clock.items())
            self._gpu.host.learn(self.clock)
            if late and self.clock is not None:
                self._gpu.event_waits += 1


@dataclass
class Access:
    start: int
    end: int
    writes: bool
    by: int
    time: int
    where: str


@dataclass
class Block:
    """Memory, and what is still to be ordered of its uses. `home`: the stream that allocated it; None on the host."""

    ref: StorageWeakRef
    home: int | None
    made: str
    pinned: bool = False
    accesses: list[Access] = field(default_factory=list)
    recorded: set[Timeline] = field(default_factory=set)  # by `record_stream`


class Gpu:
    """The model; `errors` has what was found, `host_waits` the places where the host waited for a stream."""

    def __init__(self, fault: Fault | None = None, *, kernels: bool = True) -> None:
        """`fault`: the waits that are left out. `kernels`: whether it has those of math/fused.py."""
        self.errors: list[str] = []
        self.kernels = kernels
        self.launched: set[str] = set()  # of these kernels
        self.host_waits: list[str] = []
        self.event_waits = 0
        self.host = Timeline(HOST)
        self._streams: list[Stream] = []
        self.main = self.current = self.stream()
        self._blocks: dict[int, Block] = {}
        self._fault = fault
        self.left_out_waits = 0
        self._quiet = False
        self._default_on_device = False
        self._placing: bool | None = None  # where the next new memory lies; None: as the operands
        self._pinning = False
        self._comm: dict[Any, Stream] = defaultdict(self.stream)

    # ------------------------------------------------------------------------------------- what a program may do

    def stream(self, *_: object, **__: object) -> Stream:
        self._streams.append(Stream(self, len(self._streams) + 1))
        return self._streams[-1]

    def event(self, *_: object, **__: object) -> Event:
        return Event(self)

    def comm_stream(self, group: Any) -> Stream:
        """The stream of a process group's collectives."""
        return self._comm[group]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Stands for torch.cuda.stream."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """In the block, tensors that are made without a device lie on the GPU: to make a model and its data there."""
        before, self._default_on_device = self._default_on_device, True
        try:
            yield
        finally:
            self._default_on_device = before

    def fork(self, x: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """`x` twice: for this stream and for a `branch` on `stream`. In backward it is here that the streams meet."""
        here, there = _Fork.apply(x, self, self.current, stream)
        return here, there

    def branch(self, stream: Stream, run: Callable[[Tensor], Tensor], x: Tensor, *, ends: bool = True) -> Tensor:
        """`run(x)` on `stream`, forward and, as autograd would have it, backward.

        `x` is the second of `fork`, or another branch on this stream that does not end here (`ends=False`).
        """
        outer = self.current
        stream.wait_stream(outer)
        entered: Tensor = _Switch.apply(x, self, outer, False)
        with self.on(stream):
            y = run(entered)
        outer.wait_stream(stream)
        self._block(y).recorded.add(outer)  # the caller's stream uses what `stream` allocated
        left: Tensor = _Switch.apply(y, self, stream, ends)
        return left

    @contextmanager
    def running(self) -> Iterator[Gpu]:
        """Run the program in the block on this GPU."""
        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
            patch.setattr(torch.cuda, "default_stream", lambda device=None: self.main)
            patch.setattr(torch.cuda, "stream", self.on)
            patch.setattr(torch.cuda, "Stream", self.stream)
            patch.setattr(torch.cuda, "Event", self.event)
            stack.enter_context(kernels_as_operators(self.kernels))
            patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.record_stream(tensor, stream))
            register, at_end = torch.Tensor.register_post_accumulate_grad_hook, grad_reduce._call_at_end_of_backward
            patch.setattr(
                torch.Tensor,
                "register_post_accumulate_grad_hook",
                lambda tensor, hook: register(tensor, self._inside_backward(hook)),
            )
            patch.setattr(grad_reduce, "_call_at_end_of_backward", lambda call: at_end(self._inside_backward(call)))
            group = torch.optim.Optimizer._group_tensors_by_device_and_dtype  # the fused AdamW's, in C++
            patch.setattr(
                torch.optim.Optimizer,
                "_group_tensors_by_device_and_dtype",
                staticmethod(
                    lambda *args, **how: {(DEVICE, key[1]): value for key, value in group(*args, **how).items()}
                ),
            )
            make = torch.Tensor._make_wrapper_subclass  # of placeholders: they have no memory
            on_cpu = lambda *args, device, **rest: make(*args, device=CPU, **rest)  # noqa: E731
            patch.setattr(torch.Tensor, "_make_wrapper_subclass", staticmethod(on_cpu))
            stack.enter_context(_Operators(self))
            stack.enter_context(_Devices(self))
            yield self

    def _inside_backward(self, call: Callable[..., object]) -> Callable[..., object]:
        """`call`, with tensors that say where they would be: autograd runs hooks without function modes."""

        def run(*args: object) -> object:
            with nullcontext() if torch._C._len_torch_function_stack() else _Devices(self):
                return call(*args)

        return run

    # ------------------------------------------------------------------------------------------------ faults

    def left_out(self) -> bool:
        """Whether the wait that is being made is the planted fault's."""
        if self._fault is None:
            return False
        file, function = self._fault
        frame = sys._getframe(2)
        for _ in range(8):
            code = frame.f_code
            if code.co_name == function and code.co_filename.endswith(file):
                self.left_out_waits += 1
                return True
            if frame.f_back is None:
                break
            frame = frame.f_back
        return False

    # ------------------------------------------------------------------------------------------------ what is seen

    def host_waits_for(self, clock: Clock, what: str) -> None:
        self.host_waits.append(f"{what} at {_where()}")
        self.host.learn(clock)

    def is_on_device(self, tensor: Tensor) -> bool:
        return self._block(tensor).home is not None

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        if not self.left_out():
            self._block(tensor).recorded.add(stream)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """In the block operators are not noted."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def collective(
        self, name: str, group: Any, reads: list[Tensor], writes: list[Tensor], effect: Callable[[], object]
    ) -> Event:
        """Run `effect` as a collective on the group's stream, which first waits for the current one."""
        stream = self.comm_stream(group)
        stream.learn(self.current.clock)
        with self.quiet():
            effect()
        self._kernel(stream, name, reads, writes)
        done = Event(self)
        done.record(stream)
        return done

    def operator(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note an operator that has run."""
        reads, writes = _operands(func, args, kwargs)
        results = [t for t in _tensors(out)]
        if self._quiet:
            for tensor in results:
                self._block(tensor, like=reads + writes)
            return
        made = [t for t in results if t.untyped_storage()._cdata not in self._blocks]
        operands = reads + writes
        on_device = any(self.is_on_device(t) for t in operands)
        if self._placing is not None and made:
            on_device = on_device or self._placing
        elif not operands:
            on_device = self._default_on_device
        target = self._placing if self._placing is not None else on_device
        for tensor in made:
            self._new_block(tensor, target, pinned=self._pinning)
        if name in _TOUCHES_NOTHING or func.is_view:
            return
        if not on_device:
            self._kernel(self.host, name, reads, writes + made)
            return
        self._check_places(name, operands)
        stream = self.current
        self._kernel(stream, name, reads, writes + made)
        if name in _COPIES:
            self._maybe_wait_for_copy(name, reads, writes + made, args, kwargs)
        elif name in _READS_ON_HOST:
            self.host_waits_for(stream.clock, name)

    def _maybe_wait_for_copy(
        self, name: str, reads: list[Tensor], writes: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A copy between host and device makes the host wait, unless it is asynchronous and the memory is pinned."""
        sides = [self._block(t) for t in [*reads[-1:], *writes[:1]]]
        on_host = [block for block in sides if block.home is None]
        if not on_host or len({block.home is None for block in sides}) == 1:
            return
        asynchronous = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if not (asynchronous and all(block.pinned for block in on_host)):
            self.host_waits_for(self.current.clock, f"a copy ({name}) between host and device")

    def _check_places(self, name: str, operands: list[Tensor]) -> None:
        if name in _TAKES_INDICES and not all(self.is_on_device(tensor) for tensor in operands):
            self.host_waits_for(self.current.clock, f"the indices of {name}, which are on the CPU,")
        elif name not in _COPIES:
            for tensor in operands:
                if tensor.dim() and not self.is_on_device(tensor):
                    self.errors.append(f"placement: {name} at {_where()} has an operand on the CPU")

    def _kernel(self, by: Timeline, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        if by is not self.host:
            by.learn(self.host.clock)
        time, where = by.tick(), f"{name} at {_where()}"
        for tensors, is_write in ((reads, False), (writes, True)):
            for tensor in tensors:
                self._touch(self._block(tensor), tensor, Access(*_extent(tensor), is_write, by.number, time, where), by)

    def _touch(self, block: Block, tensor: Tensor, new: Access, by: Timeline) -> None:
        is_argument = by is not self.host and block.home is None and not tensor.dim() and not new.writes
        if new.start == new.end or is_argument:
            return  # a number of the host is read at the launch
        kept = []
        for old in block.accesses:
            overlaps = old.start < new.end and new.start < old.end
            if overlaps and (old.writes or new.writes) and not _knows(by, old):
                kinds = f"{'write' if old.writes else 'read'}, {'write' if new.writes else 'read'}"
                self.errors.append(f"race ({kinds}): {old.where} on stream {old.by}, {new.where} on stream {new.by}")
            covered = new.writes and new.start <= old.start and old.end <= new.end
            same = (old.start, old.end, old.writes, old.by) == (new.start, new.end, new.writes, new.by)
            if not covered and not same:
                kept.append(old)
        block.accesses = [*kept, new]

    # ------------------------------------------------------------------------------------------------ memory

    def _block(self, tensor: Tensor, like: list[Tensor] | None = None) -> Block:
        with torch._C.DisableTorchFunction():
            key = tensor.untyped_storage()._cdata
        found = self._blocks.get(key)
        if found is None:
            near = any(self.is_on_device(t) for t in like or () if t is not tensor)
            placed = self._placing if self._placing is not None else near or self._default_on_device
            found = self._new_block(tensor, placed)
        return found

    def _new_block(self, tensor: Tensor, on_device: bool, pinned: bool = False) -> Block:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if on_device:
            self._reuse(self.current)
        home = self.current.number if on_device else None
        block = Block(StorageWeakRef(storage), home, _where(), pinned)
        self._blocks[storage._cdata] = block
        return block

    def _reuse(self, stream: Stream) -> None:
        """The memory that was freed and returns to `stream`, which now allocates; see [Note: freed memory]."""
        for key, block in list(self._blocks.items()):
            if not block.ref.expired() or (block.home is not None and block.home != stream.number):
                continue
            del self._blocks[key]
            for access in block.accesses if block.home is not None else ():
                if not any(_knows(knower, access) for knower in (stream, *block.recorded)):
                    self.errors.append(
                        f"freed too early: memory of {block.made}, used by {access.where} on stream {access.by}, "
                        f"may be given out by stream {stream.number} at {_where()}"
                    )


def _knows(timeline: Timeline, access: Access) -> bool:
    return access.by == timeline.number or timeline.clock.get(access.by, 0) >= access.time


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes from the first element to the last, in the tensor's storage."""
    if not tensor.numel():
        return 0, 0
    start = tensor.storage_offset()
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return start * tensor.element_size(), (start + length) * tensor.element_size()


def _where() -> str:
    """The place in the library, or in the test, that is at work."""
    frame = sys._getframe(1)
    fallback = ""
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if "/distmuon/" in file:
            return f"{file.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        if not fallback and "/tests/" in file and not file.endswith(("model.py", "collectives.py")):
            fallback = f"{file.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return fallback


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@cache
def _roles(func: Any) -> tuple[tuple[int, str, bool, bool], ...]:
    """(number, name, is written, is read) of the arguments that may hold tensors, by the operator's schema."""
    roles = []
    for number, argument in enumerate(func._schema.arguments):
        if "Tensor" in str(argument.type):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            roles.append((number, argument.name, is_written, not (is_written and argument.is_out)))
    return tuple(roles)


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that the operator reads and those that it writes."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for number, name, is_written, is_read in _roles(func):
        tensors = list(_tensors(args[number] if number < len(args) else kwargs.get(name)))
        writes += tensors if is_written else []
        reads += tensors if is_read else []
    return reads, writes


class _Operators(TorchDispatchMode):
    """Notes every operator."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(arg, InReduction) for arg in args):
            return InReduction.__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            self._gpu.launched.add(func._schema.name.partition("::")[2])
        with torch._C.DisableTorchFunction():
            self._gpu.operator(func._schema.name.partition("::")[2], func, args, kwargs, out)
        return out


class _Devices(TorchFunctionMode):
    """Lets tensors say where they would be, and puts them there."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self._gpu, dict(kwargs or {})
        if func in (_DEVICE_OF, _IS_CUDA, _IS_CPU):
            on_device = isinstance(args[0], InReduction) or gpu.is_on_device(args[0])
            return on_device if func == _IS_CUDA else not on_device if func == _IS_CPU else DEVICE if on_device else CPU
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(func, args, kwargs)
        if func == _IS_PINNED:
            return gpu._block(args[0]).pinned
        if func == torch.Tensor.tolist and gpu.is_on_device(args[0]):
            gpu.host_waits_for(gpu.current.clock, "tolist")
        if func == torch.Tensor.pin_memory:
            with self._placed(False, pinned=True):
                return args[0].clone()
        if "device" not in kwargs and "pin_memory" not in kwargs:
            return func(*args, **kwargs)
        placed: bool | None = None
        if kwargs.get("device") is not None:
            placed = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = CPU
        with self._placed(placed, pinned=bool(kwargs.pop("pin_memory", False))):
            result = func(*args, **kwargs)
            if placed is not None and isinstance(result, Tensor):
                gpu._block(result)  # `torch.tensor` makes memory by no operator
            return result

    @contextmanager
    def _placed(self, on_device: bool | None, pinned: bool = False) -> Iterator[None]:
        gpu = self._gpu
        before = gpu._placing, gpu._pinning
        gpu._placing, gpu._pinning = on_device, pinned
        try:
            yield
        finally:
            gpu._placing, gpu._pinning = before

    def _to(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor, rest = args[0], list(args[1:])
        if func == torch.Tensor.cpu:
            rest.append(CPU)
        elif func == torch.Tensor.cuda:
            rest = [DEVICE]
        if "device" in kwargs:
            rest.append(kwargs.pop("device"))
        target: bool | None = None
        left: list[Any] = []
        for item in rest:
            if isinstance(item, (str, torch.device)):
                target = torch.device(item).type == "cuda"
            elif isinstance(item, Tensor):
                target = self._gpu.is_on_device(item)
                left.append(item.dtype)
            elif item is not None:
                left.append(item)
        moves = target is not None and target != self._gpu.is_on_device(tensor)
        if moves:
            kwargs["copy"] = True
            left = left or [tensor.dtype]
        if not left and not kwargs:
            return tensor
        with self._placed(target if moves else None):
            moved: Tensor = tensor.to(*(left or [tensor.dtype]), **kwargs)
        return moved


CPU = torch.device("cpu")


class _Switch(torch.autograd.Function):
    """The identity; its backward goes on with another stream, as autograd does where the forward changed streams."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gpu: Gpu, stream: Stream, waits: bool) -> Tensor:
        ctx.gpu, ctx.stream, ctx.waits = gpu, stream, waits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gpu = ctx.gpu
        if ctx.waits:
            ctx.stream.learn(gpu.current.clock)
        with torch._C.DisableTorchFunction():
            gpu._block(grad).recorded.add(ctx.stream)
        gpu.current = ctx.stream
        return grad, None, None, None


class _Fork(torch.autograd.Function):
    """The identity, twice; its backward adds what both streams computed, and they meet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gpu: Gpu, here: Stream, there: Stream) -> tuple[Tensor, Tensor]:
        ctx.gpu, ctx.here, ctx.there = gpu, here, there
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, here: Tensor, there: Tensor) -> Any:
        gpu = ctx.gpu
        gpu.current = ctx.here
        ctx.here.learn(ctx.there.clock)
        with torch._C.DisableTorchFunction():
            gpu._block(there).recorded.add(ctx.here)
        return here + there, None, None, None
