"""A pytest plugin, -p bench.shares --share PART/PARTS: every PARTS-th test, for processes that share the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share")


@pytest.hookimpl(trylast=True)  # of those that are left after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("share").split("/"))
    items[:] = items[part::parts]
