"""The pools that encoders take by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from setpred.encoders.pool import Pool
from tests import oracles

KINDS = pytest.mark.parametrize("kind", ["fspool", "sum", "mean", "max"])


@KINDS
@given(size=st.integers(1, 6), channels=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_equals_the_formula(kind: str, size: int, channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    pool = Pool(kind, channels, None, torch.float64)
    weight = pool.fspool.weight if kind == "fspool" else None
    rows = torch.randn(2, size, channels, dtype=torch.float64)
    expected = torch.stack([oracles.pool(list(sample), kind, weight) for sample in rows])
    torch.testing.assert_close(pool(rows), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "parameters"), [("fspool", 1), ("sum", 0), ("mean", 0), ("max", 0)])
def test_only_fspool_has_parameters_to_reset(kind: str, parameters: int) -> None:
    pool = Pool(kind, 3, None, None)
    before = [p.detach().clone() for p in pool.parameters()]
    assert len(before) == parameters
    pool.reset_parameters()
    assert not any(torch.equal(new, old) for new, old in zip(pool.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("kind", "equal"),
    [("fspool", False), ("sum", True), ("mean", True), ("max", True)],
)
def test_only_fspool_tells_equal_rows_apart(kind: str, equal: bool) -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.5, 1.0]]).unsqueeze(0).requires_grad_()
    (gradient,) = torch.autograd.grad(Pool(kind, 2, None, None)(rows).sum(), rows)
    assert torch.equal(gradient[0, 0], gradient[0, 1]) is equal
    assert gradient[0, :2].any()


def test_repr_says_the_kind() -> None:
    assert repr(Pool("max", 3, None, None)) == "Pool('max')"


def test_refuses_other_names() -> None:
    with pytest.raises(ValueError, match="`pool` must be one of 'fspool', 'sum', 'mean', 'max', got 'avg'"):
        Pool("avg", 3, None, None)
