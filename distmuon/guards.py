"""What all ranks must agree on before anything happens: the plan, once; the verdict on the gradients, every step.

Decides whether a step may touch state. The verdict is one small all-reduce: sum of squares of the averaged gradient,
how many ranks hold a gradient of AdamW's that is too large to be squared, and for each parameter on how many ranks it
had a gradient. Non-finite values show in the sum of squares.

[Note: large gradients] A step is taken wherever all that it writes is finite. Norms are summed up in float64, so that
they are right for whatever float32 can hold. Below a norm of 2^127, half of the largest float32, no moving average and
no difference of two can overflow. AdamW keeps squares in float32, whose elements must stay below 2^64 = 1.8e19; so if
one does not, the step is taken only if clipping has brought the norm below that (`Verdict.of_clipped`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from distmuon import memory
from distmuon.collectives import DataParallelGroup
from distmuon.errors import problem

SQUARABLE = 2.0**64  # below it float32 holds the square
LARGEST_NORM = 2.0**127  # half of the largest float32
_EXACT = (2.0**-80, 2.0**128)  # between these a sum of float32's squares has neither under- nor overflown


@dataclass(frozen=True, slots=True)
class Verdict:
    """The same on all ranks. `total_norm` (0-dim float32) and `ok` (0-dim bool) stay on the device.

    `present[i]`: some rank had a gradient for parameter i (a parameter without any is left alone). `known`: what `ok`
    says, where the host may read it for nothing; None on a GPU. `apart` (0-dim bool): the ranks step by different
    hyperparameters, or different optimizers; then `ok` is False. `squarable` (0-dim bool): float32 holds the square of
    each of AdamW's elements.
    """

    total_norm: Tensor
    ok: Tensor
    present: Sequence[bool]
    known: bool | None
    apart: Tensor
    squarable: Tensor

    def of_clipped(self) -> Verdict:
        """What holds when nobody scales the gradients any more; see [Note: large gradients]."""
        ok = self.ok & (self.squarable | (self.total_norm < SQUARABLE))
        return replace(self, ok=ok, known=None if self.known is None else known_on_host(ok))


def unwrap(params: Any, grad_reduction: str) -> Any:
    """The module to route, under its own names: not as `torch.compile` or DDP wraps it. Refuses wrappers that would
    average a second time or that hold no whole parameters."""
    params = _uncompiled(params)
    if isinstance(params, nn.parallel.DistributedDataParallel):
        if grad_reduction == "reduce_scatter":
            raise problem(
                "params", "a model wrapped in DistributedDataParallel, which averages the gradients itself",
                "one reduction of the gradients is needed",
                'pass grad_reduction="external", or pass the unwrapped model (and silence the wrapper: '
                "distmuon.integrations.ddp.silence)",
            )  # fmt: skip
        return _uncompiled(params.module)
    if type(params).__module__.startswith("torch.distributed.fsdp"):
        raise problem(
            "params", f"a model wrapped in {type(params).__name__}", "whole parameters are needed (ZeRO-1)",
            "pass the plain module: distmuon shards optimizer state and gradients by itself",
        )  # fmt: skip
    return params


def listed(params: Any) -> Any:
    """A module as it is; what else an optimizer may be given as lists, since it is read twice."""
    if isinstance(params, nn.Module):
        return params
    return [
        {**entry, "params": _as_list(entry.get("params"))} if isinstance(entry, Mapping) else entry
        for entry in _as_list(params)
    ]


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor) else [given]


def frozen(params: Any) -> list[tuple[str, nn.Parameter]]:
    """(fqn, parameter) of all in `params`, a module or `listed` and routed, that need no gradient now."""
    if isinstance(params, nn.Module):
        named = list(params.named_parameters())
    else:
        named = [pair for entry in params for pair in (entry["params"] if isinstance(entry, Mapping) else [entry])]
    return [(fqn, param) for fqn, param in named if not param.requires_grad]


def _uncompiled(params: Any) -> Any:
    """Told by its name: torch._dynamo takes seconds to import."""
    is_compiled = (type(params).__module__, type(params).__name__) == ("torch._dynamo.eval_frame", "OptimizedModule")
    return params._orig_mod if is_compiled else params


def check_parameters(
    model: nn.Module | None, named: Sequence[tuple[str, nn.Parameter]], shapes: Sequence[tuple[int, ...]]
) -> None:
    """Raise for parameters that some framework has cut up, reshaped or replaced, or that live on several devices."""
    held = None if model is None else {id(param) for param in model.parameters()}
    first_fqn, first = named[0]
    for (fqn, param), shape in zip(named, shapes):
        if type(param).__module__.startswith("torch.distributed"):
            found = "a DTensor (FSDP2 or tensor parallel)"
        elif hasattr(param, "ds_id"):
            found = "partitioned by DeepSpeed (zero.Init or stage 3)"
        elif param.is_complex() or not param.is_floating_point():
            found = f"of dtype {param.dtype}"
        elif param.is_meta:
            found = "on the meta device, without values"
        elif param.device != first.device:
            found = f"on {param.device} while {first_fqn} is on {first.device}"
        elif tuple(param.shape) != shape:
            found = f"of shape {tuple(param.shape)} now, {shape} when the optimizer was made"
        elif param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            found = f"of dtype {param.dtype}, which a float32 master would round"
        elif held is not None and id(param) not in held:
            found = "no longer the one that the model holds there"
        else:
            continue
        cure = "make DistMuon from the complete plain model (ZeRO stage 0)"
        if found.startswith("no longer"):
            cure += "; an ordinary forward must come before a functional_call with Parameters of another model"
        raise problem(
            fqn, f"the parameter is {found}", "whole real ones on one device, unchanged since then, are needed", cure
        )
    known = {id(param) for _, param in named}
    for fqn, param in model.named_parameters() if model is not None else ():
        if param.requires_grad and param.numel() and id(param) not in known:
            raise problem(
                fqn, "it is trainable now, and was not in the model or frozen when the optimizer was made",
                "the layout holds no state for it", "make a new DistMuon once the model is complete",
            )  # fmt: skip


def check_memory(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise for parameters whose values are not, each in a place of its own, in memory that kernels may write.

    What an optimizer writes into the memory of a tensor subclass that keeps its values elsewhere reaches nobody.
    """
    for fqn, param in named:
        if not memory.is_plain(param):
            kind = type(param).__name__ if param.layout == torch.strided else f"tensor of {param.layout}"
            raise problem(
                fqn, f"the parameter is a {kind}, whose values are not simply those in its memory",
                "a plain nn.Parameter is needed for what is trained",
                "put nn.Parameter(a plain copy of its values) there, or freeze it with requires_grad_(False)",
            )  # fmt: skip
        if not memory.is_dense(param):
            raise problem(
                fqn, f"the parameter of shape {tuple(param.shape)} has strides {param.stride()}: it is expanded, or a "
                "slice with gaps", "a place for each element, without gaps, is needed",
                "put nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format)) there",
            )  # fmt: skip
    pair = memory.overlapping([param for _, param in named])
    if pair is not None:
        (other, _), (fqn, _) = named[pair[0]], named[pair[1]]
        raise problem(
            fqn, f"it lies in the memory of {other}, as a Parameter of its own", "one Parameter a memory is needed",
            "tie weights as modules do, module.weight = other.weight (not .data), before DistMuon is made",
        )  # fmt: skip


def is_ordinary(model: nn.Module, params: Sequence[nn.Parameter]) -> bool:
    """Whether this forward of `model` is one to build buffers in.

    Inside `torch.func.functional_call` the model holds other tensors than `params` for a moment; inside a transform of
    torch.func, or under FakeTensorMode, a copy of a parameter is no memory that lasts. A Parameter in the place of
    another is taken for one that stays: `check_parameters` refuses it.
    """
    known = {id(param) for param in params}
    swapped = any(id(held) not in known and not isinstance(held, nn.Parameter) for held in model.parameters())
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not swapped and not in_transform and type(torch.empty(0)) is Tensor


def late_group() -> ValueError:
    """The refusal of `add_param_group` once the optimizer is made."""
    return problem(
        "add_param_group", "called after construction", "the layout is fixed by all parameters together",
        "make a new DistMuon with all parameters",
    )  # fmt: skip


def not_copied() -> ValueError:
    """The refusal of deepcopy and pickle."""
    return problem(
        "DistMuon", "copied or pickled as an object (or with a scheduler that holds it)",
        "one optimizer manages a parameter, with hooks and buffers", "use state_dict() or distmuon.save_checkpoint",
    )  # fmt: skip


def unled_engine() -> ValueError:
    """The refusal of a DeepSpeed engine that would clip what is not there and reduce each micro-batch."""
    return problem(
        "DeepSpeed", "an engine that the integration does not lead", "its clip and accumulation must reach DistMuon",
        "call distmuon.integrations.deepspeed.register() before deepspeed.initialize",
    )  # fmt: skip


def loaded_unlike(empty: Sequence[int]) -> ValueError:
    """The refusal of a `load_state_dict` that not all ranks were given."""
    return problem(
        "load_state_dict", f"the state of ranks {list(empty)} is empty, that of the others is not",
        "every rank needs the whole state", "read the same file on every rank",
    )  # fmt: skip


_ASK_TOGETHER = (
    "the state is spread over the ranks, so all must call it",
    "call optimizer.consolidate_state_dict() on all ranks first, then one rank alone may ask; "
    "or let all call distmuon.save_checkpoint",
)


def waits_for(where: str, limit_s: float, absent: str) -> str:
    """What a rank says while it waits at `where` for `absent` to ask with it."""
    return str(problem(where, f"waits for {absent}, for {limit_s:g} s at the most", *_ASK_TOGETHER))


def asked_alone(where: str, limit_s: float, absent: str, standing: Mapping[str, str]) -> ValueError:
    """The refusal of a `state_dict` that not all ranks call. `standing`: by rank, in which collective it waits."""
    found = [f"{absent} did not call it" + ("" if standing else f" within {limit_s:g} s")]
    found += [f"{rank} stands at {place}, which waits for this rank" for rank, place in list(standing.items())[:3]]
    return problem(where, "; ".join(found), *_ASK_TOGETHER)


def kept_elsewhere(dp_rank: int, to: int) -> ValueError:
    """The refusal of a `state_dict` on a rank that has let the consolidated state go."""
    return problem(
        f"state_dict on rank {dp_rank}", f"the state was consolidated on rank {to} alone",
        "a rank that asks alone needs the consolidated state",
        "ask on that rank, or call optimizer.consolidate_state_dict() on all ranks, which keeps it on all",
    )  # fmt: skip


def forgot_alone(where: str, found: str) -> ValueError:
    """The refusal of a `zero_grad` that not all ranks call, and what the first one says while it waits."""
    return problem(
        where, found, "between backward and step, and when called twice, it drops what all ranks have begun to reduce",
        "call it on all ranks; model.zero_grad() drops what this rank alone has accumulated under no_sync",
    )  # fmt: skip


def not_a_rank(to: object, dp_size: int) -> ValueError:
    """The refusal to consolidate on a rank that the group does not have."""
    return problem(
        "consolidate_state_dict", f"found to={to!r}", f"a rank of the group, 0 to {dp_size - 1}, or None is needed",
        "None keeps the state on all ranks",
    )  # fmt: skip


def no_loss_scaling() -> ValueError:
    """The refusal of torch.amp.GradScaler, raised when it asks whether this optimizer scales by itself."""
    return problem(
        "GradScaler",
        "torch's own, or a trainer's clip, looks for gradients in param.grad, which distmuon has taken by then",
        "a scaler and a clip that ask the reduction are needed",
        "use distmuon.GradScaler with float16 (bfloat16 needs none) and optimizer.clip_grad_norm_; under a trainer "
        'that averages by itself, as Lightning\'s does, pass grad_reduction="external"',
    )


SILENCED = "reduces_nothing_for_distmuon"  # set by `distmuon.integrations.ddp.silence` on its wrapper


def check_wrapper(params: Sequence[nn.Parameter]) -> None:
    """Raise within the forward of a DistributedDataParallel that will average the gradients of `params` as well."""
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    if wrapper is None or getattr(wrapper, SILENCED, False):
        return
    ours = {id(param) for param in params}
    if any(id(param) in ours for param in wrapper.parameters()):
        raise problem(
            "DistributedDataParallel", "it runs the model, and averages the gradients that DistMuon reduces",
            "one reduction of the gradients is needed",
            "prepare the model with the trainer's own line: distmuon.integrations.accelerate.prepare in the place of "
            "accelerator.prepare, distmuon.integrations.fabric.setup; silence a wrapper of your own by "
            'distmuon.integrations.ddp.silence; or let it average (Lightning\'s Trainer): grad_reduction="external"',
        )  # fmt: skip


def clipped_before_unscaling() -> ValueError:
    """The refusal to unscale what was clipped already, by `clip_grad_norm_` or by `reduce_gradients`."""
    return problem(
        "GradScaler", "gradients that still carried the loss scale were clipped",
        "unscaling before clipping is needed",
        "call scaler.unscale_ before clip_grad_norm_ (and, with max_grad_norm, before reduce_gradients)",
    )  # fmt: skip


Held = list[tuple[object, list[int]]]


def held_by(param_groups: Sequence[dict[str, Any]]) -> Held:
    """(rule, ids of its parameters) of each group."""
    lists = [group.get("params") for group in param_groups]
    of_each = [[id(param) for param in params] if isinstance(params, list) else [] for params in lists]
    return [(group.get("rule"), ids) for group, ids in zip(param_groups, of_each)]


def check_held(param_groups: Sequence[dict[str, Any]], made: Held) -> None:
    """Raise if somebody exchanged the parameters, rules or order of the groups that were `made`: updates would miss
    what they hold now."""
    held = held_by(param_groups)
    if held != made:
        now, then = (sum(len(ids) for _, ids in groups) for groups in (held, made))
        raise problem(
            "param_groups", f"they hold {now} parameters that are not the {then} of construction, in their groups",
            "distmuon keeps its own masters and needs the model's own parameters, under their rules, in order",
            "keep other optimizers' wrappers away (DeepSpeed: ZeRO stage 0, cast the model itself)",
        )  # fmt: skip


def check_frozen(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise for a parameter that was frozen at construction and is trained now."""
    for fqn, param in named:
        if param.requires_grad:
            raise problem(
                fqn, "requires_grad was switched on after construction", "the layout holds no state for it",
                "make a new DistMuon when parameters are unfrozen",
            )  # fmt: skip


def check(
    grad_shards: Sequence[Tensor],
    adamw_grads: Sequence[Tensor],
    present: Sequence[bool],
    group: DataParallelGroup,
    fingerprint: int = 0,
) -> Verdict:
    """One all-reduce. The host reads the device only if some parameter had no gradient here.

    `adamw_grads`: the parts of `grad_shards` that AdamW will square. `fingerprint`: below 2**16, of what must be equal
    on all ranks. It is where dp_size times the sum of its squares is the square of its sum: whole numbers that float64
    holds exactly up to 1,024 ranks.
    """
    squares = (squares_on_cpu if grad_shards[0].device.type == "cpu" else squares_on_device)(grad_shards)
    flags = torch.ones(len(present), dtype=torch.float64, device=squares.device)
    if not all(present):
        flags.copy_(torch.tensor(present, dtype=torch.float64))
    prints = flags.new_full((2,), fingerprint)
    prints[1:].square_()
    large = _has_large(adamw_grads, squares).to(torch.float64)
    message = torch.cat([torch.stack([squares, large]), prints, flags])
    reduced = group.start_all_reduce(message, stage="guard").wait()
    total_norm = reduced[0].sqrt()
    if not all(present):
        present = [count > 0 for count in reduced[4:].tolist()]
    apart = reduced[2].square() != group.dp_size * reduced[3]
    ok = (total_norm < LARGEST_NORM) & ~apart
    return Verdict(total_norm.float(), ok, present, known_on_host(ok), apart, reduced[1] == 0)


def squares_on_device(shards: Sequence[Tensor]) -> Tensor:
    """0-dim float64: the sum of squares of all elements of the float32 `shards`, right from the smallest to the largest
    float32. On CUDA one pass over all, with float64 in registers only; nothing waits."""
    return torch.stack(torch._foreach_norm(list(shards), 2.0, dtype=torch.float64)).square().sum()


def squares_on_cpu(shards: Sequence[Tensor]) -> Tensor:
    """The same on a CPU, where a conversion is a pass, and where reading the result is free: a second look at what the
    squares of float32 could not hold."""
    # By rows: over all elements at once the CPU's float32 sum loses a thousandth at 30 million of them.
    rows = [torch.linalg.vector_norm(shard.view(-1, gcd(shard.numel(), 1024)), dim=1) for shard in shards]
    total = torch.stack([norms.double().square().sum() for norms in rows]).sum()
    if _EXACT[0] <= total < _EXACT[1]:
        return total
    parts = [part for shard in shards for part in torch.split(shard, 2**16)]  # so small, in cache also as float64
    return torch.stack([part.double().square_().sum() for part in parts]).sum()


def _has_large(grads: Sequence[Tensor], squares: Tensor) -> Tensor:
    """0-dim bool: float32 cannot hold the square of some element. `squares`: at least the sum of all of them."""
    if not grads or (squares.device.type == "cpu" and squares < SQUARABLE**2):
        return torch.zeros((), dtype=torch.bool, device=squares.device)
    return torch.stack(torch._foreach_norm(list(grads), float("inf"))).amax() >= SQUARABLE


def known_on_host(ok: Tensor) -> bool | None:
    """What `ok` says, if reading it waits for no device."""
    return bool(ok) if ok.device.type == "cpu" else None


def agree_on_plan(fingerprint: str, items: Sequence[str], group: DataParallelGroup) -> None:
    """Raise the same `ValueError` on all ranks unless they made the same layout. Blocking, once.

    `items`: one text a parameter or option, in order, to name the first difference.
    """
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()
    if len(set(group.gather_objects(digest, stage="comparison of the plans"))) == 1:
        return
    everyone = group.gather_objects(list(items), stage="comparison of the plans")
    for rank, theirs in enumerate(everyone):
        for position in range(max(len(theirs), len(everyone[0]))):
            ours, other = (dict(enumerate(texts)).get(position, "nothing") for texts in (everyone[0], theirs))
            if ours != other:
                raise problem(
                    f"rank {rank}",
                    f"found {other}, on rank 0 {ours}",
                    "all ranks must build the same model and options in the same order",
                    "make the model, the arguments and the learning rate independent of the rank",
                )
    raise problem(
        "plan",
        "ranks agree on parameters and options but not on the layout or the kernels",
        "all ranks need the same versions of distmuon and of its kernels",
        "install the same everywhere",
    )


def not_finite(fqns: Sequence[str], params: Sequence[nn.Parameter]) -> list[str]:
    """The names of `params` that hold NaN or inf. Reads the device once."""
    if not params:
        return []
    largest = torch.stack([torch.linalg.vector_norm(p.detach(), ord=float("inf")) for p in params])
    return [fqn for fqn, finite in zip(fqns, torch.isfinite(largest).tolist()) if not finite]


def check_finite(broken: Sequence[str], where: str = "") -> None:
    """Raise if training would start from weights that are `broken`: every gradient would be NaN, every step skipped."""
    if broken:
        raise problem(
            ", ".join(broken[:5]), f"{len(broken)} parameters hold NaN or inf{where} before the first step",
            "finite values are needed to start from", "initialize the model, or load its weights, before training",
        )  # fmt: skip


def agree_on_values(fqns: Sequence[str], params: Sequence[nn.Parameter], group: DataParallelGroup) -> None:
    """Raise on all ranks, naming the first difference, unless all hold the same values. Blocking, once.

    For a start in the middle of a step, when rank 0's values can no longer be taken before the forward has used them.
    """
    sums = [[float(p.detach().double().sum()), float(p.detach().double().square().sum())] for p in params]
    everyone = group.gather_objects(sums, stage="comparison of the first values")
    for rank, theirs in enumerate(everyone):
        check_finite([fqn for fqn, of_each in zip(fqns, theirs) if not isfinite(of_each[1])], f" on rank {rank}")
    for number, fqn in enumerate(fqns):
        for rank, theirs in enumerate(everyone):
            if theirs[number] != everyone[0][number]:
                raise problem(
                    fqn, f"rank {rank} starts from other values than rank 0, and a forward has used them already",
                    "all ranks must start from the same values",
                    "pass the model itself and call it once before anything else (an ordinary forward with gradients "
                    "takes rank 0's values), or seed all ranks alike",
                )  # fmt: skip


def agree_on_reduced(grads: Sequence[Tensor], group: DataParallelGroup) -> None:
    """Raise on all ranks unless their gradients are the same: `grad_reduction="external"` promises averaged ones.

    Compares the sums of squares; blocking, once, at the first step.
    """
    total = float(
        sum((torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in grads), torch.zeros(()))
    )
    totals = group.gather_objects(total, stage="comparison of the first gradients")
    if max(totals) - min(totals) > 1e-5 * max(map(abs, totals)):
        raise problem(
            'grad_reduction="external"',
            f"the ranks' gradients differ (squared norms from {min(totals):.6g} to {max(totals):.6g})",
            "gradients already averaged over the ranks are needed",
            'wrap the model in DDP, or let distmuon reduce: grad_reduction="reduce_scatter"',
        )
