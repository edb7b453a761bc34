"""The house of docs/design.md: who may import whom, talk to other ranks, and allocate.

The laws are read from the syntax tree, so a breach is found without running the code. Each law is a function of
(module, source) that returns the breaches it sees; each is first shown a planted breach and a clean neighbour, then the
library.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "distmuon"
DESIGN = (LIBRARY.parent / "docs" / "design.md").read_text()
HOP = re.compile(r"^\| \d+ \| `(?P<file>[\w/]+\.py): (?P<method>\w+)` \|", re.MULTILINE)
# A room imports what stands before it, and `errors`. Rooms of one line do not know each other.
HOUSE: list[set[str]] = [
    {"errors"},
    {"comm", "math"},
    {"options", "newton_schulz"},
    {"layout"},
    {"step"},
    {"checks", "state_dict"},
    {"optimizer"},
    {"checkpoint", "integrations", "planning"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOORS = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}
FACES = {"integrations", "cli", "__main__"}
INTEGERS_ONLY = {"options", "layout", "planning"}
MOVERS = {"step.grad_reduce", "step.matrix_exchange", "step.param_gather"}
COLLECTIVES = {
    *("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "all_gather", "all_gather_into_tensor"),
    *("all_gather_single", "all_gather_coalesced", "all_gather_object", "gather", "gather_object", "gather_single"),
    *("scatter", "scatter_single"),
    *("scatter_object_list", "broadcast_object_list"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single"),
    *("all_to_all", "all_to_all_single", "barrier", "monitored_barrier", "send", "recv", "isend", "irecv"),
    *("batch_isend_irecv", "send_object_list", "recv_object_list"),
}
GROUP_METHODS = {
    *("allreduce", "allgather", "alltoall", "alltoall_base", "allreduce_coalesced", "allgather_coalesced"),
    *("_allgather_base", "_reduce_scatter_base", "allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"),
}
ALLOCATORS = {
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided"),
    *("eye", "from_numpy", "full", "full_like", "linspace"),
    *("logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor"),
    *("Tensor", "zeros", "zeros_like"),
    *("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "clone", "stack", "cat"),
}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in `source`; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ("distmuon." if node.level else "") + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}".replace("..", ".")) for alias in node.names)


def dotted_uses(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every attribute chain and bare name, aliases written out: `d.f` -> torch.distributed.f."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases.update(
                (a.asname or a.name.split(".")[0], a.name if a.asname else a.name.split(".")[0]) for a in node.names
            )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            aliases.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
    for node in ast.walk(tree):
        parts, base = [], node
        while isinstance(base, ast.Attribute):
            parts.insert(0, base.attr)
            base = base.value
        if isinstance(node, (ast.Attribute, ast.Name)):
            root = aliases.get(base.id, base.id) if isinstance(base, ast.Name) else "?"
            yield node.lineno, ".".join([root, *parts])


def rooms_known(source: str) -> Iterator[tuple[int, str]]:
    """(line, room of distmuon) that `source` imports; `import distmuon` itself is the room `__init__`."""
    for line, name in imports(source):
        if name.split(".")[0] == "distmuon":
            room = [*name.split("."), "__init__"][1]
            yield line, room if room in FLOORS or room == "launch" else "__init__"


def breaks_floors(module: str, source: str) -> list[str]:
    """A room imports only rooms that stand before it in `HOUSE`, so there is no circle of rooms."""
    room = module.split(".")[0]
    if room not in FLOORS:
        return [f"{module}: is in no room of the house"]
    known = [(line, other) for line, other in rooms_known(source) if other not in (room, "errors")]
    if room == "__init__":  # the front door shows all rooms but the command line
        return [f"{module}:{line}: imports {other}" for line, other in known if other in ("cli", "launch")]
    return [
        f"{module}:{line}: {room} imports {other}"
        for line, other in known
        if other == "launch" or (FLOORS[other] >= FLOORS[room] and not (room in FACES and other == "__init__"))
    ]


def movers_know_each_other(module: str, source: str) -> list[str]:
    """What moves gradients, pieces and parameters are strangers to each other."""
    found = [(line, name.removeprefix("distmuon.")) for line, name in imports(source)]
    others = MOVERS - {module} if module in MOVERS else set()
    return [f"{module}:{n}: imports {name}" for n, name in found if any(name.startswith(other) for other in others)]


def talks_to_ranks(module: str, source: str) -> list[str]:
    """Collectives only in `comm`; torch's distributed checkpoint only in `checkpoint`."""
    room = module.split(".")[0]
    breaches = []
    for line, name in dotted_uses(source):
        root, _, last = name.rpartition(".")
        collective = root.startswith("torch.distributed") and (last in COLLECTIVES or "functional" in root)
        if room != "comm" and (collective or last in GROUP_METHODS):
            breaches.append(f"{room}:{line}: {name}")
        if room != "checkpoint" and name.startswith("torch.distributed.checkpoint"):
            breaches.append(f"{room}:{line}: {name}")
    for line, name in imports(source):
        banned = "functional" in name or name.rpartition(".")[2] in COLLECTIVES
        if room != "comm" and name.startswith("torch.distributed.") and banned:
            breaches.append(f"{room}:{line}: imports {name}")
        if room != "checkpoint" and name.startswith("torch.distributed.checkpoint"):
            breaches.append(f"{room}:{line}: imports {name}")
    return breaches


def allocates(module: str, source: str) -> list[str]:
    """`options`, `layout` and `planning` make no tensor and know no process group."""
    room = module.split(".")[0]
    if room not in INTEGERS_ONLY:
        return []
    breaches = [
        f"{module}:{line}: imports {name}" for line, name in imports(source) if name.startswith("torch.distributed")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ALLOCATORS:
            breaches.append(f"{room}:{node.lineno}: calls {ast.unparse(node.func)}")
    breaches += [f"{room}:{n}: {name}" for n, name in dotted_uses(source) if name.startswith("torch.distributed")]
    return breaches


def imports_strangers(module: str, source: str) -> list[str]:
    """Beyond torch and the standard library, packages are imported only by the integrations and the command line.

    Triton is imported by the file of its kernels, which is imported where Triton is there.
    """
    room = module.split(".")[0]
    if room in FACES:
        return []
    allowed = {"torch", "distmuon", *sys.stdlib_module_names, *(["triton"] if module == "math.kernels" else [])}
    found = list(imports(source))
    for node in ast.walk(ast.parse(source)):  # a name that is not written out may be any package
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found.append((node.lineno, str(getattr(node.args[0], "value", "?"))))
    return [f"{room}:{line}: imports {name}" for line, name in found if name.split(".")[0] not in allowed]


DIST, FROM = "import torch.distributed as dist", "from torch import distributed as d"
Law = Callable[[str, str], list[str]]
LAWS: list[tuple[Law, str, str, str]] = [  # law, module, a breach, a clean neighbour
    (breaks_floors, "layout.layout", "from distmuon.step.storage import Storage", "from distmuon.options import Route"),
    (breaks_floors, "math.rules", "from distmuon.step.metrics import Metrics", "from distmuon.errors import problem"),
    (breaks_floors, "comm.group", "from distmuon.math import rules", "from distmuon.comm.lost_ranks import RollCall"),
    (breaks_floors, "errors", "from distmuon.math.coefficients import coefficient_schedule", "import torch"),
    (
        breaks_floors,
        "step.engine",
        "from distmuon.optimizer import DistMuon",
        "from distmuon.step.bucket import Bucket",
    ),
    (breaks_floors, "step.bucket", "from distmuon.planning.counts import count", "from distmuon.layout import memory"),
    (breaks_floors, "optimizer", "from distmuon.planning.plan import plan", "from distmuon import checks, state_dict"),
    (breaks_floors, "optimizer", "from distmuon.integrations.ddp import x", "from distmuon.step.engine import Engine"),
    (breaks_floors, "state_dict", "import distmuon", "from .step.storage import Storage"),
    (breaks_floors, "checkpoint.save", "from distmuon.integrations import ddp", "from distmuon.optimizer import x"),
    (breaks_floors, "__init__", "from distmuon.cli import main", "from distmuon.optimizer import DistMuon"),
    (breaks_floors, "cli.plan", "from distmuon import launch", "import distmuon\nimport distmuon.planning.plan"),
    (breaks_floors, "attic", "import torch", ""),
    (
        movers_know_each_other,
        "step.grad_reduce",
        "def f():\n    import distmuon.step.param_gather",
        "import distmuon.step.bucket",
    ),
    (
        movers_know_each_other,
        "step.matrix_exchange",
        "from distmuon.step import grad_reduce",
        "from distmuon.math import rules",
    ),
    (talks_to_ranks, "step.storage", f"{DIST}\ndist.broadcast(x, 0)", f"{DIST}\ndist.get_rank()"),
    (talks_to_ranks, "step.verdict", "import torch\ntorch.distributed.all_reduce(x)", "group.start_all_reduce(x)"),
    (talks_to_ranks, "optimizer", "from torch.distributed import barrier as w", "from torch.distributed import Work"),
    (talks_to_ranks, "optimizer", f"{FROM}\nf = d.all_gather_object", f"{FROM}\nd.is_initialized()"),
    (talks_to_ranks, "step.engine", "import torch.distributed._functional_collectives as f", "pending.wait()"),
    (talks_to_ranks, "step.engine", "group._reduce_scatter_base(a, b)", "group.start_reduce_scatter(a, b)"),
    (talks_to_ranks, "integrations.ddp", "import torch.distributed as dist\ndist.all_reduce(x)", "optimizer.step()"),
    (talks_to_ranks, "optimizer", "import torch.distributed.checkpoint as dcp", "from distmuon.checkpoint import save"),
    (talks_to_ranks, "state_dict", "from torch.distributed.checkpoint import state_dict as s", "from os import rename"),
    (allocates, "layout.layout", "import torch\nx = torch.zeros(3)", "import torch\nx = torch.float32"),
    (allocates, "planning.plan", "y = x.new_empty(4)", "y = x.numel()"),
    (allocates, "options", "import torch.distributed as dist", "import torch"),
    (allocates, "layout.routing", "import torch\ntorch.distributed.get_rank()", "import torch\nfrom torch import nn"),
    (imports_strangers, "math.rules", "import numpy as np", "import torch, math"),
    (imports_strangers, "math.fused", "import triton", "from distmuon.math import kernels"),
    (imports_strangers, "planning.plan", "def f():\n    import transformers", "from dataclasses import dataclass"),
    (
        imports_strangers,
        "math.rules",
        'import importlib as i\ni.import_module("triton")',
        'import_module("torch.optim")',
    ),
]


@pytest.mark.parametrize(("law", "module", "breach", "clean"), LAWS)
def test_each_law_sees_its_planted_breach(law: Law, module: str, breach: str, clean: str) -> None:
    assert law(module, breach)
    assert module == "attic" or law(module, clean) == []


def _modules() -> dict[str, str]:
    """{dotted name without "distmuon.": source}; a folder's `__init__` has the name of the folder."""
    found = {}
    for file in sorted(LIBRARY.rglob("*.py")):
        parts = list(file.relative_to(LIBRARY).with_suffix("").parts)
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file.read_text()
    return found


@pytest.mark.parametrize("law", list(dict.fromkeys(entry[0] for entry in LAWS)), ids=lambda law: law.__name__)
def test_the_house_keeps_its_laws(law: Law) -> None:
    breaches = [breach for module, source in _modules().items() for breach in law(module, source)]
    assert not breaches, "\n".join(breaches)


def circles(modules: dict[str, str]) -> list[list[str]]:
    """The circles among the imports of `modules`, which the order of rooms does not see inside a room."""
    known: dict[str, set[str]] = {}
    for module, source in modules.items():
        names = {name.removeprefix("distmuon.") for _, name in imports(source) if name.startswith("distmuon.")}
        found = {next((m for m in (name, name.rpartition(".")[0]) if m in modules), "") for name in names}
        known[module] = found - {"", module}
    leaves = True
    while leaves:
        leaves = {module for module, others in known.items() if not others & known.keys()}
        known = {module: others for module, others in known.items() if module not in leaves}
    return [sorted(known)] if known else []


def test_no_module_imports_itself_by_way_of_others() -> None:
    planted = {"step.a": "from distmuon.step import b", "step.b": "from distmuon.step.a import f", "errors": ""}
    assert circles(planted) == [["step.a", "step.b"]]
    assert circles(_modules()) == []


def test_every_room_is_there_and_drawn() -> None:
    """The list is the design's: a room that vanished or was renamed must change there and here as well."""
    rooms = {module.split(".")[0] for module in _modules()}
    assert rooms == set(FLOORS), rooms ^ set(FLOORS)
    drawn = " < ".join(", ".join(sorted(rooms)) for rooms in HOUSE)
    assert drawn in " ".join(DESIGN.split()), f"docs/design.md must have the line: {drawn}"


def test_the_walk_of_one_gradient_is_short_and_true() -> None:
    """The hops that docs/design.md lists exist, and are few."""
    hops = [(found["file"], found["method"]) for found in HOP.finditer(DESIGN)]
    assert 8 <= len(hops) <= 12 and len({file for file, _ in hops}) <= 7
    for file, method in hops:
        nodes = ast.walk(ast.parse((LIBRARY / file).read_text()))
        assert method in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}, (file, method)


def test_the_methods_of_a_bucket_stand_in_the_order_of_the_algorithm() -> None:
    """And within `update` its stages do: a reader sees arXiv 2502.16982, Algorithm 1, from top to bottom."""
    tree = ast.parse((LIBRARY / "step" / "bucket.py").read_text())
    (bucket,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Bucket"]
    methods = {node.name: node for node in bucket.body if isinstance(node, ast.FunctionDef)}
    life = ["collect", "start_reduce", "finish_reduce", "update", "start_param_gather", "wait_params"]
    assert [name for name in methods if name in life] == life
    source = ast.unparse(methods["update"])
    called = ["_momentum", "start_gather", "gathering.wait", "_orthogonalize", "start_scatter", "scattering.wait"]
    places = [source.index(name) for name in [*called, "transport.apply"]]
    assert places == sorted(places)


def test_no_program_hides_a_package() -> None:
    """A launcher that runs a file of launch/ puts that folder first on the path: there a tokenizers.py took the place
    of the package, and `fabric run` failed."""
    programs = {file.stem for file in (LIBRARY.parent / "launch").glob("*.py")} - {"__init__"}
    assert {name for name in programs if importlib.util.find_spec(name) is not None} == set()
