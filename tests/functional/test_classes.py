"""Costs of class logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from setpred.functional.classes import focal_cost, probability_cost
from setpred.functional.pairwise import cross_entropy_cost, euclidean_cost, paired_cost, pairwise_cost
from tests import oracles
from tests.devices import gradcheck, gradgradcheck

DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@given(
    n=st.integers(0, 4),
    m=st.integers(0, 4),
    channels=st.integers(1, 5),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    gamma=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(n: int, m: int, channels: int, alpha: float, gamma: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, classes = 3 * torch.randn(2, n, channels, **DOUBLE), torch.randint(channels, (2, m))
    target = F.one_hot(classes, channels).double()
    focal, likely = torch.zeros(2, n, m, **DOUBLE), torch.zeros(2, n, m, **DOUBLE)
    for b in range(2):
        for i in range(n):
            for j in range(m):
                logit = logits[b, i, classes[b, j]]
                focal[b, i, j] = oracles.focal(logit, True, alpha, gamma) - oracles.focal(logit, False, alpha, gamma)
                likely[b, i, j] = 1 - logit.exp() / sum(x.exp() for x in logits[b, i])
    torch.testing.assert_close(focal_cost(logits, target, alpha=alpha, gamma=gamma), focal, **EXACT)
    torch.testing.assert_close(probability_cost(logits, target), likely, **EXACT)
    k = min(n, m)
    diagonal = likely.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(paired_cost(logits[:, :k], target[:, :k], probability_cost), diagonal, **EXACT)


@pytest.mark.parametrize("cost", [focal_cost, probability_cost])
def test_gradients(cost: object) -> None:
    x, y = (3 * torch.randn(2, 3, 4, **DOUBLE)).requires_grad_(), torch.randn(2, 2, 4, **DOUBLE).softmax(-1)
    y.requires_grad_()
    assert gradcheck(cost, (x, y))
    assert gradgradcheck(cost, (x, y))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_of_certain_predictions_is_finite(gamma: float) -> None:
    logits = torch.tensor([[[-300.0, -90.0, 0.0, 90.0, 300.0]]], requires_grad=True)
    value = focal_cost(logits, torch.eye(5).unsqueeze(0), gamma=gamma)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


def test_compiles_whole() -> None:
    x, y = torch.randn(2, 3, 4), torch.eye(4).expand(2, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, y: pairwise_cost(x, y, focal_cost) + pairwise_cost(x, y, probability_cost),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(x, y), focal_cost(x, y) + probability_cost(x, y))
    torch._dynamo.reset()


def test_half_precision_is_computed_in_float32() -> None:
    x, y = torch.randn(2, 3, 4).half(), torch.eye(4).expand(2, 4, 4)
    for cost in (focal_cost, probability_cost, cross_entropy_cost, euclidean_cost):
        assert pairwise_cost(x, y, cost).dtype == cost(x, y).dtype == cost(x, y.half()).dtype == torch.float32
        torch.testing.assert_close(cost(x, y), cost(x.float(), y))


@pytest.mark.parametrize(
    ("cost", "name"),
    [(focal_cost, "target"), (probability_cost, "target"), (cross_entropy_cost, "target"), (euclidean_cost, "y")],
)
def test_refuses_sets_that_do_not_belong_together(cost: Any, name: str) -> None:
    x = torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match=rf"`{name}` must have shape \(1, M, 4\), got .* \(2, 3, 4\)"):
        cost(x, torch.randn(2, 3, 4))  # which would broadcast
    with pytest.raises(TypeError, match=f"`{name}` must have a floating dtype, got int64"):
        cost(x, torch.ones(1, 3, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"`alpha` must lie in \[0, 1\], got 1.5", {"alpha": 1.5}),
        (ValueError, r"`alpha` must lie in \[0, 1\], got nan", {"alpha": torch.nan}),
        (TypeError, "`alpha` must be a number", {"alpha": None}),
        (ValueError, "`gamma` must be at least 0", {"gamma": -1.0}),
        (ValueError, "`gamma` must be finite", {"gamma": torch.inf}),
    ],
)
def test_refuses(error: type[Exception], message: str, options: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        focal_cost(torch.rand(1, 2, 3), torch.rand(1, 2, 3), **options)
