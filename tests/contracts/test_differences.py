"""docs/contracts.md says what the tests say, and a difference that is none any more is seen."""

from __future__ import annotations

import re

import pytest

from tests.contracts import differences
from tests.contracts.differences import differs


def test_the_page_is_what_the_tests_say() -> None:
    """`python -m tests.contracts.differences` writes it."""
    page = differences.PAGE.read_text()
    assert page.count("<!-- made: differences -->") == 1
    assert differences.made(page) == page


def test_every_row_is_a_test_of_its_suite() -> None:
    for heading, module in differences.SUITES.items():
        named = re.findall(r"`(test_\w+)` \|$", differences.table(heading), re.MULTILINE)
        otherwise = [test.__name__ for _, test in differences.demands(module) if hasattr(test, "difference")]
        assert named == otherwise and len(named) == len(set(named)) > 0


def test_only_an_expected_refusal_counts_as_a_difference() -> None:
    mark = differs(instead="refused", reason="on purpose", match="as expected")

    @mark
    def refuses(how: str) -> None:
        raise ValueError(how)

    refuses("as expected, with its cure")
    with pytest.raises(AssertionError, match=r"refuses fails for another reason than 'as expected'"):
        refuses("not found")


def test_a_difference_that_is_none_any_more_is_seen() -> None:
    @differs(instead="refused", reason="on purpose", match="")
    def accepts() -> None: ...

    with pytest.raises(pytest.fail.Exception, match="accepts holds now: take `differs` away"):
        accepts()


def test_an_error_of_another_kind_is_no_difference() -> None:
    @differs(instead="refused", reason="on purpose", match="")
    def breaks() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        breaks()


def test_cases_are_counted_with_their_marks() -> None:
    night = pytest.mark.slow

    @pytest.mark.parametrize("one", [1, 2, pytest.param(3, marks=night)])
    @pytest.mark.parametrize(("two", "three"), [(1, 2), pytest.param(3, 4, marks=night)])
    def test_planted() -> None: ...

    assert differences.cases(test_planted) == (2, 4)
    assert differences.cases(night(test_planted)) == (0, 6)
    assert differences.cases(lambda: None) == (1, 0)
