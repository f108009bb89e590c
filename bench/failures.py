"""A pytest plugin, -p bench.failures: a failure is told when it happens, so that a run cut off has told what it met."""

from __future__ import annotations

import pytest


class _Teller:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = f"FAILURE {report.nodeid} in {report.when}, {report.duration:.1f} s\n{report.longreprtext}"
            self.config.get_terminal_writer().write(f"\n{text}\n", flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        session.config.option.tbstyle = "no"  # all have been told


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist: the one process that hears of all
        config.pluginmanager.register(_Teller(config))
