"""Settings and fixtures of all tests."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("setpred", deadline=None, max_examples=50)
hypothesis.settings.load_profile("setpred")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
