"""The stable argsort against torch.sort.

pytest tests/benchmarks/test_sort.py
"""

import pytest
import torch

from setpred.functional import argsort_descending

SHAPES = {"CLEVR": (512, 32, 100), "MNIST": (64, 32, 342), "digits": (128, 32, 32)}


@pytest.mark.parametrize("ours", [True, False], ids=["argsort_descending", "torch.sort"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sort(benchmark, shape, ours) -> None:
    values = torch.randn(SHAPES[shape])
    benchmark.group = shape
    if ours:
        benchmark(argsort_descending, values)
    else:
        benchmark(lambda: torch.sort(values, dim=-1, descending=True, stable=True))
