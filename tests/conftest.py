"""Shared set-up: Triton's interpreter where there is no GPU, one thread (bitwise repeatability), fixed seeds.

And `figure`: what a test measured, printed when the run ends and kept in RELIABILITY.md.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def figure(record_property):
    """figure("R9", "200 kills, 0 checkpoints lost"): the last line of a test that a row of RELIABILITY.md rests on."""
    return lambda row, text: record_property("figure", f"{row:<4}{text}")


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.getreports("passed")
    figures = {text for report in passed for name, text in report.user_properties if name == "figure"}
    if figures:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(sorted(figures, key=lambda text: (int(text[1:4]), text))))
