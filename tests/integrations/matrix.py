"""The tables of docs/integrations.md that are made: the support matrix, of the marks on the tests; the fine-tuning one.

    python -m tests.integrations.matrix       # rewrites what stands between `<!-- made: NAME -->` and `<!-- end -->`

A cell of the matrix is one line above a test, in any test file:

    @pytest.mark.supports("save and resume, bit-equal")                    # the trainers the test is parametrised over
    @pytest.mark.supports("accumulation, clipping", "DDP", "Fabric")       # these
    @pytest.mark.refuses("clipping by value", "Fabric", use="clip_grad_norm_")

A row is a line of FEATURES. A cell without a test is "untested", unless FEATURES has words for it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from experiments import finetune

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
# column -> what the tests are parametrised with, in `trainer` or `recipe`
TRAINERS = {
    "DDP": "ddp",
    "accelerate": "accelerate",
    "Trainer": "trainer",
    "DeepSpeed": "deepspeed",
    "Fabric": "fabric",
    "Lightning": "lightning",
}
ONLY_DEEPSPEED = {trainer: "n/a" for trainer in TRAINERS if trainer != "DeepSpeed"}
WITHOUT_FSDP2 = {"DDP": "n/a", "DeepSpeed": "n/a"}
YOUR_FULLY_SHARD = {"Fabric": "your `fully_shard`", "Lightning": "your `fully_shard`"}
# row -> words for the cells in which there is nothing to test
FEATURES: dict[str, dict[str, str]] = {
    "weights, state and logged norms bit-equal to the plain loop": {},
    "accumulation, clipping, bf16 weights": {},
    "bf16 autocast": {},
    "fp16 with a loss scaler": {"DDP": "your own loop, `distmuon.GradScaler`"},
    "one reduction a step, no gradient all-reduced": {"Lightning": "DDP's all-reduce"},
    "save and resume, bit-equal": {"DDP": "your own loop"},
    "resume with another number of ranks": {"DDP": "your own loop"},
    "its saved optimizer state loads into the plain loop": {"DDP": "your own loop"},
    "recipe with the loss curve of `launch.pretrain`": {"DDP": "`launch.pretrain`"},
    "a run begun here goes on under `launch.pretrain`, and back": {"DDP": "`launch.pretrain`"},
    "its recipe under its own launcher, two processes on CPUs": {
        t: "`torchrun`" for t in ("DDP", "Trainer", "Lightning")
    },
    "evaluation, `save_total_limit`, best model, `resume_from_checkpoint=True`": {
        trainer: "n/a" for trainer in TRAINERS if trainer != "Trainer"
    },
    "several models and optimizers": {"DDP": "your own loop", "Trainer": "n/a", "DeepSpeed": "n/a"},
    "its own `prepare`, on two ranks or more": {trainer: "n/a" for trainer in TRAINERS if trainer != "accelerate"},
    'its own `prepare` with grad_reduction="external"': {t: "n/a" for t in TRAINERS if t != "accelerate"},
    "DDP around the model, silenced or averaging by itself": {t: "n/a" for t in TRAINERS if t != "DDP"},
    "DDP around the model, not silenced": {"accelerate": "not wrapped", "Trainer": "not wrapped", "DeepSpeed": "n/a"},
    "clipping by value": {"DDP": "n/a", "Trainer": "n/a", "DeepSpeed": "n/a"},
    "ZeRO stage >= 1": {"DDP": "n/a", "accelerate": "as DeepSpeed", "Fabric": "n/a", "Lightning": "n/a"},
    "FSDP1": {"DDP": "n/a", "DeepSpeed": "n/a"},
    "FSDP2: bit-equal to `fully_shard` and a loop by hand; accumulation, clipping, the true norm": WITHOUT_FSDP2,
    "FSDP2: save and resume, bit-equal, whole or sharded files": WITHOUT_FSDP2,
    "FSDP2: the plugin's mixed precision policy": {**WITHOUT_FSDP2, **YOUR_FULLY_SHARD},
    "FSDP2: a unit a layer, `cpu_ram_efficient_loading`": {**WITHOUT_FSDP2, **YOUR_FULLY_SHARD},
    "FSDP2: evaluation, best model, `train` called twice": {
        trainer: "n/a" for trainer in TRAINERS if trainer != "Trainer"
    },
    "FSDP2: its own `prepare` or `setup`": {**WITHOUT_FSDP2, "Trainer": "n/a", "Lightning": "n/a"},
    "the trainer's pipelines and expert groups": ONLY_DEEPSPEED,
    "a DeepSpeed engine that a launcher or trainer makes": {"DDP": "n/a", "Fabric": "n/a", "Lightning": "untested"},
    "the `bf16` block of the JSON": {"DDP": "n/a", "Fabric": "n/a", "Lightning": "untested"},
    "`managed_gradient_accumulation: false`, `engine.no_sync()`": ONLY_DEEPSPEED,
}


@dataclass
class Cell:
    """What the tests say of one feature under one trainer."""

    tests: list[str] = field(default_factory=list)
    is_nightly: bool = True
    uses: list[str | None] = field(default_factory=list)  # what to use instead, by refusal; None for a support

    def __str__(self) -> str:
        if None in self.uses:
            assert set(self.uses) == {None}, f"supported and refused: {self.tests}"
            return "yes (nightly)" if self.is_nightly else "yes"
        return "refused, use " + " or ".join(dict.fromkeys(str(use) for use in self.uses))


def marked_tests() -> Iterator[Callable[..., object]]:
    """The test functions of all files in which a mark of ours is written."""
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if re.search(r"^@pytest\.mark\.(supports|refuses)\(", file.read_text(), re.MULTILINE):
            module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
            yield from (each for name, each in vars(module).items() if name.startswith("test_"))


def trainers_of(marks: list[pytest.Mark]) -> dict[str, bool]:
    """The columns that a test is parametrised over, and whether it is a nightly one there."""
    for mark in marks:
        if mark.name == "parametrize" and mark.args[0] in ("trainer", "recipe"):
            cases = [case if hasattr(case, "marks") else pytest.param(case) for case in mark.args[1]]
            slow = {str(case.values[0]).removesuffix("_train"): _is_slow(case.marks) for case in cases}
            return {column: slow[value] for column, value in TRAINERS.items() if value in slow}
    return {}


def _is_slow(marks: Iterable[pytest.MarkDecorator | pytest.Mark]) -> bool:
    return any(mark.name == "slow" for mark in marks)


def cells() -> dict[tuple[str, str], Cell]:
    found: dict[tuple[str, str], Cell] = {}
    for test in marked_tests():
        marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
        for mark in marks:
            if mark.name not in ("supports", "refuses"):
                continue
            feature, *trainers = mark.args
            parametrised = trainers_of(marks)
            trainers = trainers or list(parametrised)
            assert trainers, f"{test.__name__}: {feature!r} names no trainer and is parametrised over none"
            for trainer in trainers:
                assert feature in FEATURES and trainer in TRAINERS, f"{test.__name__}: {feature!r}, {trainer!r}"
                cell = found.setdefault((feature, trainer), Cell())
                cell.tests.append(test.__name__)
                cell.is_nightly &= _is_slow(marks) or parametrised.get(trainer, False)
                cell.uses.append(mark.kwargs["use"] if mark.name == "refuses" else None)
    return found


def support_table() -> str:
    found = cells()
    lines = ["| feature | " + " | ".join(TRAINERS) + " | shown by |", "|---" * (len(TRAINERS) + 2) + "|"]
    for feature, words in FEATURES.items():
        row = {trainer: found.get((feature, trainer)) for trainer in TRAINERS}
        shown = (str(cell) if cell else words.get(trainer, "untested") for trainer, cell in row.items())
        tests = dict.fromkeys(f"`{test}`" for cell in row.values() if cell for test in cell.tests)
        lines.append(f"| {feature} | {' | '.join(shown)} | {', '.join(tests)} |")
    return "\n".join(lines)


MADE = {"support": support_table, "fine-tuning": finetune.table}


def made(page: str) -> str:
    """`page` with its made parts made anew. Raises KeyError for a part that nobody makes."""
    pattern = re.compile(r"(<!-- made: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda part: f"{part[1]}{MADE[part[2]]()}\n{part[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text()))
