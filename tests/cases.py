"""Which cases of a test run with the fast ones."""

from collections.abc import Iterable

import pytest


def others_slow(cases: Iterable, *fast) -> list:
    """The cases of a test, all slow but for those that are enough to see at once when something broke."""
    cases = list(cases)
    assert all(case in cases for case in fast)
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]
