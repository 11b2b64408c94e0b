"""Timings use all cores, where the tests use one."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _all_cores() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
