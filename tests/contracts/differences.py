"""Where DistMuon answers otherwise than torch: said above the test that shows it, and made into docs/contracts.md.

    python -m tests.contracts.differences      # rewrites what stands between `<!-- made: differences -->` and the end

Each test function of SUITES is a demand, and the first paragraph of its docstring says which. A demand that DistMuon
does not meet stands under `differs`: its test does what torch's users do and must end in the error given there. Once it
ends well, the test fails and asks for the mark, and with it the row of the page, to be taken away.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "contracts.md"
# heading on the page -> module; what another module of this folder marks with `differs` is shown if it stands here
SUITES = {
    "torch.optim": "tests.contracts.test_torch_optim",
    "torch.optim.lr_scheduler and swa_utils.SWALR": "tests.contracts.test_schedulers",
    "ZeroRedundancyOptimizer": "tests.contracts.test_zero_redundancy",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """What DistMuon does where torch does what the test demands, and why."""

    instead: str
    reason: str


def differs(
    *, instead: str, reason: str, match: str, raises: type[BaseException] = ValueError
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """The test below shows a demand that DistMuon does not meet: it must raise `raises` with a message like `match`."""

    def mark(test: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(test)
        def otherwise(*args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            try:
                test(*args, **kwargs)
            except raises as error:
                if not re.search(match, str(error)):
                    raise AssertionError(f"{test.__name__} fails for another reason than {match!r}") from error
                return
            pytest.fail(f"{test.__name__} holds now: take `differs` away and make docs/contracts.md anew")

        otherwise.difference = Difference(instead, reason)  # type: ignore[attr-defined]
        return otherwise

    return mark


def demands(module: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(what is demanded, its test) in the order of the file."""
    for name, test in vars(importlib.import_module(module)).items():
        if name.startswith("test_"):
            text = inspect.getdoc(test)
            assert text, f"{module}: {name} does not say what is demanded"
            yield " ".join(text.split("\n\n")[0].split()), test


def cases(test: Callable[..., Any]) -> tuple[int, int]:
    """(how many cases the test runs in CI, how many more by night)."""
    marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
    tables = [mark.args[1] for mark in marks if mark.name == "parametrize"]
    total = prod(len(table) for table in tables)
    daily = prod(sum(not _is_slow(getattr(case, "marks", ())) for case in table) for table in tables)
    return (0, total) if _is_slow(marks) else (daily, total - daily)


def _is_slow(marks: Any) -> bool:
    return any(mark.name == "slow" for mark in marks)


def table(heading: str) -> str:
    """The part of the page about one suite."""
    found = list(demands(SUITES[heading]))
    counts = [cases(test) for _, test in found]
    rows = [(text, test.__name__, test.difference) for text, test in found if hasattr(test, "difference")]
    file = SUITES[heading].replace(".", "/") + ".py"
    lines = [
        f"## {heading}",
        "",
        f"`{file}`: {len(found)} demands, {len(found) - len(rows)} met, {len(rows)} answered otherwise. "
        f"{sum(daily for daily, _ in counts)} cases in CI, {sum(more for _, more in counts)} more by night.",
        "",
        "| torch | DistMuon | reason | test |",
        "|---|---|---|---|",
        *(f"| {text} | {each.instead} | {each.reason} | `{name}` |" for text, name, each in rows),
    ]
    return "\n".join(lines)


def made(page: str) -> str:
    """`page` with its made part made anew."""
    text = "\n\n".join(table(heading) for heading in SUITES)
    pattern = re.compile(r"(<!-- made: differences -->\n).*(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda part: f"{part[1]}{text}\n{part[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text()))
