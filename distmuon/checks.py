"""Checks that refuse setups which would train wrongly: wrapped models, and cut, moved, shared or replaced parameters.

This module decides what is refused. Its functions raise or return what they found; none changes anything or
communicates with other ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.errors import problem
from distmuon.layout import memory
from distmuon.layout.boxes import Box
from distmuon.layout.routing import ParamSpec
from distmuon.options import NORMUON, Options
from distmuon.step.dtensors import box_of, is_dtensor, is_fsdp2, local_of

SILENCED = "reduces_nothing_for_distmuon"  # set by `distmuon.integrations.ddp.silence` on its wrapper
GroupMembers = list[tuple[object, list[int]]]
Boxes = Sequence[Box | None]


def unwrap(params: Any, grad_reduction: str) -> Any:
    """Return the module without the wrappers of `torch.compile` and DDP, so that its names are the model's.

    Refuses wrappers that would average gradients a second time or that hold cut parameters.
    """
    params = _uncompiled(params)
    if isinstance(params, nn.parallel.DistributedDataParallel):
        if grad_reduction == "reduce_scatter":
            raise problem(
                "params",
                found="a model wrapped in DistributedDataParallel, which averages the gradients itself",
                needed="gradients must be reduced once",
                cure='pass grad_reduction="external", or pass the unwrapped model (and silence the wrapper: '
                "distmuon.integrations.ddp.silence)",
            )
        return _uncompiled(params.module)
    for name, module in params.named_modules() if isinstance(params, nn.Module) else ():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise problem(
                name or "params",
                found="a model wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters have no matrices",
                needed="whole parameters (ZeRO-1), or those of FSDP2, are needed",
                cure="pass the plain module, which distmuon itself shards, or call "
                "torch.distributed.fsdp.fully_shard(model)",
            )
    return params


def _uncompiled(params: Any) -> Any:
    # Compare by name: importing torch._dynamo takes seconds.
    is_compiled = (type(params).__module__, type(params).__name__) == ("torch._dynamo.eval_frame", "OptimizedModule")
    return params._orig_mod if is_compiled else params


def listed(params: Any) -> Any:
    """Return a module as it is, and other `params` with their iterables as lists, since they are read twice."""
    if isinstance(params, nn.Module):
        return params
    return [
        {**entry, "params": _as_list(entry.get("params"))} if isinstance(entry, Mapping) else entry
        for entry in _as_list(params)
    ]


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor) else [given]


def frozen(params: Any) -> list[tuple[str, nn.Parameter]]:
    """(fqn, parameter) of all frozen parameters in `params`, a module or the result of `listed`."""
    if isinstance(params, nn.Module):
        named = list(params.named_parameters())
    else:
        named = [pair for entry in params for pair in (entry["params"] if isinstance(entry, Mapping) else [entry])]
    return [(fqn, param) for fqn, param in named if not param.requires_grad]


def _why_unfit(param: Tensor, shape: tuple[int, ...]) -> str:
    """Why `param` cannot be trained, as a text that follows "the parameter is"; "" if it can."""
    if is_dtensor(param):
        return "a DTensor, and was a plain tensor when the optimizer was made"
    if hasattr(param, "ds_id"):
        return "partitioned by DeepSpeed (zero.Init or stage 3)"
    if param.is_complex() or not param.is_floating_point():
        return f"of dtype {param.dtype}"
    if param.is_meta:
        return "on the meta device, without values"
    if tuple(param.shape) != shape:
        return f"of shape {tuple(param.shape)} now, {shape} when the optimizer was made"
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"of dtype {param.dtype}, which a float32 master would round"
    return ""


def check_parameters(
    model: nn.Module | None, named: Sequence[tuple[str, nn.Parameter]], shapes: Sequence[tuple[int, ...]]
) -> None:
    """Raise for parameters that a framework has cut, reshaped or replaced, or that are on several devices."""
    if model is not None:
        _check_not_sharded_since(model)
    held = None if model is None else {id(param) for param in model.parameters()}
    first_fqn, first = named[0]
    for (fqn, param), shape in zip(named, shapes):
        cure = "make DistMuon from the complete plain model (ZeRO stage 0)"
        found = _why_unfit(param, shape)
        if not found and param.device != first.device:
            found = f"on {param.device} while {first_fqn} is on {first.device}"
        if not found and held is not None and id(param) not in held:
            found = "no longer the one that the model holds there"
            cure += "; an ordinary forward must come before a functional_call with Parameters of another model"
        if found:
            needed = "whole real parameters on one device, unchanged since construction, are needed"
            raise problem(fqn, found=f"the parameter is {found}", needed=needed, cure=cure)
    known = {id(param) for _, param in named}
    for fqn, param in model.named_parameters() if model is not None else ():
        if param.requires_grad and param.numel() and id(param) not in known:
            raise _trainable_since(fqn)


def _trainable_since(fqn: str) -> ValueError:
    return problem(
        fqn,
        found="it is trainable now, but was absent or frozen when the optimizer was made",
        needed="the layout holds no state for it",
        cure="make a new DistMuon once the model is complete",
    )


def check_fragments(routed: Sequence[tuple[ParamSpec, nn.Parameter]]) -> None:
    """Raise for a plain tensor that Megatron's tensor parallelism has cut, if Muon is to take it for a matrix."""
    for spec, param in routed:
        if spec.rule == "muon" and getattr(param, "tensor_model_parallel", False) and not is_dtensor(param):
            raise problem(
                spec.fqn,
                found=f"a fragment of shape {spec.shape} of a tensor-parallel weight (tensor_model_parallel is set)",
                needed="Muon needs the whole matrix, or a DTensor that says which part this is",
                cure="cut the model by torch's parallelize_module, which makes DTensors, or route the weight to adamw",
            )


def check_copies(specs: Sequence[ParamSpec], num_ranks: int) -> None:
    """Raise for a parameter with more copies than `model_parallel_group` has ranks."""
    for spec in specs:
        if spec.copies > num_ranks:
            raise problem(
                spec.fqn,
                found=f"its route says that {spec.copies} ranks of model_parallel_group hold it",
                needed=f"at most the {num_ranks} ranks of that group are possible",
                cure="pass model_parallel_group, or correct Route(copies=)",
            )


def check_normuon(param_groups: Sequence[Mapping[str, Any]], made: Collection[int]) -> None:
    """Raise for a group that got NorMuon after the optimizer was made; `made`: the groups that had it then."""
    for number, group in enumerate(param_groups):
        if group.get(NORMUON) is not None and number not in made:
            raise problem(
                f"param_groups[{number}].{NORMUON}",
                found=f"found {group[NORMUON]!r}, and none when the optimizer was made",
                needed="the rows of its matrices have no moments",
                cure=f"pass {NORMUON} to DistMuon, or to a Route's options",
            )


def check_one_group(specs: Sequence[ParamSpec], what: str, cure: str) -> None:
    """Raise for a parameter whose route has a process group, if `what` needs the same parameters on all ranks."""
    for spec in specs:
        if spec.group:
            raise problem(
                what,
                found=f"{spec.fqn} has a route with a process_group: other ranks hold other parameters in its place",
                needed="all ranks must hold the same parameters",
                cure=cure,
            )


def check_memory(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise unless each element of a parameter has its own place in memory that kernels may write.

    A tensor subclass that keeps its values elsewhere would not see what the optimizer writes into its memory.
    """
    for fqn, param in named:
        if not memory.is_plain(param):
            kind = type(param).__name__ if param.layout == torch.strided else f"tensor of {param.layout}"
            raise problem(
                fqn,
                found=f"the parameter is a {kind}, whose values are not simply those in its memory",
                needed="trained parameters must be plain",
                cure="replace it by nn.Parameter(a plain copy of its values), or freeze it with requires_grad_(False)",
            )
        if not memory.is_dense(param):
            raise problem(
                fqn,
                found=f"the parameter of shape {tuple(param.shape)} has strides {param.stride()}: it is expanded, or a "
                "slice with gaps",
                needed="every element must have its own place, without gaps",
                cure="replace it by nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))",
            )
    pair = memory.overlapping([param for _, param in named])
    if pair is not None:
        (other, _), (fqn, _) = named[pair[0]], named[pair[1]]
        raise problem(
            fqn,
            found=f"it lies in the memory of {other}, as a separate Parameter",
            needed="different Parameters must not share memory",
            cure="tie weights as modules do, module.weight = other.weight (not .data), before DistMuon is made",
        )


def _check_not_sharded_since(model: nn.Module) -> None:
    """Raise if `fully_shard` was called after DistMuon was made: the model holds other parameters since."""
    for name, module in model.named_modules():
        if is_fsdp2(module):
            raise problem(
                name or "model",
                found="fully_shard was called after DistMuon was made, and has put other parameters into the model",
                needed="the optimizer must be made of those",
                cure="call fully_shard(model) first, then make DistMuon(model, lr=...); accelerate: prepare both by "
                "distmuon.integrations.accelerate.prepare",
            )


def is_cut(params: Any, named: Sequence[tuple[str, nn.Parameter]]) -> bool:
    """Whether FSDP2, DTensor's parallelism or both have cut the trained parameters.

    Raises, naming the first, for a plain parameter that FSDP2 does not hold, and for DTensors that are neither sharded
    nor replicated, or have no plain memory on the mesh's devices. `params`: a module, or what else the optimizer was
    given, `listed`.
    """
    has_fsdp2 = isinstance(params, nn.Module) and any(is_fsdp2(module) for module in params.modules())
    if not has_fsdp2 and not any(is_dtensor(param) for _, param in named):
        return False
    for fqn, param in named:
        if not is_dtensor(param) and (has_fsdp2 or not isinstance(params, nn.Module)):
            raise problem(
                fqn,
                found="it is trained and is a plain tensor in a model that fully_shard has cut",
                needed="FSDP2 must hold it, or nobody averages its gradient",
                cure="leave it out of ignored_params; if the last forward ended without a backward, call "
                "model.reshard() before DistMuon is made",
            )
        found = not_a_cut(param) if is_dtensor(param) else ""
        if found:
            raise problem(
                fqn,
                found=f"the parameter is {found}",
                needed="sharded or replicated parameters in plain memory on the mesh's devices are needed",
                cure="shard the model by fully_shard, parallelize_module or distribute_tensor, without offloading; a "
                "plain model is sharded by DistMuon itself",
            )
    return True


def not_a_cut(param: Any) -> str:
    """How a DTensor is placed, if it is not sharded or replicated, or what its local tensor is instead of plain."""
    kinds = {type(placement).__name__ for placement in param.placements}
    if not kinds <= {"Shard", "_StridedShard", "Replicate"}:
        return f"placed {param.placements}"
    local = local_of(param)
    if type(local) is not Tensor:
        return f"a DTensor of {type(local).__name__}"
    if local.device.type != param.device_mesh.device_type and not local.is_meta:
        return f"offloaded to {local.device} from a mesh of {param.device_mesh.device_type}"
    return ""


def check_options_when_cut(options: Options, specs: Sequence[ParamSpec] = ()) -> None:
    """Raise for options that FSDP2 decides, or that mean nothing there, unless they are at their default."""
    check_one_group(specs, "DTensors", "give experts a mesh of their own, and leave process_group out of the routes")
    sharding, precision = options.sharding, options.precision
    for name, value, default, why in (
        ("sharding.packing", sharding.packing, "balanced", "others have cut the parameters"),
        ("sharding.placement", sharding.placement, "owner", "all ranks but one would repeat each matrix"),
        ("sharding.param_gather", sharding.param_gather, "parameters", "FSDP2 gathers parameters by itself"),
        ("sharding.release_grads", sharding.release_grads, False, "FSDP2 holds the gradients"),
        ("sharding.overlap", sharding.overlap == "forward", False, "FSDP2 gathers parameters in its own forward"),
        ("precision.reduce", precision.reduce, torch.float32, "FSDP2 reduces: MixedPrecisionPolicy(reduce_dtype=...)"),
        ("verify_every", options.verify_every, 0, "ranks hold different parts of the parameters"),
    ):
        if value != default:
            raise problem(
                name,
                found="set for a model that FSDP2 or DTensor has cut",
                needed=f"its default is needed: {why}",
                cure="leave it out",
            )
    if precision.momentum == torch.int8:
        raise problem(
            "precision.momentum",
            found="int8 for a model that FSDP2 or DTensor has cut",
            needed="float32 or bfloat16 is needed: scales of blocks have no placement of a DTensor",
            cure="pass Precision(momentum=torch.bfloat16)",
        )
    if precision.master == "remainder":
        raise problem(
            "precision.master",
            found='"remainder" for a model that FSDP2 or DTensor has cut',
            needed="float32 is needed: torch's checkpoints would take the missing 16 bits for a master, and cast them",
            cure='pass Precision(master="float32")',
        )


def check_shards(
    model: nn.Module | None, named: Sequence[tuple[str, nn.Parameter]], shapes: Sequence[tuple[int, ...]], made: Boxes
) -> None:
    """Raise for parameters of which this rank does not hold the box for which the layout was `made`, or no real one."""
    for (fqn, param), shape, box in zip(named, shapes, made):
        local = local_of(param)
        sizes = (0,) * len(shape) if box is None else box[1]
        found = _why_unfit(local, sizes if prod(sizes) else tuple(local.shape))
        if not found and (tuple(param.shape) != shape or box_of(param) != box or prod(sizes) != local.numel()):
            found = f"of shape {tuple(param.shape)}, box {box_of(param)} now"
        if not found and not local.is_contiguous():
            found = f"of local strides {local.stride()}"
        if found:
            raise problem(
                fqn,
                found=f"on this rank the parameter is {found}",
                needed=f"box {box} (offsets, sizes) of shape {shape}, real numbers in row-major order, is needed",
                cure="initialize, cast and shard the model first, then make DistMuon",
            )
    known = {fqn for fqn, _ in named}
    for fqn, param in model.named_parameters() if model is not None else ():
        if param.requires_grad and param.numel() and fqn not in known:
            raise _trainable_since(fqn)


def is_ordinary(model: nn.Module, params: Sequence[nn.Parameter]) -> bool:
    """Whether buffers may be built in this forward of `model`.

    During `torch.func.functional_call` the model holds other tensors than `params`; in a transform of torch.func, or
    under FakeTensorMode, a copy of a parameter does not last. A Parameter that replaces another is treated as
    permanent: `check_parameters` refuses it.
    """
    known = {id(param) for param in params}
    swapped = any(id(held) not in known and not isinstance(held, nn.Parameter) for held in model.parameters())
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not swapped and not in_transform and type(torch.empty(0)) is Tensor


def check_wrapper(params: Sequence[nn.Parameter]) -> None:
    """Raise in the forward of a DistributedDataParallel that will also average the gradients of `params`."""
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    if wrapper is None or getattr(wrapper, SILENCED, False):
        return
    trained = {id(param) for param in params}
    if any(id(param) in trained for param in wrapper.parameters()):
        raise problem(
            "DistributedDataParallel",
            found="it runs the model, and averages the gradients that DistMuon reduces",
            needed="gradients must be reduced once",
            cure="prepare the model by distmuon.integrations.accelerate.prepare instead of accelerator.prepare, or by "
            "distmuon.integrations.fabric.setup; silence your own wrapper by distmuon.integrations.ddp.silence; or let "
            'it average (Lightning\'s Trainer): grad_reduction="external"',
        )


def check_frozen(named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise for a parameter that was frozen at construction and is trainable now."""
    for fqn, param in named:
        if param.requires_grad:
            raise problem(
                fqn,
                found="requires_grad was switched on after construction",
                needed="the layout holds no state for it",
                cure="make a new DistMuon when parameters are unfrozen",
            )


def group_members(param_groups: Sequence[dict[str, Any]]) -> GroupMembers:
    """(rule, ids of the parameters) of each group."""
    lists = [group.get("params") for group in param_groups]
    ids_per_group = [[id(param) for param in params] if isinstance(params, list) else [] for params in lists]
    return [(group.get("rule"), ids) for group, ids in zip(param_groups, ids_per_group)]


def check_members(param_groups: Sequence[dict[str, Any]], made: GroupMembers) -> None:
    """Raise if parameters, rules or order of the groups differ from those `made` at construction.

    Updates would not reach the parameters that the groups hold now.
    """
    members = group_members(param_groups)
    if members != made:
        now, then = (sum(len(ids) for _, ids in groups) for groups in (members, made))
        raise problem(
            "param_groups",
            found=f"they hold {now} parameters that are not the {then} of construction, in their groups",
            needed="distmuon keeps masters and needs the model's parameters, under their rules, in order",
            cure="do not use other optimizers' wrappers (DeepSpeed: ZeRO stage 0, cast the model itself)",
        )
