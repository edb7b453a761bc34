"""The house of docs/design.md: who may import whom, talk to other ranks, and allocate.

The laws are read from the syntax tree, so a breach is found without running the code. Each law is a function of (room,
source) that returns the breaches it sees; each is first shown a planted breach and a clean neighbour, then the library.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "distmuon"
FLOORS = {
    "roll_call": 0, "names": 0,
    "errors": 1, "coefficients": 1, "rules": 1, "formats": 1, "metrics": 1, "collectives": 1, "step_time": 1,
    "grad_scaler": 1, "boxes": 1, "memory": 1, "placeholder": 1, "archives": 1, "layers": 1,
    "config": 2, "ends": 2, "guards": 2, "holdings": 2, "newton_schulz": 2, "agreement": 2, "manifest": 2,
    "routing": 3, "ns_kernels": 3, "run_state": 3, "snapshot": 3,
    "packing": 4, "shapes": 4,
    "layout": 5,
    "buffers": 6, "counts": 6,
    "grad_reduce": 7, "matrix_gather": 7, "param_gather": 7, "checkpoint": 7, "hooks": 7, "planner": 7,
    "sharded": 7, "local_state": 7,
    "walk": 8,
    "conductor": 9,
    "trainer_face": 10,
    "optimizer": 11, "doctor": 11, "__init__": 11,
    "saving": 12, "loading": 12, "interchange": 12, "integrations": 12, "cli": 12, "__main__": 12,
}  # fmt: skip
GUESTS = {("ns_kernels", "gram_newton_schulz")}  # asked for by name, on one kind of GPU, and checked before use
FACES = {"integrations", "cli", "__main__"}
INTEGERS_ONLY = {
    "boxes", "config", "names", "layers", "ends", "routing", "packing", "shapes", "layout", "counts", "planner",
    "step_time",
}  # fmt: skip
COLLECTIVES = {
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "all_gather", "all_gather_into_tensor",
    "all_gather_single", "all_gather_coalesced", "all_gather_object", "gather", "gather_object", "gather_single",
    "scatter", "scatter_single",
    "scatter_object_list", "broadcast_object_list", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single",
    "all_to_all", "all_to_all_single", "barrier", "monitored_barrier", "send", "recv", "isend", "irecv",
    "batch_isend_irecv", "send_object_list", "recv_object_list",
}  # fmt: skip
GROUP_METHODS = {
    "allreduce", "allgather", "alltoall", "alltoall_base", "allreduce_coalesced", "allgather_coalesced",
    "_allgather_base", "_reduce_scatter_base", "allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced",
}  # fmt: skip
ALLOCATORS = {
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "from_numpy", "full", "full_like", "linspace",
    "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor",
    "Tensor", "zeros", "zeros_like",
    "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "clone", "stack", "cat",
}  # fmt: skip


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


def breaks_floors(room: str, source: str) -> list[str]:
    """A room imports only rooms on lower floors, so there is no circle and movers are strangers (laws c and d).

    `errors` may be raised by all.
    """
    if room not in FLOORS:
        return [f"{room}: stands on no floor of the table"]
    known = [(line, other) for line, other in rooms_known(source) if other != room]
    if room != "errors":
        known = [(line, other) for line, other in known if other != "errors"]
    if room == "__init__":  # the front door shows rooms of every floor but the faces
        return [f"__init__:{line}: imports the face {other}" for line, other in known if other in FACES | {"launch"}]
    return [
        f"{room}:{line}: floor {FLOORS[room]} imports {other}"
        for line, other in known
        if other == "launch" or (FLOORS[other] >= FLOORS[room] and not (room in FACES and other == "__init__"))
        if not (room == "__main__" and other == "cli")
    ]


def talks_to_ranks(room: str, source: str) -> list[str]:
    """Law (a): collectives only in `collectives`; torch's distributed checkpoint only in `sharded`."""
    breaches = []
    for line, name in dotted_uses(source):
        root, _, last = name.rpartition(".")
        collective = root.startswith("torch.distributed") and (last in COLLECTIVES or "functional" in root)
        if room != "collectives" and (collective or last in GROUP_METHODS):
            breaches.append(f"{room}:{line}: {name}")
        if room != "sharded" and name.startswith("torch.distributed.checkpoint"):
            breaches.append(f"{room}:{line}: {name}")
    for line, name in imports(source):
        banned = "functional" in name or name.rpartition(".")[2] in COLLECTIVES
        if room != "collectives" and name.startswith("torch.distributed.") and banned:
            breaches.append(f"{room}:{line}: imports {name}")
        if room != "sharded" and name.startswith("torch.distributed.checkpoint"):
            breaches.append(f"{room}:{line}: imports {name}")
    return breaches


def allocates(room: str, source: str) -> list[str]:
    """Law (b): config, routing and its rooms, packing, layout and planner make no tensor and know no process group."""
    if room not in INTEGERS_ONLY:
        return []
    breaches = [
        f"{room}:{line}: imports {name}" for line, name in imports(source) if name.startswith("torch.distributed")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ALLOCATORS:
            breaches.append(f"{room}:{node.lineno}: calls {ast.unparse(node.func)}")
    breaches += [f"{room}:{n}: {name}" for n, name in dotted_uses(source) if name.startswith("torch.distributed")]
    return breaches


def imports_strangers(room: str, source: str) -> list[str]:
    """Law (e): beyond torch and the standard library, packages are imported only by the faces; GUESTS by name."""
    if room in FACES:
        return []
    allowed = {"torch", "distmuon", *sys.stdlib_module_names, *(guest for host, guest in GUESTS if host == room)}
    found = list(imports(source))
    for node in ast.walk(ast.parse(source)):  # a name that is not written out is nobody's guest
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found.append((node.lineno, str(getattr(node.args[0], "value", "?"))))
    return [f"{room}:{line}: imports {name}" for line, name in found if name.split(".")[0] not in allowed]


DIST, FROM = "import torch.distributed as dist", "from torch import distributed as d"
LAWS: list[tuple[Callable[[str, str], list[str]], str, str, str]] = [
    # law, room, a breach, a clean neighbour
    (breaks_floors, "layout", "from distmuon.buffers import Buffers", "from distmuon.routing import ParamSpec"),
    (breaks_floors, "grad_reduce", "def f():\n    import distmuon.param_gather", "import distmuon.buffers"),
    (breaks_floors, "matrix_gather", "from distmuon import grad_reduce", "from distmuon import layout, newton_schulz"),
    (breaks_floors, "rules", "from .metrics import Metrics", "from distmuon.errors import problem"),
    (breaks_floors, "coefficients", "from distmuon.newton_schulz import form", "from distmuon.errors import problem"),
    (breaks_floors, "errors", "from distmuon.coefficients import resolve", "import torch"),
    (breaks_floors, "walk", "from distmuon.optimizer import DistMuon", "from distmuon.matrix_gather import Exchange"),
    (breaks_floors, "packing", "from distmuon.layout import Layout", "from distmuon.routing import ParamSpec"),
    (breaks_floors, "checkpoint", "import distmuon", "from .buffers import Buffers"),
    (breaks_floors, "optimizer", "from distmuon.integrations.deepspeed import x", "from distmuon.checkpoint import x"),
    (breaks_floors, "__init__", "from distmuon.cli import main", "from distmuon.optimizer import DistMuon"),
    (breaks_floors, "cli", "from distmuon import launch", "import distmuon\nimport distmuon.planner"),
    (breaks_floors, "attic", "", "") ,
    (talks_to_ranks, "buffers", f"{DIST}\ndist.broadcast(x, 0)", f"{DIST}\ndist.get_rank()"),
    (talks_to_ranks, "guards", "import torch\ntorch.distributed.all_reduce(x)", "group.start_all_reduce(x)"),
    (talks_to_ranks, "optimizer", "from torch.distributed import barrier as w", "from torch.distributed import Work"),
    (talks_to_ranks, "optimizer", f"{FROM}\nf = d.all_gather_object", f"{FROM}\nd.is_initialized()"),
    (talks_to_ranks, "grad_reduce", "import torch.distributed._functional_collectives as f", "pending.wait()"),
    (talks_to_ranks, "grad_reduce", "group._reduce_scatter_base(a, b)", "group.start_reduce_scatter(a, b)"),
    (talks_to_ranks, "optimizer", "import torch.distributed.checkpoint as dcp", "from distmuon.checkpoint import save"),
    (talks_to_ranks, "checkpoint", "from torch.distributed.checkpoint import state_dict as s", "from os import rename"),
    (breaks_floors, "sharded", "from distmuon.saving import Saving", "from distmuon.snapshot import reached"),
    (allocates, "layout", "import torch\nx = torch.zeros(3)", "import torch\nx = torch.float32"),
    (allocates, "planner", "y = x.new_empty(4)", "y = x.numel()"),
    (allocates, "config", "import torch.distributed as dist", "import torch"),
    (allocates, "routing", "import torch\ntorch.distributed.get_rank()", "import torch\nfrom torch import nn"),
    (imports_strangers, "rules", "import numpy as np", "import torch, math"),
    (imports_strangers, "planner", "def f():\n    import transformers", "from dataclasses import dataclass"),
    (imports_strangers, "rules", 'import importlib as i\ni.import_module("triton")', 'import_module("torch.optim")'),
    (imports_strangers, "ns_kernels", "import_module(name)", 'importlib.import_module("gram_newton_schulz")'),
]  # fmt: skip


@pytest.mark.parametrize(("law", "room", "breach", "clean"), LAWS)
def test_each_law_sees_its_planted_breach(
    law: Callable[[str, str], list[str]], room: str, breach: str, clean: str
) -> None:
    assert law(room, breach)
    assert room == "attic" or law(room, clean) == []


def _rooms() -> dict[str, tuple[str, str]]:
    """{file: (room, source)}; every file under integrations/ belongs to that one room."""
    files = sorted(LIBRARY.rglob("*.py"))
    return {
        str(f.relative_to(LIBRARY)): (f.relative_to(LIBRARY).with_suffix("").parts[0], f.read_text()) for f in files
    }


@pytest.mark.parametrize("law", list(dict.fromkeys(entry[0] for entry in LAWS)), ids=lambda law: law.__name__)
def test_the_house_keeps_its_laws(law: Callable[[str, str], list[str]]) -> None:
    breaches = [f"{file} {breach}" for file, (room, source) in _rooms().items() for breach in law(room, source)]
    assert not breaches, "\n".join(breaches)


def test_the_faces_may_talk_to_ranks_only_through_the_library() -> None:
    """`integrations` and `cli` are under law (a) like every other room."""
    assert talks_to_ranks("integrations", "import torch.distributed as dist\ndist.all_reduce(x)")


def test_every_floor_is_lived_in() -> None:
    """The table is the design's: a room that vanished or was renamed must change there and here as well."""
    rooms = {room for room, _ in _rooms().values()}
    assert rooms | FACES == set(FLOORS), (rooms | FACES) ^ set(FLOORS)
    design = (LIBRARY.parent / "docs" / "design.md").read_text()
    for room in set(FLOORS) - FACES - {"__init__"}:
        lines = [line for line in design.splitlines() if line.strip().startswith(f"{FLOORS[room]} ") and room in line]
        assert lines, f"{room} does not stand on floor {FLOORS[room]} in docs/design.md"
