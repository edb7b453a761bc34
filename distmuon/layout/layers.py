"""The kind of each parameter in the modules that hold it: a linear weight, a filter, a table, a part of a known layer.

It reads a model, or (name, parameter) pairs, into `Use`s; it decides nothing about update rules. In a module of a known
type only its `weight` is a matrix; other parameters of a subclass or wrapper (adapters of loralib, magnitudes of a
weight norm) are not. It knows module types, names and shapes, and makes no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from distmuon.layout.names import Kind, by_name, is_adapter

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_WEIGHTS = ("weight", "weight_orig", "weight_v")  # the latter two under torch's pruning, spectral and weight norm
_PARAMETRIZED = {  # torch's parametrizations: the tensor that has the weight's shape and role
    "_WeightNorm": "original1",
    "_SpectralNorm": "original",
}
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "module", "base_layer", "original_module"}

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """A use of a parameter by a module; a tied parameter has several.

    `fqn` is the parameter's first name, `path` the names of the modules around it without wrappers (torch.compile, DDP,
    peft's copies), `inputs` and `outputs` the widths of the layer (0: unknown).
    """

    fqn: str
    path: Path
    name: str
    shape: tuple[int, ...]
    kind: Kind
    reason: str
    inputs: int = 0
    outputs: int = 0
    owner: nn.Module | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it counts in the model's structure, as does the weight of a layer of unknown type."""
        return self.is_layer or self.kind in ("depthwise", "attention", "recurrent", "experts", "fused experts")

    @property
    def is_layer(self) -> bool:
        """Whether it is the weight of a single linear layer or convolution."""
        known = self.kind in ("linear", "stored (in, out)", "convolution")
        return known or (self.kind == "unknown" and self.name == "weight" and len(self.shape) == 2)

    @property
    def is_vector(self) -> bool:
        return sum(size != 1 for size in self.shape) < 2


@dataclass(frozen=True, slots=True)
class Structure:
    """A model as routing sees it: uses of its parameters in registration order, and the class of module at each path.

    `heads`: the fqns of the parameters that the model itself declares as its output embeddings.
    """

    uses: tuple[Use, ...]
    classes: dict[Path, type]
    heads: frozenset[str]


def read_pairs(pairs: Iterable[tuple[str, nn.Parameter]]) -> Structure:
    """Read (name, parameter) pairs, of which only names and shapes are known."""
    uses = []
    for fqn, param in pairs:
        *path, name = fqn.split(".")
        uses.append(_use(fqn, unwrapped(path), name, param, None))
    return Structure(tuple(uses), {}, frozenset())


def read_module(model: nn.Module) -> Structure:
    """Read every use of every parameter of `model`, including frozen and tied parameters."""
    first = {id(param): fqn for fqn, param in model.named_parameters()}
    modules = dict(model.named_modules())
    uses = []
    classes = {}
    heads = set()
    for module_name, module in modules.items():
        parts = module_name.split(".") if module_name else []
        owner: nn.Module | None = module
        stands_for = ""
        if isinstance(module, nn.utils.parametrize.ParametrizationList):
            *around, _, stands_for = parts
            owner, parts = modules.get(".".join(around)), around
        elif parts[-1:] != ["parametrizations"] and "parametrizations" not in parts:
            classes[unwrapped(parts)] = _class_of(module)
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            name = _parametrized(module, name, stands_for)
            uses.append(_use(first[id(param)], unwrapped(parts), name, param, owner))
        heads |= {first[id(param)] for param in _declared_head(module) if param.ndim > 1 and id(param) in first}
    return Structure(tuple(uses), classes, frozenset(heads))


def unwrapped(parts: Iterable[str]) -> Path:
    """The parts of a module's name without wrappers. peft's copies are called "modules_to_save.<name>"."""
    kept: list[str] = []
    copied = False
    for part in parts:
        if not copied and part not in _WRAPPERS and part != "modules_to_save":
            kept.append(part)
        copied = part == "modules_to_save"
    return tuple(kept)


def _class_of(module: nn.Module) -> type:
    """The class that the model's author wrote: `fully_shard` replaces it by a subclass."""
    kind = type(module)
    first, *others = kind.__bases__
    return others[0] if first.__module__.startswith("torch.distributed.fsdp") and others else kind


def _declared_head(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the output embeddings that a transformers model declares."""
    get_head = getattr(module, "get_output_embeddings", None)
    try:
        head = get_head() if callable(get_head) else None
    except (AttributeError, NotImplementedError):  # a base model without a head
        return
    if isinstance(head, nn.Module):
        yield from head.parameters()


def _parametrized(module: nn.Module, name: str, stands_for: str) -> str:
    """`name`, or for a parametrization's tensor the name of the weight that it represents, or a name of no weight."""
    if not stands_for:
        return name
    assert isinstance(module, nn.utils.parametrize.ParametrizationList)
    kinds = [type(step) for step in module]
    is_torch = len(kinds) == 1 and kinds[0].__module__ == "torch.nn.utils.parametrizations"
    known = _PARAMETRIZED.get(kinds[0].__name__) if is_torch else None
    if known is None:
        return f"parametrized {stands_for}"
    return stands_for if name == known else f"{stands_for}'s {name}"


def _use(fqn: str, path: Path, name: str, param: nn.Parameter, owner: nn.Module | None) -> Use:
    shape = tuple(param.shape)
    if is_adapter(fqn):
        return Use(fqn, path, name, shape, "vector", "adapter by name", owner=owner)
    kind, reason = _by_type(owner, name, param) if owner is not None else ("unknown", "")
    if kind == "unknown" and not name.startswith("parametrized "):
        kind, reason = by_name(path, name, shape, owner is not None)
    inputs, outputs = _widths(kind, shape, owner)
    return Use(fqn, path, name, shape, kind, reason, inputs, outputs, owner)


def _by_type(module: nn.Module, name: str, param: nn.Parameter) -> tuple[Kind, str]:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding", "embedding (or tied to one)"
    if isinstance(module, _NORMS):
        return "normalization", "normalization"
    kind: Kind
    if isinstance(module, nn.modules.conv._ConvNd):
        is_weight = name in _WEIGHTS
        kind = "depthwise" if param.ndim > 1 and param.shape[1] == 1 and module.groups > 1 else "convolution"
        reason = f"{kind} convolution" if kind == "depthwise" else kind
    elif isinstance(module, nn.Linear):
        kind = "linear"
        reason = "linear"
        is_weight = name in _WEIGHTS and param.ndim == 2
    elif isinstance(module, nn.MultiheadAttention):
        kind = "attention"
        reason = "attention projection"
        is_weight = name.endswith("proj_weight")
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        kind = "recurrent"
        reason = "recurrent weight"
        is_weight = name.startswith("weight_")
    elif (_class_of(module).__module__, _class_of(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        kind = "stored (in, out)"
        reason = "linear stored (in, out)"
        is_weight = name == "weight"
    else:
        return "unknown", ""
    if not is_weight and name.startswith("parametrized "):
        return "unknown", ""
    return (kind, reason) if is_weight else ("vector", f"{name!r} of a {type(module).__name__}, not its weight")


def _widths(kind: Kind, shape: tuple[int, ...], owner: nn.Module | None) -> tuple[int, int]:
    """(inputs, outputs) of a single layer; a transposed convolution stores (in, out / groups, *kernel)."""
    if len(shape) < 2 or kind not in ("linear", "stored (in, out)", "convolution", "depthwise", "unknown"):
        return 0, 0
    if isinstance(owner, nn.modules.conv._ConvNd):
        return owner.in_channels, owner.out_channels
    return (shape[1], shape[0]) if kind != "stored (in, out)" else (shape[0], shape[1])
