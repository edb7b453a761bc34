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
from collections.abc import Callable, Iterator
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
}
ONLY_DEEPSPEED = {trainer: "n/a" for trainer in TRAINERS if trainer != "DeepSpeed"}
# row -> words for the cells in which there is nothing to test
FEATURES: dict[str, dict[str, str]] = {
    "weights, state and logged norms bit-equal to the plain loop": {},
    "accumulation, clipping, bf16 weights": {},
    "bf16 autocast": {},
    "fp16 with a loss scaler": {},
    "one reduction a step, no gradient all-reduced": {},
    "save and resume, bit-equal": {"DDP": "your own loop"},
    "resume with another number of ranks": {"DDP": "your own loop"},
    "recipe with the loss curve of `launch.pretrain`": {"DDP": "`launch.pretrain`"},
    "DDP around the model, silenced or averaging by itself": {"DeepSpeed": "n/a"},
    "DDP around the model, not silenced": {"DeepSpeed": "n/a"},
    "clipping by value": {"DDP": "n/a", "Trainer": "n/a", "DeepSpeed": "n/a"},
    "ZeRO stage >= 1, FSDP": {},
    "the trainer's pipelines and expert groups": ONLY_DEEPSPEED,
    "the `bf16` block of the JSON, under `initialize`": ONLY_DEEPSPEED,
    "the `bf16` block of the JSON, under `register`": ONLY_DEEPSPEED,
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


def trainers_of(marks: list[pytest.Mark]) -> list[str]:
    """The columns that a test is parametrised over."""
    for mark in marks:
        if mark.name == "parametrize" and mark.args[0] in ("trainer", "recipe"):
            values = {str(value).removesuffix("_train") for value in mark.args[1]}
            return [column for column, value in TRAINERS.items() if value in values]
    return []


def cells() -> dict[tuple[str, str], Cell]:
    found: dict[tuple[str, str], Cell] = {}
    for test in marked_tests():
        marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
        for mark in marks:
            if mark.name not in ("supports", "refuses"):
                continue
            feature, *trainers = mark.args
            trainers = trainers or trainers_of(marks)
            assert trainers, f"{test.__name__}: {feature!r} names no trainer and is parametrised over none"
            for trainer in trainers:
                assert feature in FEATURES and trainer in TRAINERS, f"{test.__name__}: {feature!r}, {trainer!r}"
                cell = found.setdefault((feature, trainer), Cell())
                cell.tests.append(test.__name__)
                cell.is_nightly &= any(other.name == "slow" for other in marks)
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
