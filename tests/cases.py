"""Which cases of a test the quick suite takes: the others are slow."""

import pytest

# Of the prototype losses: classes alone without exclusion; classes and samples with it. Both take most branches.
TWO = ("ntce", "nonl-both")


def quick(values, takes):
    """Values as parameters, slow but for those that `takes` holds, or holds for."""
    holds = takes if callable(takes) else takes.__contains__
    return [value if holds(value) else _slow(value) for value in values]


def _slow(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
