"""Shared set-up: one thread (bitwise repeatability, and the machine is shared between workers), fixed seeds."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)
