"""Settings and fixtures of all tests."""

import hypothesis
import pytest
import torch

# The tensors are tiny: more threads only wait for each other, ten times as long where the machine is busy.
torch.set_num_threads(1)

hypothesis.settings.register_profile("setpred", deadline=None, max_examples=50)
hypothesis.settings.load_profile("setpred")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
