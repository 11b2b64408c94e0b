"""The stable descending argsort, against torch.sort."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from setpred.functional.argsort import argsort_descending

# Few values, so that many are equal; and the ones whose bits are not ordered as they are.
values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, math.inf, -math.inf]) | st.floats(
    width=32, allow_nan=False
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    rows=st.integers(0, 6).flatmap(lambda n: st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=3))
)
def test_equals_the_stable_sort(dtype: torch.dtype, rows: list[list[float]]) -> None:
    x = torch.tensor(rows, dtype=dtype).view(len(rows), -1)
    expected = [sorted(range(len(row)), key=lambda i: -row[i]) for row in x.tolist()]
    assert argsort_descending(x).tolist() == expected
    assert argsort_descending(x.t().contiguous().t()).tolist() == expected
